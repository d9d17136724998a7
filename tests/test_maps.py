# SPDX-License-Identifier: Apache-2.0
"""The maps of an endpoint as typed values, read from and written to a real kernel."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from vgw import abi, libbpf
from vgw.abi_maps import MAP_SIZES, size_mismatch
from vgw.errors import KernelError, VgwError
from vgw.libbpf import MapFlag, MapType
from vgw.maps import (
    Counter,
    EndpointMaps,
    RuleCount,
    counted,
    place_counters,
)
from vgw.maps_counters import HeldCounters, PinnedCounters
from vgw.maps_images import IMAGE_MAPS, ImagePlace, image_chunks, read_chunks

KINDS: dict[str, tuple[MapType, int, int]] = {
    "active": (MapType.ARRAY, 1, 0),
    "configs": (MapType.ARRAY, abi.CONFIG_SLOTS, 0),
    "policies": (
        MapType.ARRAY_OF_MAPS,
        abi.CONFIG_SLOTS * len(abi.Path),
        0,
    ),
    "policies_medium": (MapType.ARRAY_OF_MAPS, abi.CONFIG_SLOTS * len(abi.Path), 0),
    "policy_parts": (
        MapType.ARRAY_OF_MAPS,
        abi.CONFIG_SLOTS * len(abi.Path) * abi.IMAGE_PARTS,
        0,
    ),
    "rule_counters": (MapType.ARRAY_OF_MAPS, abi.CONFIG_SLOTS, 0),
    "conntrack": (MapType.HASH, 5000, MapFlag.NO_PREALLOC),
    "conntrack_meta": (MapType.ARRAY, 1, 0),
    "stats": (MapType.PERCPU_ARRAY, abi.FIRST_FLOOD_DROP + len(abi.FloodDrop), 0),
    "event_meter": (MapType.ARRAY, 1, 0),
}


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def new_inner(name: str, entries: int) -> int:
    key_size, value_size = MAP_SIZES[f"{name}_inner"]
    return libbpf.map_create(
        MapType.ARRAY, f"{name}_inner", key_size, value_size, entries, MapFlag.INNER_MAP
    )


def new_map(name: str) -> int:
    kind, entries, flags = KINDS[name]
    with ExitStack() as stack:
        inner = None
        if kind == MapType.ARRAY_OF_MAPS:
            inner = new_inner(name, 1)
            stack.callback(os.close, inner)
        return libbpf.map_create(kind, name, *MAP_SIZES[name], entries, flags, inner)


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def fds() -> dict[str, int]:
    """Maps of an endpoint; EndpointMaps closes them."""
    return {name: new_map(name) for name in KINDS}


@pytest.fixture
def maps(fds: dict[str, int]) -> Iterator[EndpointMaps]:
    with EndpointMaps(fds) as opened:
        yield opened


def test_every_structure_of_a_map_has_the_abis_size() -> None:
    assert size_mismatch("conntrack", *MAP_SIZES["conntrack"]) is None
    assert size_mismatch("scratch", 4, 12345) is None
    text = size_mismatch("conntrack", MAP_SIZES["conntrack"][0], 8)
    assert text is not None
    assert "values of 8 bytes" in text


CHUNK = ctypes.sizeof(abi.ImageChunk)
MEDIUM = ctypes.sizeof(abi.ImageMedium)
PART = ctypes.sizeof(abi.ImagePart)


@pytest.mark.parametrize("size", [0, 64, CHUNK])
def test_a_small_image_takes_one_chunk(size: int) -> None:
    chunks = list(image_chunks(b"x" * size))
    assert chunks == ([("policies", (b"x" * size).ljust(CHUNK, b"\0"))] if size else [])


@pytest.mark.parametrize("size", [CHUNK + 64, MEDIUM])
def test_a_medium_image_takes_one_map_behind_a_copy_of_its_beginning(size: int) -> None:
    data = bytes(range(64)) * (size // 64)
    assert list(image_chunks(data)) == [
        ("policies", data[:CHUNK]),
        ("policies_medium", data.ljust(MEDIUM, b"\0")),
    ]


@pytest.mark.parametrize(
    ("size", "count"), [(MEDIUM + 64, 1), (PART, 1), (PART + 64, 2), (5 * PART, 5)]
)
def test_a_large_image_takes_whole_parts_behind_a_copy_of_its_beginning(
    size: int, count: int
) -> None:
    data = bytes(range(64)) * (size // 64)
    beginning, *parts = image_chunks(data)
    assert beginning == ("policies", data[:CHUNK])
    assert [(part.outer, len(part.data)) for part in parts] == [("policy_parts", PART)] * count
    assert b"".join(part.data for part in parts) == data.ljust(count * PART, b"\0")


def test_the_policies_of_all_slots_and_paths_have_places_of_their_own() -> None:
    places = [abi.policy_place(slot, path) for slot in range(abi.CONFIG_SLOTS) for path in abi.Path]
    assert places == [0, 1, 2, 3]
    assert [abi.first_part(place) for place in places] == [n * abi.IMAGE_PARTS for n in range(4)]


@pytest.mark.parametrize(
    ("to_vm", "from_vm", "entries"), [(0, 0, 1), (3, 0, 3), (0, 2, 2), (3, 2, 5)]
)
def test_counters_of_both_paths_lie_behind_each_other(
    to_vm: int, from_vm: int, entries: int
) -> None:
    config = abi.EndpointConfig()
    rules = {abi.Path.TO_VM: to_vm, abi.Path.FROM_VM: from_vm}
    assert place_counters(config, rules) == entries
    assert list(config.first_counter) == [0, to_vm]


def test_counters_that_counted_are_found() -> None:
    counters = (abi.RuleCounter * 4)()
    counters[1] = abi.RuleCounter(packets=2, bytes=120, last_hit_ns=7)
    counters[3] = abi.RuleCounter(packets=1, bytes=60, last_hit_ns=9)
    found = dict(counted(bytes(counters)))
    assert found == {1: RuleCount(2, 120, 7), 3: RuleCount(1, 60, 9)}
    assert list(counted(b"")) == []


@pytest.mark.bpf
def test_a_map_of_another_layout_is_refused(fds: dict[str, int]) -> None:
    with closing(libbpf.map_create(MapType.HASH, "conntrack", 40, 8, 10)) as wrong:
        with pytest.raises(VgwError, match=r"map conntrack .* values of 8 .*attach it again"):
            EndpointMaps({**fds, "conntrack": wrong})
        for fd in fds.values():
            os.close(fd)


@dataclass
class HeldImage:
    """An image whose maps are open; `fds` are those of its maps."""

    fds: list[int]

    def put(self, place: ImagePlace) -> None:
        place.put(self.fds)

    @property
    def ids(self) -> list[int]:
        return [libbpf.map_info(fd).id for fd in self.fds]


Images = Mapping[abi.Path, HeldImage]


def ids_of(images: Images) -> dict[abi.Path, list[int]]:
    return {path: image.ids for path, image in images.items()}


@contextmanager
def a_policy(
    rules: int = 1, outer: Sequence[str] = ("policies", "policies_medium")
) -> Iterator[tuple[Images, int]]:
    """Yield images of both paths in maps for `outer`, and an fd of counters for so many rules."""
    with ExitStack() as stack:
        images = {
            path: HeldImage([stack.enter_context(closing(new_inner(name, 1))) for name in outer])
            for path in abi.Path
        }
        yield images, stack.enter_context(closing(new_inner("rule_counters", rules)))


@pytest.mark.bpf
@pytest.mark.parametrize(
    "outer", [["policies_medium"], ["policy_parts"], ["policy_parts"] * abi.IMAGE_PARTS]
)
def test_a_longer_policy_is_staged_and_released_whole(
    maps: EndpointMaps, fds: dict[str, int], outer: list[str]
) -> None:
    with a_policy(outer=["policies", *outer]) as (images, counters):
        slot = maps.stage(abi.EndpointConfig(generation=1), images, counters)
        first = ids_of(images)
        assert maps.policies(slot) == first
        maps.switch(slot)
    with a_policy(outer=["policies"]) as (fewer, counters):
        second = maps.stage(abi.EndpointConfig(generation=2), fewer, counters)
        kept = ids_of(fewer)
        assert (maps.policies(second), maps.policies(slot)) == (kept, first)
        maps.switch(second)
    maps.release(slot)
    assert maps.policies(slot) == {path: [] for path in abi.Path}
    left = [number for name in IMAGE_MAPS for number in read_chunks(fds[name]).values()]
    assert sorted(left) == sorted(chunk for ids in kept.values() for chunk in ids)


@pytest.mark.bpf
def test_maps_that_are_taken_stay_open_by_themselves(fds: dict[str, int]) -> None:
    names = ["conntrack_meta", "active"]
    with EndpointMaps(fds) as maps, maps.taken(names, HeldCounters()) as part:
        maps.close()
        assert (part.meta().entries, part.active_slot()) == (0, 0)
        with pytest.raises(KeyError):
            part.config()
        for name, fd in fds.items():
            if name not in names:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)


@pytest.mark.bpf
def test_a_switch_changes_policies_counters_and_configuration_at_once(maps: EndpointMaps) -> None:
    assert maps.active_slot() == 0
    for generation, expected in ((1, 1), (2, 0), (3, 1)):
        with a_policy() as (images, counters):
            staged = maps.stage(abi.EndpointConfig(generation=generation), images, counters)
            ids = {path: image.ids[0] for path, image in images.items()}
            counters_id = libbpf.map_info(counters).id
        assert staged == expected
        assert maps.config().generation == generation - 1
        assert maps.config(staged).generation == generation
        assert maps.spare_is_used()
        maps.switch(staged)
        maps.release(1 - staged)
        assert maps.active_slot() == staged
        assert maps.config().generation == generation
        assert not maps.spare_is_used()
        assert (maps.policy_ids(staged), maps.counters_id(staged)) == (ids, counters_id)
        assert maps.policy_ids(1 - staged) == dict.fromkeys(abi.Path)
        assert maps.counters_id(1 - staged) is None


@pytest.mark.bpf
@pytest.mark.parametrize("missing", ["policy", "counters"])
def test_a_spare_slot_is_used_while_anything_is_in_it(
    maps: EndpointMaps, fds: dict[str, int], missing: str
) -> None:
    with a_policy() as (images, counters):
        slot = maps.stage(abi.EndpointConfig(), images, counters)
    if missing == "policy":
        for path in abi.Path:
            libbpf.map_delete(fds["policies"], struct.pack("=I", abi.policy_place(slot, path)))
    else:
        libbpf.map_delete(fds["rule_counters"], struct.pack("=I", slot))
    assert maps.spare_is_used()


@pytest.mark.bpf
def test_what_is_in_force_can_be_staged_again(maps: EndpointMaps) -> None:
    before = open_fds()
    with pytest.raises(VgwError, match="no policy is in force"), maps.counters_in_force():
        pass
    with a_policy() as (images, counters):
        maps.switch(maps.stage(abi.EndpointConfig(generation=1), images, counters))
        first = maps.active_slot()
        with maps.counters_in_force() as counters_fd:
            second = maps.stage(abi.EndpointConfig(generation=2), images, counters_fd)
    assert maps.policy_ids(first) == maps.policy_ids(second)
    assert maps.counters_id(first) == maps.counters_id(second)
    maps.switch(second)
    maps.release(first)
    with maps.counters_in_force() as counters_fd:
        assert libbpf.map_info(counters_fd).id == maps.counters_id(second)
    assert open_fds() == before + 1  # that of the counters in force


@pytest.mark.bpf
def test_counters_are_found_by_their_pins_alone(fds: dict[str, int], bpffs: Path) -> None:
    with EndpointMaps(fds, PinnedCounters(bpffs)) as maps:
        assert not maps.has_lost_counters()
        for generation in (1, 2):
            with a_policy(rules=generation) as (images, counters):
                slot = maps.stage(abi.EndpointConfig(generation=generation), images, counters)
            maps.switch(slot)
            maps.release(1 - slot)
            assert len(maps.rule_counters()) == generation * ctypes.sizeof(abi.RuleCounter)
            assert maps.rule_counters(1 - slot) == b""
            assert [pin.name for pin in bpffs.glob("counters_*")] == [f"counters_{slot}"]
        for damage in (put_another, Path.unlink):
            assert not maps.has_lost_counters()
            with pinned_aside(bpffs / f"counters_{slot}", damage):
                assert maps.has_lost_counters()
                assert maps.rule_counters() == b""
                with pytest.raises(VgwError, match="no policy is in force"):
                    maps.counters_in_force().__enter__()


def put_another(pin: Path) -> None:
    pin.unlink()
    with closing(new_inner("rule_counters", 1)) as other:
        libbpf.pin(other, pin)


@contextmanager
def pinned_aside(pin: Path, damage: Callable[[Path], None]) -> Iterator[None]:
    """Damage a pin for the time of a block."""
    with closing(libbpf.get_pinned(pin)) as fd:
        damage(pin)
        yield
        pin.unlink(missing_ok=True)
        libbpf.pin(fd, pin)


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.bpf
def test_rule_counts_by_path_and_number(maps: EndpointMaps) -> None:
    assert maps.rule_counters() == b""
    config = abi.EndpointConfig()
    entries = place_counters(config, {abi.Path.TO_VM: 3, abi.Path.FROM_VM: 5000})
    with a_policy(entries) as (images, counters):
        for index in (0, 2, 3, entries - 1):
            value = abi.RuleCounter(packets=index + 1, bytes=60, last_hit_ns=9)
            libbpf.map_update(counters, struct.pack("=I", index), bytes(value))
        maps.switch(maps.stage(config, images, counters))
    assert len(maps.rule_counters()) == 5003 * ctypes.sizeof(abi.RuleCounter)
    assert list(maps.rule_counts()) == [
        (abi.Path.TO_VM, 0, RuleCount(1, 60, 9)),
        (abi.Path.TO_VM, 2, RuleCount(3, 60, 9)),
        (abi.Path.FROM_VM, 0, RuleCount(4, 60, 9)),
        (abi.Path.FROM_VM, 4999, RuleCount(5003, 60, 9)),
    ]
    assert list(maps.rule_counts(1 - maps.active_slot())) == []


@pytest.mark.bpf
def test_stats_are_summed_over_cpus_and_only_what_counted(
    maps: EndpointMaps, fds: dict[str, int]
) -> None:
    assert maps.stats() == {}
    cpus = libbpf.possible_cpus()
    index = abi.stats_index(abi.Path.FROM_VM, abi.Verdict.WOULD_DROP, abi.Reason.CT_FULL)
    numbers = [number for cpu in range(cpus) for number in (cpu + 1, 100)]
    libbpf.map_update(
        fds["stats"], struct.pack("=I", index), struct.pack(f"={2 * cpus}Q", *numbers)
    )
    labels = (abi.Path.FROM_VM, abi.Verdict.WOULD_DROP, abi.Reason.CT_FULL)
    assert maps.stats() == {labels: Counter(cpus * (cpus + 1) // 2, 100 * cpus)}


@pytest.mark.bpf
def test_meta_and_meter(maps: EndpointMaps, fds: dict[str, int]) -> None:
    libbpf.map_update(fds["conntrack_meta"], bytes(4), bytes(abi.ConntrackMeta(entries=5)))
    libbpf.map_update(fds["event_meter"], bytes(4), bytes(abi.EventMeter(lost=6)))
    assert maps.meta().entries == 5
    assert maps.event_meter().lost == 6


@pytest.mark.bpf
def test_all_flows_are_walked(maps: EndpointMaps, fds: dict[str, int]) -> None:
    for number in range(4500):
        key = abi.FlowKey(local_port=number, protocol=6)
        flow = abi.Flow(created_ns=number, state=abi.FlowState.TCP_SYN)
        libbpf.map_update(fds["conntrack"], bytes(key), bytes(flow))
    found = {key.local_port: flow.created_ns for key, flow in maps.flows()}
    assert found == {number: number for number in range(4500)}
    assert maps.conntrack_max() == KINDS["conntrack"][1]


@pytest.mark.bpf
def test_memory_is_the_endpoints_own(maps: EndpointMaps) -> None:
    before = maps.memory()
    assert before > ctypes.sizeof(abi.EndpointConfig) * abi.CONFIG_SLOTS
    with a_policy(1000, outer=["policies"]) as (images, counters):
        maps.switch(maps.stage(abi.EndpointConfig(), images, counters))
        maps.switch(maps.stage(abi.EndpointConfig(), images, counters))
        counters_memory = libbpf.map_memory(counters)
    assert maps.memory() == before + counters_memory


@pytest.mark.bpf
def test_closing_closes_everything_once() -> None:
    before = open_fds()
    maps = EndpointMaps({name: new_map(name) for name in KINDS})
    assert open_fds() == before + len(KINDS)
    maps.close()
    maps.close()
    assert open_fds() == before


@pytest.mark.bpf
def test_a_map_that_is_gone_puts_nothing_in_force(maps: EndpointMaps) -> None:
    with a_policy(outer=["policies", *["policy_parts"] * 2]) as (images, counters):
        broken = {**images, abi.Path.TO_VM: HeldImage([*images[abi.Path.TO_VM].fds, 0x7FFFFFFF])}
        with pytest.raises(KernelError):
            maps.stage(abi.EndpointConfig(), broken, counters)
        assert maps.active_slot() == 0


@pytest.mark.bpf
@pytest.mark.parametrize("deletions", range(5))
def test_a_release_that_was_killed_is_noticed(
    maps: EndpointMaps, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    """Whatever is left of the policies, the next change has to find it."""
    with a_policy(outer=["policies", "policy_parts"]) as (images, counters):
        slot = maps.stage(abi.EndpointConfig(), images, counters)
    real, made = libbpf.maps.map_delete, 0

    def dying(fd: int, key: bytes) -> bool:
        nonlocal made
        made += 1
        if made > deletions:
            raise KernelError("killed", 0)
        return real(fd, key)

    with monkeypatch.context() as patched:
        # One after the other, with the counters first, is one of the orders that threads may take.
        patched.setattr(libbpf, "map_delete", dying)
        patched.setattr(libbpf.maps, "map_delete", dying)
        one_by_one = lambda *calls: [call() for call in calls]  # noqa: E731
        patched.setattr(libbpf, "side_by_side", one_by_one)
        patched.setattr(libbpf.maps, "side_by_side", one_by_one)
        with pytest.raises(KernelError):
            maps.release(slot)

    assert any(maps.policies(slot).values())
    assert maps.spare_is_used()
