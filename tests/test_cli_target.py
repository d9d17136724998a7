# SPDX-License-Identifier: Apache-2.0
"""Who does the work of a verb, and what applying a policy would change."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vgw import cli_target
from vgw.abi import ABI_VERSION, Action, Mode
from vgw.cli_plan import compare
from vgw.cli_target import AttachOrder, ControllerTarget, LocalTarget, connect, each_vm
from vgw.controller import api
from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.paths import Paths
from vgw.errors import (
    ControllerUnreachableError,
    ForeignProgramError,
    PartlyAppliedError,
    PolicyError,
    VgwError,
)
from vgw.policy.model import Defaults, Direction, EffectivePolicy, EffectiveRule, Hook, Tier

POLICY = "schema: vgw/v1\nvms: {a: {interfaces: [{name: tap0}]}}\n"
SOURCES = [("policy.yaml", POLICY)]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.from_environment({}, run_dir=tmp_path)


@pytest.fixture
def serve(paths: Paths) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Be a controller that gives these answers by verb."""
    servers = []

    def start(answers: dict[str, Any]) -> None:
        verbs = {verb: lambda _, answer=answer: answer for verb, answer in answers.items()}
        server = api.Server(paths.socket, verbs)
        servers.append(server)
        server.start()

    yield start
    for server in servers:
        server.close()


def identity(abi: int = ABI_VERSION) -> dict[str, Any]:
    return {"pid": 1, "version": "9.9", "abi": abi}


def test_without_a_socket_this_process_does_the_work(paths: Paths) -> None:
    assert isinstance(connect(paths, None), LocalTarget)


def test_a_socket_that_a_dead_controller_left_is_passed_over(paths: Paths) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(paths.socket))
    assert paths.socket.exists()
    assert isinstance(connect(paths, None), LocalTarget)


def test_a_controller_that_answers_does_the_work(
    paths: Paths, serve: Callable[[dict[str, Any]], None]
) -> None:
    results = [{"vm": vm, "changed": True} for vm in ("a", "b")]
    serve(
        {
            "ping": identity(),
            "attach": results[0],
            "detach": {"detached": ["a"]},
            "apply": {"vms": results, "waiting": {}},
            "status": {"vms": []},
            "rules": {"rules": []},
            "conntrack": {"flows": []},
            "flush": {"vm": "a", "entries": 3},
            "mode": {"vm": "a", "mode": "monitor"},
        }
    )
    target = connect(paths, None)
    assert isinstance(target, ControllerTarget)
    assert target.attach(AttachOrder(["a"], SOURCES)) == {"vms": results[:1], "waiting": {}}
    assert target.attach(AttachOrder(["a", "b"], SOURCES, hook="tc"))["vms"] == [results[0]] * 2
    assert target.detach("a") == target.detach_all() == ["a"]
    assert target.apply(SOURCES)["vms"] == results
    assert target.status(None) == {"vms": []}
    assert target.rules("a") == {"rules": []}
    assert target.conntrack("a") == {"flows": []}
    assert target.flush("a") == 3
    target.set_mode("a", "monitor")


def test_a_controller_gets_many_vms_by_one_request(
    paths: Paths, serve: Callable[[dict[str, Any]], None]
) -> None:
    many = {"vms": [{"vm": "a"}, {"vm": "b"}], "waiting": {}, "seconds": 0.1}
    serve({"ping": identity(), "attach": many})
    assert connect(paths, None).attach(AttachOrder(["a", "b"], SOURCES)) == many


def test_beside_a_controller_of_another_version_nothing_is_done(
    paths: Paths, serve: Callable[[dict[str, Any]], None]
) -> None:
    serve({"ping": identity(ABI_VERSION + 1)})
    with pytest.raises(ControllerUnreachableError, match=r"runs vgw 9\.9.*restart the controller"):
        connect(paths, None)


def test_beside_a_controller_that_hangs_nothing_is_done(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_target, "PING_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(paths.socket))
        deaf.listen()
        with pytest.raises(ControllerUnreachableError, match=r"vgw\.sock gives no answer"):
            connect(paths, None)


class FakeHost:
    """Stands for reconcile.Host; VM `bad` cannot be attached."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.paths = Paths.from_environment({"VGW_INVENTORY": "/nonexistent"})

    def attach(self, document: Any, vm: str, **options: Any) -> AttachResult:
        self.asked.append((vm, sorted(document.vms), options))
        if vm == "bad":
            raise ForeignProgramError("program 7 is there")
        return AttachResult(vm, ["tap0"], 1, changed=True, compiled=False, seconds=0.1)

    def attach_many(self, document: Any, vms: list[str], *, force: bool) -> ApplyResult:
        self.asked.append((list(vms), sorted(document.vms), force))
        return ApplyResult([], {"a": ["tap0"]}, 0.1)

    def set_mode(self, vm: str, mode: Mode) -> None:
        self.asked.append((vm, mode))


def local(host: FakeHost) -> LocalTarget:
    return LocalTarget(host)  # type: ignore[arg-type]


def test_one_vm_is_attached_by_its_order() -> None:
    host = FakeHost()
    answer = local(host).attach(AttachOrder(["a"], SOURCES, ("tap0",), "xdp", force=True))
    assert [row["vm"] for row in answer["vms"]] == ["a"]
    options = {"interfaces": ("tap0",), "hook": Hook.XDP, "force": True}
    assert host.asked == [("a", ["a"], options)]


def test_many_vms_are_attached_side_by_side() -> None:
    host = FakeHost()
    answer = local(host).attach(AttachOrder(["a", "b"], SOURCES))
    assert (answer["vms"], answer["waiting"]) == ([], {"a": ["tap0"]})
    assert host.asked == [(["a", "b"], ["a"], False)]


def test_a_policy_with_a_mistake_reaches_no_vm() -> None:
    host = FakeHost()
    with pytest.raises(PolicyError):
        local(host).attach(AttachOrder(["a"], [("policy.yaml", "schema: vgw/v0\n")]))
    assert host.asked == []


def test_without_a_policy_a_vm_gets_the_defaults() -> None:
    host = FakeHost()
    local(host).attach(AttachOrder(["new"], None, ("tap7",)))
    assert host.asked[0][:2] == ("new", [])


def test_a_mode_is_given_by_its_name() -> None:
    host = FakeHost()
    local(host).set_mode("a", "quarantine")
    assert host.asked == [("a", Mode.QUARANTINE)]


def test_what_fails_for_one_vm_keeps_no_other_back() -> None:
    host = FakeHost()
    with pytest.raises(PartlyAppliedError) as caught:
        local(host).attach(AttachOrder(["a", "bad", "c"], SOURCES, hook="tc"))
    assert caught.value.failures == {"bad": "program 7 is there"}
    assert [row["vm"] for row in caught.value.done] == ["a", "c"]
    assert [vm for vm, *_ in host.asked] == ["a", "bad", "c"]


def test_a_single_vm_fails_with_its_own_error() -> None:
    def protect(vm: str) -> dict[str, Any]:
        raise VgwError(f"no {vm}")

    with pytest.raises(VgwError, match=r"^no a$"):
        each_vm(["a"], protect)


def policy(*names: str, action: Action = Action.ACCEPT) -> EffectivePolicy:
    return EffectivePolicy(
        "a",
        tuple(
            EffectiveRule(Direction.INGRESS, Tier.VM, "p", name, action, line=number)
            for number, name in enumerate(names)
        ),
    )


def test_a_plan_names_rules_that_come_go_and_change() -> None:
    now = policy("stays", "goes", "changes")
    changes, comes = policy("changes", "comes", action=Action.DROP).ingress
    then = replace(now, ingress=(now.ingress[0], changes, comes))
    assert compare(now, then) == {
        "added": ["ingress/vm/p/comes"],
        "removed": ["ingress/vm/p/goes"],
        "modified": ["ingress/vm/p/changes"],
        "reordered": False,
        "defaults": False,
    }


def test_a_plan_tells_another_order_and_other_defaults() -> None:
    now = policy("one", "two")
    then = replace(policy("two", "one"), defaults=Defaults(ingress=Action.REJECT))
    found = compare(now, then)
    assert (found["reordered"], found["defaults"]) == (True, True)
    assert found["added"] == found["removed"] == found["modified"] == []


def test_where_a_rule_is_written_does_not_matter() -> None:
    now = policy("one")
    then = replace(now, ingress=(replace(now.ingress[0], file="b", line=9, comment="moved"),))
    assert not any(compare(now, then).values())


def test_a_plan_without_memory_names_no_rules() -> None:
    assert set(compare(None, policy("one")).values()) == {None}
