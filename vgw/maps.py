# SPDX-License-Identifier: Apache-2.0
"""The maps of one endpoint as typed values: the structures of vgw/abi.py in, and out.

What changes how packets are judged goes through stage() and switch(): the spare slot of policies,
configurations and rule counters is written while packets are judged by the active one, and one
store makes it active.

Maps inside maps of maps are reached by their pins: opening them by id would take CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple, TypeVar

from vgw import abi, libbpf
from vgw.abi_maps import number, packed, size_mismatch
from vgw.errors import VgwError
from vgw.maps_counters import CounterMaps, HeldCounters
from vgw.maps_images import IMAGE_MAPS, ChunkIds, Image, ImagePlace, image_places, read_chunks
from vgw.maps_stats import Counter, Stats, StatsReads, flood_drops

__all__ = [
    "Counter",
    "EndpointMaps",
    "RuleCount",
    "counted",
    "meta_of_emptied",
    "place_counters",
]

_COUNTER_BYTES: Final = ctypes.sizeof(abi.RuleCounter)
_FIRST: Final = bytes(4)
_ID_BYTES: Final = 4
_Structure = TypeVar("_Structure", bound=ctypes.Structure)


class RuleCount(NamedTuple):
    """What a rule counter holds: packets, wire bytes, and the time of the last of them."""

    packets: int
    bytes: int
    last_hit_ns: int


def place_counters(config: abi.EndpointConfig, rules: Mapping[abi.Path, int]) -> int:
    """Say in a configuration where the counters of each path's rules begin.

    `rules` is how many rules the policy of a path has. Return how many entries the counter map
    needs, which is one at least.
    """
    total = 0
    for path in abi.Path:
        config.first_counter[path] = total
        total += rules[path]
    return max(total, 1)


def meta_of_emptied(before: abi.ConntrackMeta) -> abi.ConntrackMeta:
    """Return what goes with a table of flows that was emptied, by what went with it before.

    The number of flows that were ever made does not go back: denials of programs hold as long as
    it stays the same.
    """
    return abi.ConntrackMeta(imported=sum(before.created) + before.imported + 1)


def counted(counters: bytes) -> Iterator[tuple[int, RuleCount]]:
    """Yield index and counts of the counters that have counted.

    `counters` is an array of abi.RuleCounter.
    """
    words = memoryview(counters).cast("Q")
    step = _COUNTER_BYTES // words.itemsize
    for index, packets in enumerate(words[::step].tolist()):
        if packets:
            yield index, RuleCount(*words[index * step : (index + 1) * step].tolist())


class EndpointMaps:
    """The maps of an endpoint; takes over the fds it is given and closes them.

    Methods raise KernelError when the kernel refuses. Writers must not overlap; the caller holds
    the host's lock.
    """

    def __init__(
        self,
        fds: Mapping[str, int],
        counters: CounterMaps | None = None,
        known: Mapping[str, libbpf.MapInfo] | None = None,
    ) -> None:
        """Take fds by map name, and where the maps are found that rules count in.

        Without `counters` only those are found that were staged here. `known` is what the kernel
        was asked about these maps already. Raises VgwError, leaving the fds to the caller, when a
        map has not the ABI's sizes.
        """
        self._fds = dict(fds)
        self._counters: CounterMaps = HeldCounters() if counters is None else counters
        known = known or {}
        self._infos = {name: known.get(name) or libbpf.map_info(fd) for name, fd in fds.items()}
        for name, info in self._infos.items():
            mismatch = size_mismatch(name, info.key_size, info.value_size)
            if mismatch is not None:
                raise VgwError(f"{mismatch}: detach the VM and attach it again")

    def __enter__(self) -> EndpointMaps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the fds; pinned or attached maps live on."""
        self._counters.close()
        while self._fds:
            os.close(self._fds.popitem()[1])

    def taken(self, names: Iterable[str], counters: CounterMaps) -> EndpointMaps:
        """Return some of the maps by themselves; they stay open when this is closed."""
        fds = {name: self._fds.pop(name) for name in names}
        return EndpointMaps(fds, counters, known=self._infos)

    def fd(self, name: str) -> int:
        """Return the fd of a map, which stays open as long as this does."""
        return self._fds[name]

    def active_slot(self) -> int:
        """Return the slot of configs and policies that packets are judged by."""
        return self._read("active", 0, abi.ActiveSlot).slot  # type: ignore[no-any-return]

    def config(self, slot: int | None = None) -> abi.EndpointConfig:
        """Return the configuration of a slot, by default the one in force."""
        return self._read("configs", self._slot(slot), abi.EndpointConfig)

    def latest_generation(self) -> int:
        """Return the greatest generation that either slot has or had."""
        latest: int = max(self.config(slot).generation for slot in range(abi.CONFIG_SLOTS))
        return latest

    def stage(
        self,
        config: abi.EndpointConfig,
        policies: Mapping[abi.Path, Image],
        counters_fd: int,
    ) -> int:
        """Write the spare slot and return its number for switch(); no packet sees it yet.

        Takes an RCU grace period, more for large policies. The kernel keeps the maps; the fd may
        be closed.
        """
        slot = 1 - self.active_slot()
        libbpf.side_by_side(
            *(partial(policies[path].put, self._image_place(slot, path)) for path in abi.Path),
            lambda: self._put_counters(slot, counters_fd),
        )
        libbpf.map_update(self._fds["configs"], packed(slot), bytes(config))
        return slot

    def _image_place(self, slot: int, path: abi.Path) -> ImagePlace:
        place = abi.policy_place(slot, path)
        return ImagePlace(self._fds, place)

    def _put_counters(self, slot: int, fd: int) -> None:
        """Let rules count in a map that is found again before any process can miss it."""
        self._counters.keep(slot, fd)
        libbpf.map_update(self._fds["rule_counters"], packed(slot), packed(fd))

    def switch(self, slot: int) -> None:
        """Make `slot` the one that packets are judged by, from the next packet on.

        Packets being judged finish with the other slot: see libbpf.wait_for_programs().
        """
        libbpf.map_update(self._fds["active"], _FIRST, bytes(abi.ActiveSlot(slot=slot)))

    def release(self, slot: int) -> None:
        """Free the policies and counters of a slot that no packet is judged by any more.

        Takes an RCU grace period, more for large policies.
        """
        libbpf.side_by_side(
            lambda: self._remove_counters(slot),
            lambda: self._remove_policies(slot),
        )

    def _remove_counters(self, slot: int) -> None:
        libbpf.map_delete(self._fds["rule_counters"], packed(slot))
        self._counters.drop(slot)

    def _remove_policies(self, slot: int) -> None:
        """Remove the maps of policies; the first ones last, for by them spare_is_used() goes."""
        first, beyond = (abi.policy_place(each, abi.Path(0)) for each in (slot, slot + 1))
        for name in reversed(IMAGE_MAPS):
            places = range(image_places(name, first).start, image_places(name, beyond).start)
            used = sorted(index for index in read_chunks(self._fds[name]) if index in places)
            libbpf.map_delete_many(self._fds[name], [packed(n) for n in used])

    def policies(self, slot: int) -> dict[abi.Path, ChunkIds]:
        """Return the maps that a slot's policies are in, none where there is no policy."""
        return {path: list(self._image(abi.policy_place(slot, path))) for path in abi.Path}

    def _image(self, place: int) -> Iterator[int]:
        """Yield the ids of the maps of a policy: the one in `policies`, and what else it is in."""
        for name in IMAGE_MAPS:
            for index in image_places(name, place):
                found = self._inner_id(name, index)
                if found is None:
                    break
                yield found

    def policy_ids(self, slot: int) -> dict[abi.Path, int | None]:
        """Return what tells a slot's policies from others: the id of the first map of each."""
        return {path: self._inner_id("policies", abi.policy_place(slot, path)) for path in abi.Path}

    def counters_id(self, slot: int) -> int | None:
        """Return the id of the map that a slot's rules count in, None when there is none."""
        return self._inner_id("rule_counters", slot)

    def spare_is_used(self) -> bool:
        """Tell whether the spare slot has policies or counters: a change is not finished.

        So it is too while only the map is kept that its rules have counted in, or were to.
        """
        spare = 1 - self.active_slot()
        ids = (*self.policy_ids(spare).values(), self.counters_id(spare))
        return any(map_id is not None for map_id in ids) or self._counters.keeps(spare)

    def rule_counters(self, slot: int | None = None) -> bytes:
        """Return the counters of a slot (default: the active one), an array of abi.RuleCounter.

        The configuration of the slot says where those of each path begin. Empty without counters.
        """
        with self._open_counters(self._slot(slot)) as fd:
            return b"" if fd is None else libbpf.array_values(fd, _COUNTER_BYTES)

    def rule_counts(self, slot: int | None = None) -> Iterator[tuple[abi.Path, int, RuleCount]]:
        """Yield path, number and counts of each rule of a slot that has counted."""
        slot = self._slot(slot)
        first = self.config(slot).first_counter
        for index, count in counted(self.rule_counters(slot)):
            path = abi.Path.FROM_VM if index >= first[abi.Path.FROM_VM] else abi.Path.TO_VM
            yield path, index - first[path], count

    @contextmanager
    def counters_in_force(self) -> Iterator[int]:
        """Give the map that the rules in force count in, as stage() takes it, for a `with` block.

        Raises VgwError when there is none.
        """
        with self._open_counters(self.active_slot()) as fd:
            if fd is None:
                raise VgwError("no policy is in force: apply the policy of the VM")
            yield fd

    def has_lost_counters(self) -> bool:
        """Tell whether the map that the rules in force count in is not found any more."""
        while True:
            slot = self.active_slot()
            with self._open_counters(slot) as fd:
                if fd is not None:
                    return False
            map_id = self.counters_id(slot)
            # A change that switched and released meanwhile is no loss.
            if slot == self.active_slot() and map_id == self.counters_id(slot):
                return map_id is not None

    def stats(self) -> Stats:
        """Return the packet counters that are not zero, summed over the CPUs."""
        return StatsReads().all(self._fds["stats"])

    def flood_drops(self) -> dict[abi.FloodDrop, Counter]:
        """Return what was dropped of floods, summed over the CPUs."""
        return flood_drops(self._fds["stats"])

    def meta(self) -> abi.ConntrackMeta:
        """Return the counters of the conntrack table."""
        return self._read("conntrack_meta", 0, abi.ConntrackMeta)

    def event_meter(self) -> abi.EventMeter:
        """Return how many events the endpoint sent and lost."""
        return self._read("event_meter", 0, abi.EventMeter)

    def reject_meter(self) -> abi.RejectMeter:
        """Return how many answers to rejected packets the endpoint sent and did not send."""
        return self._read("reject_meter", 0, abi.RejectMeter)

    def flows(self) -> Iterator[tuple[abi.FlowKey, abi.Flow]]:
        """Walk the conntrack table, dead flows included."""
        for key, value in self.raw_flows():
            yield abi.FlowKey.from_buffer_copy(key), abi.Flow.from_buffer_copy(value)

    def raw_flows(self) -> Iterator[tuple[bytes, bytes]]:
        """Walk the same as the bytes of FlowKey and Flow, which is quicker."""
        sizes = ctypes.sizeof(abi.FlowKey), ctypes.sizeof(abi.Flow)
        return libbpf.map_entries(self._fds["conntrack"], *sizes)

    def conntrack_max(self) -> int:
        """Return how many flows fit."""
        return self._infos["conntrack"].max_entries

    def memory(self) -> int:
        """Return the bytes of kernel memory that the maps take, rule counters included.

        The host-wide `events` is not counted, nor are policies, which endpoints share.
        """
        total = sum(libbpf.map_memory(fd) for name, fd in self._fds.items() if name != "events")
        seen: set[int | None] = set()
        for slot in range(abi.CONFIG_SLOTS):
            map_id = self.counters_id(slot)
            with self._open_counters(slot) as fd:
                total += 0 if fd is None or map_id in seen else libbpf.map_memory(fd)
            seen.add(map_id)
        return total

    def _slot(self, slot: int | None) -> int:
        return self.active_slot() if slot is None else slot

    def _read(self, name: str, index: int, structure: type[_Structure]) -> _Structure:
        """Return an element of an array."""
        value = structure()
        if not libbpf.map_read(self._fds[name], packed(index), value):
            raise VgwError(f"the map {name} has no element {index}: detach the VM, attach it again")
        return value

    def _inner_id(self, name: str, index: int) -> int | None:
        value = libbpf.map_lookup(self._fds[name], packed(index), _ID_BYTES)
        return None if value is None else number(value)

    @contextmanager
    def _open_counters(self, slot: int) -> Iterator[int | None]:
        """Open the map that a slot's rules count in for the `with` block; None: there is none."""
        map_id = self.counters_id(slot)
        fd = None if map_id is None else self._counters.open(slot, map_id)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)
