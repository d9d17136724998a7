# SPDX-License-Identifier: Apache-2.0
"""Maps that stay open between looks show what there is now, and hold nothing that is gone."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.policies import document, interface, to_vm
from tests.controller.process import eventually
from vgw import abi, libbpf
from vgw.abi import Mode, Reason, Verdict
from vgw.abi import Path as PacketPath
from vgw.abi import stats_labels as labels
from vgw.controller import kept_maps
from vgw.controller.endpoint import restage
from vgw.controller.images import Images
from vgw.controller.kept_maps import MAPS
from vgw.controller.links import link_pin
from vgw.controller.readings import read_endpoints, read_meters
from vgw.controller.reconcile import Host
from vgw.controller.rule_readings import RuleReadings

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
NAMES = ("web01", "db01")
VMS = {"web01": interface("tap-web01"), "db01": "{interfaces: [{name: tap-db01}]}"}


@pytest.fixture
def protected(host: Host, tap: Tap) -> Iterator[Host]:
    """Two VMs, on tap-web01 and tap-db01."""
    for name in NAMES:
        tap(f"tap-{name}")
    host.attach_many(document(vms=VMS))
    yield host
    host.kept.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def maps_open() -> int:
    """Return how many files of this process are maps."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found += str(entry.readlink()) == "anon_inode:bpf-map"
    return found


def test_maps_stay_open_and_show_what_is_counted_now(protected: Host) -> None:
    others = maps_open()
    assert [reading.vm for reading in read_endpoints(protected)] == sorted(NAMES)
    before = maps_open()
    (endpoint,) = protected.open_endpoints("web01")
    with endpoint:
        program = libbpf.get_pinned(endpoint.directory / "prog_to_vm")
        libbpf.prog_test_run(program, to_vm(dport=81))
        os.close(program)
    shown = {reading.vm: reading for reading in read_endpoints(protected)}
    dropped = PacketPath.TO_VM, Verdict.DROP, Reason.DEFAULT
    assert shown["web01"].stats[dropped].packets == 1
    # Neighbour discovery and group membership are the host's own.
    assert not [key for key in shown["db01"].stats if key[2] not in (Reason.ND, Reason.MEMBERSHIP)]
    assert all(reading.attached for reading in shown.values())
    assert maps_open() == before == others + len(NAMES) * len(MAPS)


def test_what_is_detached_is_closed_by_the_next_look(protected: Host) -> None:
    others = maps_open()
    read_endpoints(protected)
    protected.detach("web01")
    assert [meter.vm for meter in read_meters(protected)] == ["db01"]
    assert maps_open() == others + len(MAPS)


def test_an_endpoint_made_anew_is_another_one(protected: Host) -> None:
    (before,) = (meter for meter in read_meters(protected) if meter.vm == "web01")
    protected.detach("web01")
    protected.attach(document(vms=VMS), "web01")
    (after,) = (meter for meter in read_meters(protected) if meter.vm == "web01")
    assert after.made != before.made


def test_a_program_that_somebody_takes_off_is_not_attached(protected: Host) -> None:
    assert all(reading.attached for reading in read_endpoints(protected))
    pin = link_pin(protected.paths.endpoint_dir("web01", "tap-web01"), PacketPath.TO_VM)
    link = libbpf.get_pinned(pin)
    libbpf.link_detach(link)
    os.close(link)
    attached = {reading.vm: reading.attached for reading in read_endpoints(protected)}
    assert attached == {"web01": False, "db01": True}


def test_an_interface_that_is_renamed_is_not_attached_under_its_old_name(protected: Host) -> None:
    read_endpoints(protected)
    run("ip", "link", "set", "tap-web01", "down")
    run("ip", "link", "set", "tap-web01", "name", "other")
    attached = {reading.vm: reading.attached for reading in read_endpoints(protected)}
    assert attached == {"web01": False, "db01": True}


def test_without_room_endpoints_are_opened_for_each_look(
    protected: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * len(MAPS), 2 * len(MAPS)))
    before = open_files()
    for _ in range(2):
        assert [reading.vm for reading in read_endpoints(protected)] == sorted(NAMES)
        assert open_files() == before + len(MAPS) + 1, "those of one, and what tells of changes"


def test_directories_that_did_not_change_are_not_looked_at(
    protected: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's notes work in a bpffs too."""
    looked_at: list[object] = []
    real = os.stat

    def stat(place: Any, **options: Any) -> os.stat_result:
        looked_at.append(place)
        return real(place, **options)

    def looks() -> int:
        looked_at.clear()
        assert len(read_meters(protected)) == len(NAMES)
        pins = str(protected.paths.pins)
        return sum(str(place).startswith(f"{pins}/") for place in looked_at)

    monkeypatch.setattr(kept_maps, "SECOND_NS", 0)
    monkeypatch.setattr(os, "stat", stat)
    looks()
    eventually("what was just made has settled", lambda: looks() == 0)
    (protected.paths.endpoint_dir("web01", "tap-web01") / "more").mkdir()
    assert looks() == 1


def test_nothing_is_opened_again_for_the_counts_of_rules(
    protected: Host, parts_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = libbpf.get_pinned

    def get_pinned(pin: str | os.PathLike[str]) -> int:
        opened.append(pin)
        return real(pin)

    monkeypatch.setattr(libbpf, "get_pinned", get_pinned)
    rules = RuleReadings(protected.paths)

    def counts(vm: str = "web01") -> list[int]:
        opened.clear()
        (found,) = (each for each in read_endpoints(protected, rules) if each.vm == vm)
        return [rule.packets for rule in found.rules]

    before = counts()
    assert opened
    assert counts() == before == counts()
    assert not opened
    rules_now = (
        "[{name: http, action: accept, services: [tcp/80]}, "
        "{name: late, action: accept, services: [tcp/81]}]"
    )
    protected.apply(document(rules_now, vms=VMS))
    assert parts_read
    assert len(counts()) == len(before) + 1
    assert opened, "the policy has counters of its own"
    assert counts()[-1] == 0
    denied(protected)
    assert sum(counts()) == sum(before) + 1
    assert not opened


WOULD_DROP = PacketPath.TO_VM, Verdict.WOULD_DROP, Reason.DEFAULT


def denied(host: Host) -> None:
    """Have web01's program judge a packet that policy denies."""
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        program = libbpf.get_pinned(endpoint.directory / "prog_to_vm")
        libbpf.prog_test_run(program, to_vm(dport=81))
        os.close(program)


def would_drop(host: Host) -> int:
    (web01,) = (reading for reading in read_endpoints(host) if reading.vm == "web01")
    counter = web01.stats.get(WOULD_DROP)
    return 0 if counter is None else counter.packets


@pytest.fixture
def parts_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first counter of each part that is read, as it is; what changed has settled at once."""
    found: list[int] = []
    real = libbpf.PartReads.read

    def read(reads: libbpf.PartReads, fd: int) -> Iterator[tuple[int, bytes]]:
        for first, data in real(reads, fd):
            found.append(first)
            yield first, data

    monkeypatch.setattr(libbpf.PartReads, "read", read)
    monkeypatch.setattr(kept_maps, "SECOND_NS", 0)
    return found


def test_counters_of_monitor_mode_are_read_while_they_may_change(
    protected: Host, parts_read: list[int]
) -> None:
    parts = {first: labels(first)[1] is Verdict.WOULD_DROP for first, _ in abi.stats_parts()}
    protected.detach("db01")

    def reads_them() -> bool:
        parts_read.clear()
        read_endpoints(protected)
        assert {each for each in parts_read if not parts[each]} == {
            each for each in parts if not parts[each]
        }, "all others are read each time"
        return any(parts[each] for each in parts_read)

    assert [reads_them() for _ in range(3)] == [True, False, False]
    protected.set_mode("web01", Mode.MONITOR)
    assert [reads_them() for _ in range(3)] == [True] * 3
    denied(protected)
    assert would_drop(protected) == 1
    protected.set_mode("web01", Mode.ENFORCE)
    assert [reads_them() for _ in range(3)] == [True, False, False]
    assert would_drop(protected) == 1, "it is shown as it was"


def test_what_a_change_lets_pass_is_shown_however_it_goes_on(
    protected: Host, parts_read: list[int]
) -> None:
    """It may take its time between steps, and be undone."""
    for _ in range(3):
        assert would_drop(protected) == 0
    assert parts_read
    (endpoint,) = protected.open_endpoints("web01")
    with endpoint:
        maps = endpoint.maps
        config, slot = maps.config(), maps.active_slot()
        config.mode = Mode.MONITOR
        images = Images(protected.paths.images)
        assert restage(endpoint, config, images.in_force(maps)) == 1 - slot
        assert would_drop(protected) == 0
        maps.switch(1 - slot)
        denied(protected)
        assert would_drop(protected) == 1
        denied(protected)
        maps.switch(slot)
        maps.release(1 - slot)
    assert would_drop(protected) == 2


def test_an_endpoint_that_is_not_whole_is_left_out(protected: Host) -> None:
    (protected.paths.endpoint_dir("web01", "tap-web01") / "stats").unlink()
    assert [reading.vm for reading in read_endpoints(protected)] == ["db01"]
