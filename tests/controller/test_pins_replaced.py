# SPDX-License-Identifier: Apache-2.0
"""Pins that are not what vgw made there: seen by type, size, version and owner, never believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, interface, to_vm
from vgw import libbpf, loader
from vgw.controller.endpoint import NEEDED_MAPS, TABLES
from vgw.controller.links import opened
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
HTTP = "[{name: http, action: accept, services: [tcp/80]}]"


def empty_like(host: Host, pin: Path) -> int:
    """Return an empty map of the same type and sizes as the one that is pinned."""
    with opened(pin) as fd:
        info = libbpf.map_info(fd)
    inner = None
    if info.map_type in libbpf.MAPS_OF_MAPS:
        inner = loader.new_inner(host.artefact(TABLES), pin.name, 1)
    try:
        sizes = info.key_size, info.value_size, info.max_entries
        return libbpf.map_create(info.map_type, info.name, *sizes, info.flags, inner)
    finally:
        if inner is not None:
            os.close(inner)


def put(pin: Path, fd: int) -> None:
    """Pin something in the place of what is pinned there."""
    pin.unlink(missing_ok=True)
    libbpf.pin(fd, pin)


def test_catalogue_M24_a_pinned_map_that_the_programs_do_not_use_is_noticed(
    host: Host, paths: Paths, tap: Tap
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    directory = paths.endpoint_dir("web01", "tap0")
    for name in NEEDED_MAPS:
        pin = directory / name
        own, other = libbpf.get_pinned(pin), empty_like(host, pin)
        put(pin, other)
        there = row(host)
        assert not there["attached"]
        assert f"its programs do not use the map pinned as {name}; attach" in there["reason"]
        pin.unlink()
        assert name in row(host)["reason"]
        put(pin, own)
        os.close(own)
        os.close(other)
        assert row(host)["attached"]  # negative control: it was the map


def test_catalogue_M24_attach_repairs_it_and_packets_meet_the_right_maps(
    host: Host, paths: Paths, tap: Tap
) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    pin = paths.endpoint_dir("web01", "tap0") / "stats"
    other = empty_like(host, pin)
    put(pin, other)
    os.close(other)
    before = program_ids_of(paths)

    result = host.attach(document(HTTP), "web01")

    assert result.changed
    assert set(program_ids(host)).isdisjoint(before)
    send_to_vm("tap0", to_vm(dport=81))
    assert not received(vm, to_vm(dport=81))
    assert row(host)["drops"] == 1
    host.detach("web01")
    assert traces(paths) == []


def program_ids_of(paths: Paths) -> set[int]:
    """Return the ids of the pinned programs of web01."""
    found = set()
    for path in ("from_vm", "to_vm"):
        with opened(paths.endpoint_dir("web01", "tap0") / f"prog_{path}") as fd:
            found.add(libbpf.prog_info(fd).id)
    return found


def test_catalogue_M24_a_lost_event_buffer_is_found_again(
    host: Host, paths: Paths, tap: Tap
) -> None:
    """Or the records of all running programs would go where nobody reads."""
    tap("tap0")
    tap("tap1")
    both = {"web01": "{interfaces: [{name: tap0}]}", "web02": "{interfaces: [{name: tap1}]}"}
    policy = document(HTTP, vms=both)
    host.attach(policy, "web01")
    with opened(paths.events) as fd:
        own = libbpf.map_info(fd).id
    for damage in ("removed", "replaced"):
        other = empty_like(host, paths.events)
        paths.events.unlink()
        if damage == "replaced":
            put(paths.events, other)
        os.close(other)
        host.attach(policy, "web02")
        with opened(paths.events) as fd:
            assert libbpf.map_info(fd).id == own, damage
        host.detach("web02")


# --- M25: what others left there --------------------------------------------------------------


def program_for_map(directory: Path) -> None:
    with opened(directory / "prog_to_vm") as fd:
        put(directory / "active", fd)


def map_for_program(directory: Path) -> None:
    with opened(directory / "active") as fd:
        put(directory / "prog_to_vm", fd)


def other_type(directory: Path) -> None:
    fd = libbpf.map_create(libbpf.MapType.HASH, "active", 4, 4, 1)
    put(directory / "active", fd)
    os.close(fd)


def other_size(directory: Path) -> None:
    fd = libbpf.map_create(libbpf.MapType.ARRAY, "configs", 4, 8, 2)
    put(directory / "configs", fd)
    os.close(fd)


def file_for_link(directory: Path) -> None:
    with opened(directory / "active") as fd:
        put(directory / "link_to_vm", fd)


@pytest.mark.parametrize(
    "damage", [program_for_map, map_for_program, other_type, other_size, file_for_link]
)
def test_catalogue_M25_a_stale_pin_of_another_kind_is_not_adopted(
    host: Host, paths: Paths, tap: Tap, damage: Callable[[Path], None]
) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    damage(paths.endpoint_dir("web01", "tap0"))
    assert damage is file_for_link or not row(host)["attached"]

    host.attach(document(HTTP), "web01")

    assert row(host)["attached"]
    send_to_vm("tap0", to_vm())
    assert received(vm, to_vm())
    host.detach("web01")
    assert traces(paths) == []


def test_catalogue_M25_pins_of_another_version_are_left_alone(
    host: Host, paths: Paths, tap: Tap
) -> None:
    """Nothing tells what its tables are like, so the VM goes on as it is; other VMs are free."""
    vm = tap("tap0")
    tap("tap1")
    both = {"web01": interface("tap0"), "web02": "{interfaces: [{name: tap1}]}"}
    policy = document(HTTP, vms=both)
    host.attach(policy, "web01")
    paths.pins.rename(paths.bpffs / "v1")
    before = [path for path in traces(paths) if "/v1" in path]
    assert host.attached() == []

    said = (
        r"tap0 goes on filtering with the tables of ABI 1, .*run `vgw detach --vm web01` of the "
        "version that attached it"
    )
    for refused in (lambda: host.attach(policy, "web01"), lambda: host.detach("web01")):
        with pytest.raises(VgwError, match=said):
            refused()
    assert host.attach(policy, "web02").changed
    host.detach("web02")

    assert [path for path in traces(paths) if "/v1" in path] == before
    for port, passes in ((80, True), (23, False)):
        send_to_vm("tap0", to_vm(dport=port))
        assert received(vm, to_vm(dport=port)) is passes
    (paths.bpffs / "v1").rename(paths.pins)
    host.detach("web01")  # which this version can, when they are its own
    assert traces(paths) == []


@pytest.mark.parametrize(
    ("owner", "above", "mode", "trusted"),
    [
        (4711, 0, 0o700, True),  # root has given it to the user of a service
        (4711, 4711, 0o1777, True),
        (4711, 0, 0o1777, False),
        (4711, 0, 0o770, False),
        (4711, 4712, 0o700, False),
    ],
)
def test_root_trusts_a_user_who_was_given_the_directory(  # noqa: PLR0917
    host: Host, paths: Paths, tap: Tap, owner: int, above: int, mode: int, *, trusted: bool
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    for directory in (paths.bpffs, paths.pins):
        os.chown(directory, owner, 0)
    os.chown(paths.bpffs.parent, above, 0)
    paths.bpffs.parent.chmod(mode)

    if trusted:
        host.attach(document(HTTP), "web01")
        os.chown(paths.pins, owner + 1, 0)  # a third user in the directory of the second
    with pytest.raises(VgwError, match="is open to other users"):
        host.detach_all()


@pytest.mark.parametrize("change", ["owner", "mode"])
@pytest.mark.parametrize("place", ["bpffs", "pins"])
def test_catalogue_M25_pins_that_another_user_may_change_are_rejected(
    host: Host, paths: Paths, tap: Tap, change: str, place: str
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    directory: Path = getattr(paths, place)
    if change == "owner":
        os.chown(directory, 4711, 0)
    else:
        directory.chmod(0o777)

    for refused in (lambda: host.attach(document(HTTP), "web01"), host.detach_all):
        with pytest.raises(VgwError, match=rf"{directory} .*other users.*`chown 0 {directory}`"):
            refused()
    os.chown(directory, 0, 0)
    directory.chmod(0o755)
    assert not host.attach(document(HTTP), "web01").changed  # negative control: it was that


def test_an_empty_place_is_nobodys(host: Host, paths: Paths, tap: Tap) -> None:
    """Negative control: directories that are not there yet are no reason to refuse."""
    tap("tap0")
    assert not paths.bpffs.exists()
    assert host.attach(document(HTTP), "web01").changed
