# SPDX-License-Identifier: Apache-2.0
"""What `vgw top` makes rates of: the counters of all VMs, and with whom one of them talks."""

from __future__ import annotations

import ctypes
import itertools
import struct
import time
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any, Final

from vgw import abi
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.metrics import EndpointReading
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.policy.model import DIRECTION_OF_PATH

#: Flows that a look at a VM's connections reads, of those in its tables.
MAX_FLOWS: Final = 16_384
#: Addresses that it tells of, those with the most bytes.
MAX_TALKERS: Final = 200
_OUTCOME: Final = {
    abi.Verdict.ACCEPT: "accepted",
    abi.Verdict.WOULD_DROP: "would_drop",
    abi.Verdict.DROP: "dropped",
    abi.Verdict.REJECT: "dropped",
}
_ADDRESS: Final = slice(
    abi.FlowKey.remote.offset, abi.FlowKey.remote.offset + ctypes.sizeof(abi.Address)
)
#: Packets and bytes of a flow, by path each.
_COUNTS: Final = struct.Struct("=4Q")

Row = dict[str, Any]


def sample(host: Host) -> Row:
    """Return the counters of all VMs: {"at_ns", "vms": [...]}; `at_ns` is a monotonic clock's.

    Each interface has packets and bytes by direction and outcome, and packets by reason of those
    that did not pass, or would not.
    """
    vms: dict[str, Row] = {}
    at_ns = time.monotonic_ns()
    for reading in read_endpoints(host):
        vm = vms.setdefault(
            reading.vm,
            {
                "vm": reading.vm,
                "mode": reading.vm_mode,
                "generation": reading.generation,
                "interfaces": [],
            },
        )
        vm["interfaces"].append(_interface(reading))
    return {"schema": "vgw/v1", "at_ns": at_ns, "vms": list(vms.values())}


def _interface(reading: EndpointReading) -> Row:
    counters: dict[str, dict[str, list[int]]] = {
        str(direction): {outcome: [0, 0] for outcome in ("accepted", "dropped", "would_drop")}
        for direction in DIRECTION_OF_PATH.values()
    }
    reasons: dict[str, Tally[str]] = {direction: Tally() for direction in counters}
    for (path, verdict, reason), counter in reading.stats.items():
        direction = str(DIRECTION_OF_PATH[path])
        total = counters[direction][_OUTCOME[verdict]]
        total[0] += counter.packets
        total[1] += counter.bytes
        if verdict is not abi.Verdict.ACCEPT:
            reasons[direction][reason.name] += counter.packets
    return {
        "name": reading.interface,
        "attached": reading.attached,
        "hook": reading.hook,
        "connections": reading.conntrack_entries,
        "connections_max": reading.conntrack_max,
        "half_open": sum(reading.half_open.values()),
        "counters": counters,
        "reasons": {direction: dict(tally) for direction, tally in reasons.items()},
    }


def talkers(host: Host, vm: str) -> Row:
    """Return with whom a VM talks: {"at_ns", "vm", "flows", "complete", "talkers": [...]}.

    A talker is an address with the packets and bytes of its open connections by direction. At most
    MAX_FLOWS are read; `complete` tells whether those were all. Raises VgwError.
    """
    host.manifest(vm)
    totals: dict[bytes, list[int]] = {}
    at_ns = time.monotonic_ns()
    read, complete = 0, True
    for endpoint in host.open_endpoints(vm):
        with endpoint:
            for address, counts in itertools.islice(_flows(endpoint), MAX_FLOWS - read + 1):
                if read == MAX_FLOWS:
                    complete = False
                    break
                read += 1
                total = totals.setdefault(address, [0] * 5)
                total[4] += 1
                for place, count in enumerate(counts):
                    total[place] += count
    most = sorted(totals.items(), key=lambda item: -(item[1][2] + item[1][3]))[:MAX_TALKERS]
    return {
        "schema": "vgw/v1",
        "at_ns": at_ns,
        "vm": vm,
        "flows": read,
        "complete": complete,
        "talkers": [_talker(address, total) for address, total in most],
    }


def _flows(endpoint: OpenEndpoint) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Yield remote address and counts of each flow that is not dead, read in batches."""
    state, counts = abi.Flow.state.offset, abi.Flow.packets.offset
    for key, flow in endpoint.maps.raw_flows():
        if flow[state] != abi.FlowState.DEAD:
            yield key[_ADDRESS], _COUNTS.unpack_from(flow, counts)


def _talker(address: bytes, total: list[int]) -> Row:
    def by_direction(first: int) -> dict[str, int]:
        return {str(each): total[first + path] for path, each in DIRECTION_OF_PATH.items()}

    return {
        "address": str(abi.unpack_address(abi.Address.from_buffer_copy(address))),
        "connections": total[4],
        "packets": by_direction(0),
        "bytes": by_direction(2),
    }
