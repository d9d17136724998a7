# SPDX-License-Identifier: Apache-2.0
"""What metrics and loss reports need from the maps of every endpoint, read when asked for.

The maps stay open between looks (kept_maps.py). What is detached meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Final

from vgw import libbpf
from vgw.abi import Mode, Path
from vgw.controller import links
from vgw.controller.event_reader import Meter
from vgw.controller.interfaces import InterfaceNames
from vgw.controller.kept_maps import KeptEndpoint, KeptLook
from vgw.controller.links import Attachment
from vgw.controller.metrics import EndpointReading
from vgw.controller.reconcile import Host
from vgw.controller.rule_readings import RuleReadings, RulesOf
from vgw.controller.status import answers_of
from vgw.errors import VgwError
from vgw.maps_stats import Stats, StatsReads
from vgw.policy.model import PATH_OF_DIRECTION, Direction

#: Endpoints whose packet counters a thread reads at a time, and how many threads there are at most.
_AT_ONCE: Final = 32
_THREADS: Final = 4
_MODES: Final = {int(mode): mode.name.lower() for mode in Mode}
_PLACES: Final = [(direction, int(path)) for direction, path in PATH_OF_DIRECTION.items()]

_Attached = tuple[Attachment | None, Attachment | None]


def read_endpoints(host: Host, rules: RuleReadings | None = None) -> list[EndpointReading]:
    """Return what a scrape shows of each endpoint; with `rules` that of each rule too.

    Much of the time passes in the kernel, so threads share the endpoints between them.
    """
    shielded = host.shields.up()
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    with host.kept.look() as look:
        endpoints = look.endpoints
        configs = look.configs()
        modes = [config.mode for config in configs]
        with libbpf.Helpers(threads - 1) as helpers:
            slices = (slice(at, at + _AT_ONCE) for at in range(0, len(endpoints), _AT_ONCE))
            parts = [
                helpers.begin(partial(_stats_of, endpoints[each], modes[each])) for each in slices
            ]
            attached = _attachments_of(look)
            metas, events, answers = look.metas(), look.event_meters(), look.reject_meters()
            counted: RulesOf = rules.of(look) if rules is not None else {}
        stats = chain.from_iterable(part.result() for part in parts)
        return [
            EndpointReading(
                vm=endpoint.vm,
                interface=endpoint.interface,
                generation=config.generation,
                attached=from_vm is not None and to_vm is not None,
                hook=from_vm.hook if from_vm is not None else "",
                mode=from_vm.mode if from_vm is not None else "",
                vm_mode=_MODES[mode],
                stats=counters,
                conntrack_entries=meta.entries,
                conntrack_max=endpoint.conntrack_max,
                half_open=_by_direction(meta.half_open),
                half_open_max=config.half_open_max,
                new_connections=_by_direction(meta.created),
                events=sent.sent,
                reject_answers=answers_of(answered),
                rules=counted.get((endpoint.vm, endpoint.interface), ()),
                shield=config.endpoint in shielded if config.flood_drops else None,
            )
            for endpoint, (from_vm, to_vm), config, mode, meta, sent, answered, counters in zip(
                endpoints, attached, configs, modes, metas, events, answers, stats, strict=True
            )
        ]


def read_meters(host: Host) -> list[Meter]:
    """Return the event meter of each endpoint."""
    with host.kept.look() as look:
        return [
            Meter(each.vm, each.interface, each.made, meter.suppressed, meter.lost)
            for each, meter in zip(look.endpoints, look.event_meters(), strict=True)
        ]


def _by_direction(numbers: Sequence[int]) -> dict[Direction, int]:
    return {direction: numbers[path] for direction, path in _PLACES}


def _stats_of(endpoints: Sequence[KeptEndpoint], modes: Sequence[int]) -> list[Stats]:
    """Return the packet counters of endpoints that are in these modes."""
    reads = StatsReads()
    return [_stats(reads, *row) for row in zip(endpoints, modes, strict=True)]


def _stats(reads: StatsReads, endpoint: KeptEndpoint, mode: int) -> Stats:
    """Return an endpoint's packet counters; the kernel takes its time for each that is read."""
    fd = endpoint.maps.fd("stats")
    if mode == Mode.MONITOR or not endpoint.is_settled:
        endpoint.would_drop = None
        return reads.all(fd)
    if endpoint.would_drop is None:
        endpoint.would_drop = reads.monitored(fd)
    return {**reads.judged(fd), **endpoint.would_drop}


def _attachments_of(look: KeptLook) -> list[_Attached]:
    """Return how each endpoint is attached from the VM and to it; None where it is not."""
    found: list[_Attached] = []
    indexes = [0 if each.attachments is None else each.attachments[0] for each in look.endpoints]
    with InterfaceNames() as names:
        for endpoint, programs in zip(look.endpoints, look.lists.read(indexes), strict=True):
            known = endpoint.attachments
            if known is not None and names.of(known[0]) == endpoint.interface:
                _, *attachments = known
                if all(map(links.is_still, attachments, programs)):
                    found.append((known[1], known[2]))
                    continue
            found.append(_attachments(endpoint))
    return found


def _attachments(endpoint: KeptEndpoint) -> _Attached:
    """Find out how an endpoint is attached, and remember what it takes to see that it still is."""
    # The interface may be gone, or go at this moment: it is not attached then.
    with contextlib.suppress(OSError, VgwError):
        ifindex = socket.if_nametoindex(endpoint.interface)
        from_vm = links.read_attachment(ifindex, Path.FROM_VM, endpoint.directory)
        to_vm = links.read_attachment(ifindex, Path.TO_VM, endpoint.directory)
        if from_vm is not None and to_vm is not None:
            endpoint.attachments = (ifindex, from_vm, to_vm)
        return from_vm, to_vm
    return None, None
