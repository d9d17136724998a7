# SPDX-License-Identifier: Apache-2.0
"""The maps of one endpoint as typed values: the structures of vgw/abi.py in, and out.

What changes how packets are judged goes through stage() and switch(): the spare slot is written
while packets are judged by the active one, and one store makes it active.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar

from vgw import abi, libbpf
from vgw.abi_maps import size_mismatch
from vgw.errors import VgwError

_BLOCK_BYTES: Final = ctypes.sizeof(abi.ImageBlock)
_FIRST: Final = bytes(4)
_ID_BYTES: Final = 4
_Structure = TypeVar("_Structure", bound=ctypes.Structure)


class Counter(NamedTuple):
    """Packets and wire bytes."""

    packets: int
    bytes: int


def policy_blocks(image: bytes) -> int:
    """Return how many entries the map for a compiled policy needs."""
    return -(-len(image) // _BLOCK_BYTES)


def write_policy(fd: int, words: bytes) -> None:
    """Write a compiled policy into its map, which has policy_blocks(words) entries or more.

    Raises KernelError.
    """
    libbpf.map_fill(fd, words.ljust(policy_blocks(words) * _BLOCK_BYTES, b"\0"), _BLOCK_BYTES)


class EndpointMaps:
    """The maps of an endpoint; takes over the fds it is given and closes them.

    Methods raise KernelError when the kernel refuses. Writers must not overlap; the caller holds
    the host's lock. What reads inner maps needs CAP_SYS_ADMIN.
    """

    def __init__(self, fds: Mapping[str, int]) -> None:
        """Take fds by map name.

        Raises VgwError, leaving the fds to the caller, when a map has not the ABI's sizes.
        """
        self._fds = dict(fds)
        for name, fd in self._fds.items():
            info = libbpf.map_info(fd)
            mismatch = size_mismatch(name, info.key_size, info.value_size)
            if mismatch is not None:
                raise VgwError(f"{mismatch}: detach the VM and attach it again")

    def __enter__(self) -> EndpointMaps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the fds; pinned or attached maps live on."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def active_slot(self) -> int:
        """Return the slot of configs and policies that packets are judged by."""
        return self._read("active", 0, abi.ActiveSlot).slot  # type: ignore[no-any-return]

    def config(self) -> abi.EndpointConfig:
        """Return the configuration in force."""
        return self._read("configs", self.active_slot(), abi.EndpointConfig)

    def stage(self, config: abi.EndpointConfig, policy_fd: int) -> int:
        """Write the spare slot and return its number for switch(); no packet sees it yet.

        Takes an RCU grace period. The kernel keeps the policy map; its fd may be closed.
        """
        slot = 1 - self.active_slot()
        libbpf.map_update(self._fds["policies"], _index(slot), _index(policy_fd))
        libbpf.map_update(self._fds["configs"], _index(slot), bytes(config))
        return slot

    def switch(self, slot: int) -> None:
        """Make `slot` the one that packets are judged by, from the next packet on.

        Packets being judged finish with the other slot: see libbpf.wait_for_programs().
        """
        libbpf.map_update(self._fds["active"], _FIRST, bytes(abi.ActiveSlot(slot=slot)))

    def release(self, slot: int) -> None:
        """Free the policy of a slot that no packet is judged by any more."""
        libbpf.map_delete(self._fds["policies"], _index(slot))

    def set_rule_counters(self, fd: int) -> None:
        """Make the map `fd` the one that rules count in; its fd may be closed afterwards."""
        libbpf.map_update(self._fds["rule_counters"], _FIRST, _index(fd))

    def rule_counters(self, ids: Iterable[int]) -> dict[int, abi.RuleCounter]:
        """Return the counters of rules by id; an id without room in the map is left out."""
        with self._inner("rule_counters", 0) as fd:
            if fd is None:
                return {}
            size = ctypes.sizeof(abi.RuleCounter)
            values = b"".join(value for _, value in libbpf.map_entries(fd, 4, size))
        table = (abi.RuleCounter * (len(values) // size)).from_buffer_copy(values)
        return {rule: table[rule] for rule in ids if 0 <= rule < len(table)}

    def rule_capacity(self) -> int:
        """Return how many rule ids have a counter, 0 before set_rule_counters()."""
        with self._inner("rule_counters", 0) as fd:
            return 0 if fd is None else libbpf.map_info(fd).max_entries

    def stats(self) -> dict[tuple[abi.Path, abi.Verdict, abi.Reason], Counter]:
        """Return the packet counters that are not zero, summed over the CPUs."""
        cpus = libbpf.possible_cpus()
        layout = struct.Struct(f"={2 * cpus}Q")
        nothing = bytes(layout.size)
        found: dict[tuple[abi.Path, abi.Verdict, abi.Reason], Counter] = {}
        for key, value in libbpf.map_entries(self._fds["stats"], 4, layout.size):
            if value == nothing:
                continue
            numbers = layout.unpack(value)
            found[abi.stats_labels(_number(key))] = Counter(sum(numbers[0::2]), sum(numbers[1::2]))
        return found

    def meta(self) -> abi.ConntrackMeta:
        """Return the counters of the conntrack table."""
        return self._read("conntrack_meta", 0, abi.ConntrackMeta)

    def event_meter(self) -> abi.EventMeter:
        """Return how many events the endpoint sent and lost."""
        return self._read("event_meter", 0, abi.EventMeter)

    def flows(self) -> Iterator[tuple[abi.FlowKey, abi.Flow]]:
        """Walk the conntrack table, dead flows included."""
        key_size, size = ctypes.sizeof(abi.FlowKey), ctypes.sizeof(abi.Flow)
        for key, value in libbpf.map_entries(self._fds["conntrack"], key_size, size):
            yield abi.FlowKey.from_buffer_copy(key), abi.Flow.from_buffer_copy(value)

    def conntrack_max(self) -> int:
        """Return how many flows fit."""
        return libbpf.map_info(self._fds["conntrack"]).max_entries

    def memory(self) -> int:
        """Return the bytes of kernel memory that the maps take, inner maps included.

        The host-wide `events` is not counted.
        """
        total = sum(libbpf.map_memory(fd) for name, fd in self._fds.items() if name != "events")
        slots = [("policies", slot) for slot in range(abi.CONFIG_SLOTS)]
        for name, slot in [*slots, ("rule_counters", 0)]:
            with self._inner(name, slot) as fd:
                total += 0 if fd is None else libbpf.map_memory(fd)
        return total

    def _read(self, name: str, index: int, structure: type[_Structure]) -> _Structure:
        """Return an element of an array."""
        value = libbpf.map_lookup(self._fds[name], _index(index), ctypes.sizeof(structure))
        if value is None:
            raise VgwError(f"the map {name} has no element {index}: detach the VM, attach it again")
        return structure.from_buffer_copy(value)

    @contextmanager
    def _inner(self, name: str, slot: int) -> Iterator[int | None]:
        """Open the map in a slot of a map of maps for the `with` block; None when it is empty."""
        value = libbpf.map_lookup(self._fds[name], _index(slot), _ID_BYTES)
        fd = None if value is None else libbpf.map_fd_by_id(_number(value))
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)


def _index(value: int) -> bytes:
    """Return a u32 as the kernel reads it."""
    return value.to_bytes(4, sys.byteorder)


def _number(data: bytes) -> int:
    """Return the number in an unsigned integer of the host."""
    return int.from_bytes(data, sys.byteorder)
