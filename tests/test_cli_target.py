# SPDX-License-Identifier: Apache-2.0
"""Who does the work of a verb."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vgw import cli_target
from vgw.abi import ABI_VERSION, Mode
from vgw.cli_target import ApplyOptions, AttachOrder, connect, each_vm
from vgw.cli_target_controller import ControllerTarget
from vgw.cli_target_local import LocalTarget
from vgw.controller import api, inventory
from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.finding.search import Look
from vgw.controller.paths import Paths
from vgw.errors import (
    ControllerUnreachableError,
    ForeignProgramError,
    PartlyAppliedError,
    PolicyError,
    VgwError,
)
from vgw.policy.model import Hook
from vgw.policy.parse import parse_sources

POLICY = "schema: vgw/v1\nvms: {a: {interfaces: [{name: tap0}]}}\n"
SOURCES = [("policy.yaml", POLICY)]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.from_environment(
        {},
        inventory=tmp_path / "inventory.yaml",
        run_dir=tmp_path,
        state_dir=tmp_path / "state",
        log_file=tmp_path / "events.jsonl",
    )


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
            "rollback": {"policy": 9, "back": 7, "vms": results, "waiting": {}},
            "confirm": {"policy": 8},
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
    assert target.apply(SOURCES, ApplyOptions())["vms"] == results
    assert target.rollback(None)["back"] == 7
    assert target.confirm() == 8
    assert target.status(None) == {"vms": []}
    assert target.rules("a") == {"rules": []}
    assert target.conntrack("a") == {"flows": []}
    assert target.flush("a") == 3
    assert target.set_mode("a", "monitor", "") == "monitor"


def test_a_controller_gets_many_vms_by_one_request(
    paths: Paths, serve: Callable[[dict[str, Any]], None]
) -> None:
    many = {"vms": [{"vm": "a"}, {"vm": "b"}], "waiting": {}, "seconds": 0.1}
    serve({"ping": identity(), "attach": many})
    assert connect(paths, None).attach(AttachOrder(["a", "b"], SOURCES)) == many


def test_a_controller_that_knows_no_windows_gets_nothing_to_apply(
    paths: Paths, serve: Callable[[dict[str, Any]], None]
) -> None:
    serve({"ping": identity(), "apply": {"vms": [], "waiting": {}}})
    target = connect(paths, None)
    with pytest.raises(VgwError, match="restart it if vgw was upgraded"):
        target.apply(SOURCES, ApplyOptions(confirm_seconds=60.0))


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

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.asked: list[Any] = []

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def attached(self) -> list[str]:
        return []

    def attach(self, document: Any, vm: str, **options: Any) -> AttachResult:
        self.asked.append((vm, sorted(document.vms), options))
        if vm == "bad":
            raise ForeignProgramError("program 7 is there")
        return AttachResult(vm, ["tap0"], 1, changed=True, compiled=False, seconds=0.1)

    def attach_many(self, document: Any, vms: list[str], *, force: bool) -> ApplyResult:
        self.asked.append((list(vms), sorted(document.vms), force))
        return ApplyResult([], {"a": ["tap0"]}, 0.1)

    def set_mode(self, vm: str, mode: Mode, reason: str, by: str) -> None:  # noqa: ARG002
        self.asked.append((vm, mode, reason))


def local(host: FakeHost) -> LocalTarget:
    return LocalTarget(host, Look())  # type: ignore[arg-type]


def test_one_vm_is_attached_by_its_order(paths: Paths) -> None:
    host = FakeHost(paths)
    answer = local(host).attach(AttachOrder(["a"], SOURCES, ("tap0",), "xdp", force=True))
    assert [row["vm"] for row in answer["vms"]] == ["a"]
    options = {"interfaces": ("tap0",), "hook": Hook.XDP, "force": True}
    assert host.asked == [("a", ["a"], options)]


def test_many_vms_are_attached_side_by_side(paths: Paths) -> None:
    host = FakeHost(paths)
    answer = local(host).attach(AttachOrder(["a", "b"], SOURCES))
    assert (answer["vms"], answer["waiting"]) == ([], {"a": ["tap0"]})
    assert host.asked == [(["a", "b"], ["a"], False)]


def test_what_the_order_has_parsed_is_not_parsed_again(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FakeHost(paths)
    document = parse_sources(SOURCES)
    monkeypatch.setattr(inventory, "read_document", lambda *_: pytest.fail("it is parsed again"))
    local(host).attach(AttachOrder(["a", "b"], SOURCES, document=document))
    assert host.asked == [(["a", "b"], ["a"], False)]


def test_a_policy_with_a_mistake_reaches_no_vm(paths: Paths) -> None:
    host = FakeHost(paths)
    with pytest.raises(PolicyError):
        local(host).attach(AttachOrder(["a"], [("policy.yaml", "schema: vgw/v0\n")]))
    assert host.asked == []


def test_without_a_policy_a_vm_gets_the_defaults(paths: Paths) -> None:
    host = FakeHost(paths)
    local(host).attach(AttachOrder(["new"], None, ("tap7",)))
    assert host.asked[0][:2] == ("new", [])


def test_a_mode_is_given_by_its_name(paths: Paths) -> None:
    host = FakeHost(paths)
    local(host).set_mode("a", "quarantine", "spam")
    assert host.asked == [("a", Mode.QUARANTINE, "spam")]


def test_what_fails_for_one_vm_keeps_no_other_back(paths: Paths) -> None:
    host = FakeHost(paths)
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
