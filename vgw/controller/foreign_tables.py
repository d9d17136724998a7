# SPDX-License-Identifier: Apache-2.0
"""The tables of an endpoint of another ABI version, read field by field into this version's."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from vgw import abi, libbpf
from vgw.controller.clock import coarse_now_ns
from vgw.controller.columns import Columns, converted, dtype_of, read_hash, renumbered
from vgw.controller.elsewhere import Elsewhere
from vgw.controller.flow_table import FLOW, KEY, are_live, records_of
from vgw.controller.layouts import LayoutError, own_layout
from vgw.controller.paths import Paths
from vgw.errors import KernelError
from vgw.maps import RuleCount, counted
from vgw.maps_counters import PinnedCounters

_NO_EXIST: Final = 1
#: By IP protocol, the state of a flow of which the state is not known here.
_OPEN: Final = np.full(256, abi.FlowState.OTHER, np.uint8)
_OPEN[socket.IPPROTO_TCP] = abi.FlowState.TCP_ESTABLISHED
_OPEN[socket.IPPROTO_UDP] = abi.FlowState.UDP_REPLIED
#: Map -> the structures of its keys and values, None for an index or a map.
_MAPS: Final[dict[str, tuple[str | None, str | None]]] = {
    "active": (None, "active_slot"),
    "configs": (None, "endpoint_config"),
    "conntrack": ("flow_key", "flow"),
    "conntrack_meta": (None, "conntrack_meta"),
    "fragments": ("fragment_key", "fragment"),
    "stats": (None, "packet_counter"),
    "event_meter": (None, "event_meter"),
    "reject_meter": (None, "reject_meter"),
    "rule_counters": (None, None),
}
_ENUMS: Final = ("vgw_path", "vgw_verdict", "vgw_reason", "vgw_flow_state", "vgw_mode")
_NEEDED: Final = {
    "active_slot": ("slot",),
    "endpoint_config": ("flow_epoch", "timeout_ns", "generation", "mode"),
    "flow_key": ("local", "remote", "local_port", "remote_port", "protocol"),
    "flow": ("state", "opener", "epoch", "generation", "last_seen_ns", "created_ns"),
    "conntrack_meta": (),
    "packet_counter": ("packets", "bytes"),
    "rule_counter": ("packets", "bytes"),
}
#: Fields of maps of one element that mean the same in another table.
_CARRIED: Final = {
    "conntrack_meta": ("created", "dhcp_asked_ns"),
    "event_meter": ("sent", "suppressed", "lost"),
    "reject_meter": ("sent", "suppressed", "failed"),
}


class ForeignTables:
    """The open tables of an endpoint of another version; use as a context manager.

    They can be read as long as this is open, whatever becomes of their pins.
    """

    def __init__(self, paths: Paths, where: Elsewhere) -> None:
        """Open what is pinned. Raises LayoutError when it is not what its layout says."""
        self.where = where
        self._layout = where.layout(paths)
        self._own = own_layout()
        self._fds: dict[str, int] = {}
        try:
            self._check_layout()
            for name, (key, value) in _MAPS.items():
                self._open(name, self._size(key), self._size(value))
        except (KernelError, LayoutError) as error:
            self.close()
            raise LayoutError(
                f"{where.interface} goes on filtering with the tables of ABI {where.abi}, which "
                f"cannot be read: {error}; `vgw attach --vm {where.vm} --force` gives up its "
                "connections"
            ) from error

    def _check_layout(self) -> None:
        """Raise LayoutError when something is missing without which nothing makes sense."""
        for structure, fields in _NEEDED.items():
            missing = set(fields).difference(dtype_of(self._layout, structure).names or ())
            if missing:
                raise LayoutError(f"its {structure} has no {min(missing)}")
        for enum in _ENUMS:
            if enum not in self._layout.enums:
                raise LayoutError(f"its {enum} is not said")
        if self._layout.enums["vgw_path"] != self._own.enums["vgw_path"]:
            raise LayoutError("it knows other paths of packets")

    def __enter__(self) -> ForeignTables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tables."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _size(self, structure: str | None) -> int:
        """Return the bytes of a structure; None is an index, or the number of a map."""
        return 4 if structure is None else dtype_of(self._layout, structure).itemsize

    def _open(self, name: str, key_size: int, value_size: int) -> None:
        self._fds[name] = fd = libbpf.get_pinned(self.where.directory / name)
        info = libbpf.map_info(fd)
        if (info.key_size, info.value_size) != (key_size, value_size):
            raise LayoutError(f"its map {name} has other sizes than its layout says")

    def config(self) -> Columns:
        """Return the configuration in force, as an array of one in the other version's layout."""
        slot = int(self._element("active", 0)["slot"][0])
        return self._element("configs", slot)

    def field(self, name: str, otherwise: int = 0, path: abi.Path | None = None) -> int:
        """Return a number of the configuration in force; `otherwise` where there is no such.

        `path` chooses one of those that there are for each path.
        """
        config = self.config()
        if name not in (config.dtype.names or ()):
            return otherwise
        return int(config[name][0] if path is None else config[name][0][path])

    def mode(self) -> abi.Mode:
        """Return the mode in force; one that is not known here drops everything."""
        for name, number in self._layout.enums["vgw_mode"].items():
            if number == self.field("mode") and name in abi.Mode.__members__:
                return abi.Mode[name]
        return abi.Mode.QUARANTINE

    def flows(self) -> Columns:
        """Return the live flows as RECORDs.

        A flow in a state that is not known here counts as open, as its protocol has it.
        """
        layout = self._layout
        keys, flows = read_hash(
            self._fds["conntrack"], dtype_of(layout, "flow_key"), dtype_of(layout, "flow")
        )
        records = records_of(converted(keys, KEY), converted(flows, FLOW))
        states, known = renumbered(
            records["flow"]["state"],
            layout.enums["vgw_flow_state"],
            self._own.enums["vgw_flow_state"],
        )
        otherwise = _OPEN[records["key"]["protocol"]]
        records["flow"]["state"] = np.where(known, states, otherwise)
        live = are_live(records["flow"], self._own_config(), coarse_now_ns())
        found: Columns = records[live]
        return found

    def _own_config(self) -> abi.EndpointConfig:
        """Return the configuration in this version's layout, timeouts by its own states."""
        theirs = self.config()
        config = abi.EndpointConfig.from_buffer_copy(
            converted(theirs, dtype_of(self._own, "endpoint_config")).tobytes()
        )
        states = self._layout.enums["vgw_flow_state"]
        for state in abi.FlowState:
            if state.name in states:
                config.timeout_ns[state] = int(theirs["timeout_ns"][0][states[state.name]])
        return config

    def seed(self, fds: Mapping[str, int]) -> None:
        """Carry counters to an endpoint that no packet has met, whose maps `fds` are."""
        for name, fields in _CARRIED.items():
            self._carry(name, fields, fds[name])
        self._carry_stats(fds["stats"])

    def _carry(self, name: str, fields: tuple[str, ...], fd: int) -> None:
        row = converted(self._element(name, 0), dtype_of(self._own, name))
        made = np.zeros(1, row.dtype)
        for field in fields:
            made[field] = row[field]
        libbpf.map_update(fd, bytes(4), made.tobytes())

    def _carry_stats(self, fd: int) -> None:
        """Carry the packet counters, summed, to one CPU's part of each of this version's."""
        cpus = libbpf.possible_cpus()
        counter = dtype_of(self._layout, "packet_counter")
        own = dtype_of(self._own, "packet_counter")
        for key, value in libbpf.map_entries(self._fds["stats"], 4, counter.itemsize * cpus):
            parts = converted(np.frombuffer(value, counter), own)
            index = self._stats_index(int.from_bytes(key, sys.byteorder))
            if index is None or not parts["packets"].any():
                continue
            made = np.zeros(cpus, own)
            for field in own.names or ():
                made[field][0] = parts[field].sum()
            libbpf.map_update(fd, _index(index), made.tobytes())

    def _stats_index(self, index: int) -> int | None:
        """Return where this version counts what the other one counts at an index."""
        enums = self._layout.enums
        place, reason = divmod(index, self._layout.reason_slots)
        path, verdict = divmod(place, len(enums["vgw_verdict"]))
        try:
            return abi.stats_index(
                abi.Path[_name(enums["vgw_path"], path)],
                abi.Verdict[_name(enums["vgw_verdict"], verdict)],
                abi.Reason[_name(enums["vgw_reason"], reason)],
            )
        except KeyError:
            return None

    def rule_counts(self) -> Iterator[tuple[abi.Path, int, RuleCount]]:
        """Yield path, number and counts of each rule of the policy in force that has counted."""
        slot = int(self._element("active", 0)["slot"][0])
        first = self.field("first_counter", path=abi.Path.FROM_VM)
        inner = libbpf.map_lookup(self._fds["rule_counters"], _index(slot), 4)
        if inner is None:
            return
        theirs = dtype_of(self._layout, "rule_counter")
        map_id = int.from_bytes(inner, sys.byteorder)
        pinned = PinnedCounters(self.where.directory).open(slot, map_id)
        fd = libbpf.map_fd_by_id(map_id) if pinned is None else pinned
        try:
            rows = np.frombuffer(libbpf.array_values(fd, theirs.itemsize), theirs)
        finally:
            os.close(fd)
        ours = converted(rows, dtype_of(self._own, "rule_counter")).tobytes()
        for index, count in counted(ours):
            path = abi.Path.FROM_VM if index >= first else abi.Path.TO_VM
            yield path, index - (first if path is abi.Path.FROM_VM else 0), count

    def carry_fragments(self, fd: int) -> None:
        """Carry what is known of datagrams in fragments, beside packets."""
        layout, own = self._layout, self._own
        keys, values = read_hash(
            self._fds["fragments"], dtype_of(layout, "fragment_key"), dtype_of(layout, "fragment")
        )
        keys = converted(keys, dtype_of(own, "fragment_key"))
        values = converted(values, dtype_of(own, "fragment"))
        for key, value in zip(keys, values, strict=True):
            try:
                libbpf.map_update(fd, key.tobytes(), value.tobytes(), _NO_EXIST)
            except KernelError as error:
                if error.errno != errno.EEXIST:
                    raise

    def _element(self, name: str, index: int) -> Columns:
        dtype = dtype_of(self._layout, _MAPS[name][1] or name)
        value = libbpf.map_lookup(self._fds[name], index.to_bytes(4, sys.byteorder), dtype.itemsize)
        if value is None:
            raise LayoutError(f"its map {name} has no element {index}")
        return np.frombuffer(value, dtype)


def _index(number: int) -> bytes:
    """Return a u32 as the kernel reads it."""
    return number.to_bytes(4, sys.byteorder)


def _name(members: Mapping[str, int], number: int) -> str:
    """Return the name of a member; KeyError without one."""
    for name, value in members.items():
        if value == number:
            return name
    raise KeyError(number)
