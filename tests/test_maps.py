# SPDX-License-Identifier: Apache-2.0
"""The maps of an endpoint as typed values, read from and written to a real kernel."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from vgw import abi, libbpf
from vgw.abi_maps import MAP_SIZES, size_mismatch
from vgw.errors import VgwError
from vgw.libbpf import MapFlag, MapType
from vgw.maps import Counter, EndpointMaps, policy_blocks, write_policy

KINDS: dict[str, tuple[MapType, int, int]] = {
    "active": (MapType.ARRAY, 1, 0),
    "configs": (MapType.ARRAY, abi.CONFIG_SLOTS, 0),
    "policies": (MapType.ARRAY_OF_MAPS, abi.CONFIG_SLOTS, 0),
    "rule_counters": (MapType.ARRAY_OF_MAPS, 1, 0),
    "conntrack": (MapType.HASH, 5000, MapFlag.NO_PREALLOC),
    "conntrack_meta": (MapType.ARRAY, 1, 0),
    "stats": (MapType.PERCPU_ARRAY, len(abi.Path) * len(abi.Verdict) * abi.REASON_SLOTS, 0),
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


@pytest.mark.parametrize(("over", "blocks"), [(-3, 1), (0, 1), (1, 2), (abi.IMAGE_BLOCK_WORDS, 2)])
def test_a_policy_takes_whole_blocks(over: int, blocks: int) -> None:
    assert policy_blocks(bytes(8 * (abi.IMAGE_BLOCK_WORDS + over))) == blocks
    assert policy_blocks(b"") == 0


@pytest.mark.bpf
def test_a_map_of_another_layout_is_refused(fds: dict[str, int]) -> None:
    with closing(libbpf.map_create(MapType.HASH, "conntrack", 40, 8, 10)) as wrong:
        with pytest.raises(VgwError, match=r"map conntrack .* values of 8 .*attach it again"):
            EndpointMaps({**fds, "conntrack": wrong})
        for fd in fds.values():
            os.close(fd)


@pytest.mark.bpf
def test_a_policy_is_written_whole() -> None:
    image = struct.pack("=1003Q", *range(1003))
    with closing(new_inner("policies", policy_blocks(image))) as fd:
        write_policy(fd, image)
        size = MAP_SIZES["policies_inner"][1]
        written = b"".join(value for _, value in libbpf.map_entries(fd, 4, size))
    assert written == image + bytes(len(written) - len(image))
    assert len(written) == policy_blocks(image) * size


@pytest.mark.bpf
def test_a_switch_changes_policy_and_configuration_at_once(
    maps: EndpointMaps, fds: dict[str, int]
) -> None:
    assert maps.active_slot() == 0
    for generation, expected in ((1, 1), (2, 0), (3, 1)):
        with closing(new_inner("policies", 4)) as policy:
            staged = maps.stage(abi.EndpointConfig(generation=generation), policy)
            policy_id = libbpf.map_info(policy).id
        assert staged == expected
        assert maps.config().generation == generation - 1
        maps.switch(staged)
        maps.release(1 - staged)
        assert maps.active_slot() == staged
        assert maps.config().generation == generation
        slots = [libbpf.map_lookup(fds["policies"], struct.pack("=I", slot), 4) for slot in (0, 1)]
        assert slots[staged] == struct.pack("=I", policy_id)
        assert slots[1 - staged] is None


@pytest.mark.bpf
def test_rule_counters_by_id(maps: EndpointMaps) -> None:
    before = open_fds()
    assert maps.rule_capacity() == 0
    assert maps.rule_counters([0, 1]) == {}
    with closing(new_inner("rule_counters", 2048)) as fd:
        maps.set_rule_counters(fd)
        value = abi.RuleCounter(packets=3, bytes=180, last_hit_ns=9)
        libbpf.map_update(fd, struct.pack("=I", 1500), bytes(value))
    assert maps.rule_capacity() == 2048
    counters = maps.rule_counters([1500, 7, 2048, abi.NO_RULE])
    assert sorted(counters) == [7, 1500]
    assert bytes(counters[1500]) == bytes(value)
    assert counters[7].packets == 0
    assert open_fds() == before


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
def test_memory_counts_inner_maps(maps: EndpointMaps) -> None:
    before = maps.memory()
    assert before > ctypes.sizeof(abi.EndpointConfig) * abi.CONFIG_SLOTS
    with closing(new_inner("policies", 10000)) as policy:
        maps.switch(maps.stage(abi.EndpointConfig(), policy))
    assert maps.memory() - before >= 10000 * MAP_SIZES["policies_inner"][1]


@pytest.mark.bpf
def test_closing_closes_everything_once() -> None:
    before = open_fds()
    maps = EndpointMaps({name: new_map(name) for name in KINDS})
    assert open_fds() == before + len(KINDS)
    maps.close()
    maps.close()
    assert open_fds() == before
