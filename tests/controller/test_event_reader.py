# SPDX-License-Identifier: Apache-2.0
"""Between perf buffer and log: what is lost is counted, and numbers get their names."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.observe import send_to_vm
from tests.controller.policies import document, from_vm, to_vm
from tests.patience import PATIENCE
from vgw import abi, libbpf
from vgw.abi import Action
from vgw.controller import event_reader
from vgw.controller.event_names import EventNames
from vgw.controller.event_reader import EventLosses, EventReader, Meter
from vgw.controller.events import LogWriter, RuleName, read_log
from vgw.controller.log_journal import JournalSink
from vgw.controller.manifest import EndpointEntry, Manifest, PolicyEntry, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore
from vgw.controller.readings import read_meters
from vgw.controller.reconcile import Host
from vgw.policy.model import Direction, EffectiveRule, Interface, Tier


def meter(endpoint: int, suppressed: int = 0, lost: int = 0) -> Meter:
    return Meter(f"vm{endpoint}", "tap0", endpoint, suppressed, lost)


def reported(losses: EventLosses) -> list[dict[str, Any]]:
    records = losses.records()
    for made in records:
        del made["ts"]
    return records


def counted(losses: EventLosses) -> dict[str, int]:
    return {cause: count for cause, count in losses.totals().items() if count}


def test_what_is_lost_before_the_first_report_is_reported_too(places: Paths) -> None:
    meters = [meter(1, suppressed=10)]
    losses = EventLosses(lambda: list(meters))
    log = LogWriter(places.state_dir / "events.jsonl")
    reader = EventReader(places.events, EventNames(places), log, losses)
    reader.start()
    meters[:] = [meter(1, suppressed=12)]
    reader.stop()
    log.close()
    (record,) = read_log(places.state_dir / "events.jsonl")
    assert (record["event"], record["vm"], record["count"]) == ("lost", "vm1", 2)


def test_losses_begin_with_what_the_maps_say_and_report_what_moves() -> None:
    meters = [meter(1, suppressed=10, lost=5)]
    losses = EventLosses(lambda: meters)
    assert counted(losses) == {"suppressed": 10, "buffer": 5}
    assert reported(losses) == []

    meters[:] = [meter(1, suppressed=12, lost=5), meter(2, lost=4)]
    assert losses.totals()["suppressed"] == 12
    meters[:] = [meter(1, suppressed=13, lost=5), meter(2, lost=4)]
    losses.add("reader", 8)

    assert reported(losses) == [
        {"event": "lost", "vm": "vm1", "interface": "tap0", "cause": "suppressed", "count": 3},
        {"event": "lost", "vm": "vm2", "interface": "tap0", "cause": "buffer", "count": 4},
        {"event": "lost", "cause": "reader", "count": 8},
    ]
    assert reported(losses) == []
    assert counted(losses) == {"suppressed": 13, "buffer": 9, "reader": 8}


def test_losses_never_go_backwards_when_an_endpoint_goes() -> None:
    meters = [meter(1, suppressed=10), meter(2, suppressed=1)]
    losses = EventLosses(lambda: meters)
    totals = []
    for there in ([*meters], [meter(2, suppressed=1)], [], [meter(3, suppressed=2)]):
        meters[:] = there
        totals.append(losses.totals()["suppressed"])

    assert totals == [11, 11, 11, 13]


def test_what_a_sink_loses_is_counted_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = EventLosses(list)
    log = LogWriter(tmp_path / "events.jsonl", JournalSink(str(tmp_path / "nobody")))
    names = EventNames(Paths.from_environment({}, state_dir=tmp_path))
    reader = EventReader(tmp_path / "events", names, log, losses)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vgw.controller.log_file.os.write", full)
    log.add({"n": 1})
    log.add({"n": 2})
    log.flush()
    reader._report()
    reader._report()
    monkeypatch.undo()
    log.close()
    reader._report()

    # The journal's were waiting for it until the end: these two, and that two were lost.
    assert counted(losses) == {"log_file": 2, "log_journal": 3}
    (lost,) = read_log(tmp_path / "events.jsonl")
    assert (lost["event"], lost["cause"], lost["count"]) == ("lost", "log_file", 2)


def drops(paths: Paths) -> list[dict[str, Any]]:
    return [found for found in read_log(paths.log_file) if found["event"] == "drop"]


@pytest.mark.bpf
def test_slots_that_another_reader_took_are_taken_back(
    paths: Paths, host: Host, tap: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_reader, "REPORT_SECONDS", 0.1)
    vm = tap("tap0")
    logging = "[{name: dns, action: drop, services: [udp/53], log: true}]"
    more = f"  - {{name: out, tier: vm, applies_to: {{all: true}}, egress: {logging}}}"
    host.attach(document(extra=more), "web01")
    log = LogWriter(paths.log_file)
    losses = EventLosses(lambda: read_meters(host))
    reader = EventReader(paths.events, EventNames(paths), log, losses)
    reader.start()
    reader.catch_up()
    fd = libbpf.get_pinned(paths.events)
    libbpf.PerfReader(fd, lambda *_: None, lambda *_: None).close()
    os.close(fd)

    deadline = time.monotonic() + PATIENCE
    while not drops(paths) and time.monotonic() < deadline:
        os.write(vm, from_vm(proto="udp", dport=53))
        time.sleep(0.02)
    reader.stop()
    log.close()

    assert drops(paths)
    assert losses.totals()["buffer"] > 0


@pytest.mark.bpf
def test_an_old_flow_that_a_rule_ends_is_logged_with_that_rule(
    paths: Paths, host: Host, tap: Callable[[str], int]
) -> None:
    """The VM opened the flow, so a packet to it is judged by a rule for what the VM sends."""
    vm = tap("tap0")
    rules = "  - {name: out, tier: vm, applies_to: {all: true}, egress: [%s]}"
    host.attach(document(extra=rules % "{name: dns, action: accept}"), "web01")
    log = LogWriter(paths.log_file)
    reader = EventReader(paths.events, EventNames(paths), log, EventLosses(lambda: ()))
    reader.start()
    reader.catch_up()
    os.write(vm, from_vm(proto="udp", sport=4000, dport=53))

    host.apply(document(extra=rules % "{name: shut, action: drop, services: [udp/53], log: true}"))
    send_to_vm("tap0", to_vm(proto="udp", sport=53, dport=4000))
    reader.stop()
    log.close()

    (found,) = [each for each in drops(paths) if each["reason"] == "RULE"]
    assert (found["direction"], found["generation"]) == ("ingress", 2)
    assert (found["policy"], found["tier"], found["rule"]) == ("out", "vm", "shut")


RULE = EffectiveRule(Direction.INGRESS, Tier.VM, "web-tier", "site", Action.ACCEPT)
Save = Callable[[Manifest], None]


def manifest(vm: str, endpoint: int, **policies: str) -> Manifest:
    """Return a manifest of a VM with one endpoint; `g1="x"`: generation 1 ran the image x."""
    return Manifest(
        vm,
        endpoints={"tap0": EndpointEntry(endpoint, Interface("tap0"))},
        policies={
            int(generation[1:]): PolicyEntry({abi.Path.TO_VM: digest}, {abi.Path.TO_VM: 1})
            for generation, digest in policies.items()
        },
    )


@pytest.fixture
def places(tmp_path: Path) -> Paths:
    return Paths.from_environment({}, state_dir=tmp_path)


@pytest.fixture
def store(places: Paths) -> PolicyStore:
    """What is kept of policies: each image has a rule of its own name."""
    kept = PolicyStore(places.policies)
    for name in ("site", "more"):
        kept.keep_names(name, [dataclasses.replace(RULE, name=name)])
    return kept


@pytest.fixture
def names(places: Paths, store: PolicyStore) -> tuple[EventNames, Save]:  # noqa: ARG001
    return EventNames(places), lambda made: save_manifest(places.manifest(made.vm), made)


def test_names_are_known_as_soon_as_they_are_written(names: tuple[EventNames, Save]) -> None:
    known, save = names
    to_vm = abi.Path.TO_VM
    assert known.endpoint(1) is None
    for number in range(1, 30):
        save(manifest(f"vm{number}", number, g1="site"))
        assert known.endpoint(number) == (f"vm{number}", "tap0")
        assert known.rule(number, 1, to_vm, 0) == RuleName("web-tier", "vm", "site")
        save(manifest(f"vm{number}", number, g1="site", g2="more"))
        assert known.rule(number, 2, to_vm, 0) == RuleName("web-tier", "vm", "more")
        assert known.rule(number, 1, to_vm, 0) == RuleName("web-tier", "vm", "site")


def test_a_change_that_failed_gives_no_names_to_the_next(names: tuple[EventNames, Save]) -> None:
    """The change that follows one that was undone has its generation again."""
    known, save = names
    save(manifest("web01", 1, g1="site"))
    assert known.rule(1, 1, abi.Path.TO_VM, 0) is not None
    save(manifest("web01", 1, g1="site", g2="lost"))
    assert known.endpoint(99) is None  # another VM's event makes it look while that is there
    save(manifest("web01", 1, g1="site"))
    save(manifest("web01", 1, g1="site", g2="more"))
    assert known.rule(1, 2, abi.Path.TO_VM, 0) == RuleName("web-tier", "vm", "more")


def test_numbers_that_nobody_knows_have_no_names(names: tuple[EventNames, Save]) -> None:
    known, save = names
    save(manifest("web01", 1, g1="site", g2="lost"))
    assert known.rule(1, 1, abi.Path.TO_VM, 0) is not None
    for generation, path, rule in (
        (1, abi.Path.TO_VM, 1),
        (1, abi.Path.FROM_VM, 0),
        (2, abi.Path.TO_VM, 0),
        (3, abi.Path.TO_VM, 0),
    ):
        assert known.rule(1, generation, path, rule) is None
    assert known.rule(99, 1, abi.Path.TO_VM, 0) is None


def test_names_outlive_their_file_until_something_new_is_asked(
    names: tuple[EventNames, Save], store: PolicyStore
) -> None:
    known, save = names
    save(manifest("web01", 1, g1="site"))
    assert known.rule(1, 1, abi.Path.TO_VM, 0) is not None
    store.remove("site")
    assert known.rule(1, 1, abi.Path.TO_VM, 0) is not None
    save(manifest("web01", 1, g2="more"))
    assert known.rule(1, 2, abi.Path.TO_VM, 0) is not None
    assert known.rule(1, 1, abi.Path.TO_VM, 0) is None


def test_names_of_a_vm_outlive_it_until_something_new_is_asked(
    names: tuple[EventNames, Save], tmp_path: Path
) -> None:
    known, save = names
    save(manifest("web01", 1, g1="site"))
    save(manifest("db01", 2))
    assert known.endpoint(1) == ("web01", "tap0")
    (tmp_path / "vms" / "web01.json").unlink()

    assert known.endpoint(1) == ("web01", "tap0")
    assert known.endpoint(3) is None
    assert known.endpoint(1) is None
    assert known.endpoint(2) == ("db01", "tap0")


def test_endpoint_that_is_made_anew_has_another_number(
    names: tuple[EventNames, Save],
) -> None:
    known, save = names
    save(manifest("web01", 1))
    assert known.endpoint(1) == ("web01", "tap0")
    save(manifest("web01", 2))

    assert known.endpoint(2) == ("web01", "tap0")
    assert known.endpoint(1) is None
