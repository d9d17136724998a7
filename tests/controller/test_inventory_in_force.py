# SPDX-License-Identifier: Apache-2.0
"""The inventory beside policies that are applied, held, rolled back to and gone back to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.observe import lets_in
from tests.controller.policies import interface
from tests.controller.test_last_good import Restarting
from tests.controller.test_operations import policy
from vgw.controller.actor import this_process
from vgw.controller.inventory import read_document
from vgw.controller.last_inventory import last_document
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.window import load_window, save_window
from vgw.errors import VgwError

WEB = policy("web01")
NONE = "schema: vgw/v1\n"
TAP = "tap0"


def inventory(*vms: str) -> str:
    """Return an inventory that names VMs without interfaces."""
    return NONE + "vms: {" + ", ".join(f"{vm}: {{}}" for vm in vms) + "}\n"


def spoil(how: str, file: Path) -> None:
    file.unlink()
    if how == "invalid":
        file.write_text("schema: vgw/v1\nvms: 1\n")
    elif how == "partial":
        file.write_text("schema: vg")
    elif how == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    elif how == "directory":
        file.mkdir()
    else:
        assert how == "fifo"
        os.mkfifo(file)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Restarting]:
    paths = Paths.from_environment(
        {},
        policy=tmp_path / "policy.yaml",
        inventory=tmp_path / "inventory.yaml",
        log_file=tmp_path / "events.jsonl",
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
    )
    paths.inventory.write_text(inventory("mine"))
    bench = Restarting(paths)
    yield bench
    bench.log.close()


@pytest.mark.parametrize("how", ["invalid", "partial", "binary", "directory", "fifo"])
def test_a_start_without_a_usable_inventory_goes_by_the_last_good_one(
    bench: Restarting, how: str
) -> None:
    bench.start(WEB)
    spoil(how, bench.paths.inventory)
    bench.restart(forget_vms=True)
    bench.host.policies.clear()

    bench.start()

    assert bench.host.policies == [["mine", "web01"]], "a VM that is not protected gets it"
    text = bench.standing()["policy_unreadable"]
    assert str(bench.paths.inventory) in text
    assert "what is in force stays in force" in text


def test_a_running_controller_goes_on_with_the_inventory_that_it_had(bench: Restarting) -> None:
    bench.start(WEB)
    spoil("fifo", bench.paths.inventory)
    bench.operations.reload()
    assert "it is no file" in bench.standing()["policy_unreadable"]
    assert bench.by() == ["mine", "web01"]

    bench.paths.inventory.unlink()
    bench.paths.inventory.write_text(inventory("other"))
    bench.operations.look_after_policy()

    assert bench.standing() == {}
    assert bench.by() == ["other", "web01"]


def test_a_reload_takes_over_an_inventory_that_changed_alone(bench: Restarting) -> None:
    bench.start(WEB)
    bench.paths.inventory.write_text(inventory("other"))
    bench.operations.reload()
    assert bench.host.policies[-1] == ["other", "web01"]
    bench.paths.inventory.unlink()
    bench.operations.reload()
    assert bench.host.policies[-1] == ["web01"], "a host needs no inventory"
    bench.restart(forget_vms=True)
    bench.paths.policy.unlink()
    bench.start()
    assert bench.host.policies[-1] == ["web01"], "none was in force, so none is the last"
    numbers = [entry.number for entry in bench.changes.keeper.history.entries()]
    assert numbers == [1], "the policy is the same"


def test_what_is_gone_back_to_is_judged_by_the_inventory_of_now(bench: Restarting) -> None:
    bench.start(WEB)
    bench.apply(policy("db01"))
    bench.paths.inventory.write_text(inventory("other"))
    bench.ask("rollback")
    assert bench.host.policies[-1] == ["other", "web01"]

    bench.paths.inventory.write_text(inventory("third"))
    bench.operations.reload()
    assert bench.host.policies[-1] == ["third", "web01"], "although the policy is held"


def test_a_policy_that_contradicts_the_inventory_is_not_gone_back_to(bench: Restarting) -> None:
    bench.start(WEB)
    bench.apply(policy("db01"))
    bench.paths.inventory.write_text(inventory("web01"))
    before = list(bench.host.policies)
    with pytest.raises(VgwError, match="defined twice"):
        bench.ask("rollback")
    assert bench.host.policies == before


def test_nobody_confirms_while_the_inventory_is_spoilt(
    bench: Restarting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgw.controller.policy_keeper.start_guardian", lambda *_: 0)
    bench.start(WEB)
    bench.apply(policy("db01"), confirm_seconds=3600)
    spoil("invalid", bench.paths.inventory)
    window = load_window(bench.paths)
    assert window is not None
    save_window(bench.paths, dataclasses.replace(window, deadline_ns=1))

    assert bench.changes.keeper.settle_overdue(this_process("guardian"))

    assert bench.host.policies[-1] == ["mine", "web01"]


def test_the_kept_inventory_is_the_one_that_was_in_force(bench: Restarting) -> None:
    bench.start(WEB)
    bench.paths.inventory.write_text(inventory("newer"))
    assert "newer" in last_document(bench.paths, [("p", WEB)]).vms, "what is usable is used"
    spoil("invalid", bench.paths.inventory)
    assert list(last_document(bench.paths, [("p", WEB)]).vms) == ["web01", "mine"]
    with pytest.raises(VgwError):
        read_document(bench.paths, [("p", WEB)])


# --- on real endpoints ----------------------------------------------------------------------------


RULE = """
policies:
  - name: base
    tier: vm
    applies_to: {all: true}
    ingress: [{name: in, action: accept, services: [tcp/%d]}]
"""


@pytest.mark.bpf
def test_a_vm_of_the_inventory_keeps_its_policy_when_that_loses_it(
    paths: Paths, tap: Callable[[str], int]
) -> None:
    host, vm = Host(paths), tap(TAP)
    paths.inventory.write_text(f"{NONE}vms:\n  web01: {interface(TAP)}\n")
    named = read_document(paths, [("p", NONE + RULE % 80)])
    assert host.attach(named, "web01").named
    paths.inventory.write_text(NONE)
    (kept,) = host.apply(read_document(paths, [("p", NONE + RULE % 443)])).vms
    assert kept.kept
    assert lets_in(vm, 80, TAP)
    assert not lets_in(vm, 443, TAP)

    moved = f"{NONE}vms:\n  web01: {interface(TAP)}\n{RULE % 443}"
    (result,) = host.apply(read_document(paths, [("p", moved)])).vms
    assert (result.kept, result.named) == (False, True)
    assert lets_in(vm, 443, TAP)
