# SPDX-License-Identifier: Apache-2.0
"""What metrics and loss reports need from the maps of every endpoint, read when asked for.

The maps stay open between looks (kept_maps.py), but for those of rules, which few ask for. What is
detached meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final

from vgw import libbpf
from vgw.abi import Mode, Path
from vgw.controller import links
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.event_reader import Meter
from vgw.controller.interfaces import InterfaceNames
from vgw.controller.kept_maps import KeptEndpoint
from vgw.controller.links import Attachment
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.metrics import EndpointReading, RuleReading
from vgw.controller.policy_store import RuleNames
from vgw.controller.reconcile import Host
from vgw.controller.rule_counts import NO_COUNT, RuleCounts, add, counted_now, read_steadily
from vgw.controller.status import reject_answers
from vgw.errors import VgwError
from vgw.policy.model import PATH_OF_DIRECTION

#: Endpoints from which on threads are worth their while, and how many there are at most.
_FEW: Final = 64
_THREADS: Final = 4

_Rules = Mapping[tuple[str, str], tuple[RuleReading, ...]]


def read_endpoints(host: Host, *, rules: bool = False) -> list[EndpointReading]:
    """Return what a scrape shows of each endpoint; with `rules` that of each rule too.

    Much of the time passes in the kernel, so threads share the endpoints between them.
    """
    counted = _rules_of_all(host) if rules else {}
    shielded = host.shields.up()
    with host.kept.endpoints() as endpoints, InterfaceNames() as names:
        threads = min(_THREADS, len(os.sched_getaffinity(0))) if len(endpoints) >= _FEW else 1
        read: dict[int, EndpointReading] = {}

        def read_part(first: int) -> None:
            for place in range(first, len(endpoints), threads):
                read[place] = _reading(endpoints[place], names, counted, shielded)

        libbpf.side_by_side(*(partial(read_part, first) for first in range(threads)))
    return [read[place] for place in sorted(read)]


def read_meters(host: Host) -> list[Meter]:
    """Return the event meter of each endpoint."""
    with host.kept.endpoints() as endpoints:
        return [
            Meter(each.vm, each.interface, each.made, each.maps.event_meter()) for each in endpoints
        ]


def _reading(
    endpoint: KeptEndpoint,
    names: InterfaceNames,
    counted: _Rules,
    shielded: Collection[int],
) -> EndpointReading:
    maps = endpoint.maps
    meta, config = maps.meta(), maps.config()
    from_vm, to_vm = _attachments(endpoint, names)
    return EndpointReading(
        vm=endpoint.vm,
        interface=endpoint.interface,
        generation=config.generation,
        attached=from_vm is not None and to_vm is not None,
        hook=from_vm.hook if from_vm is not None else "",
        mode=from_vm.mode if from_vm is not None else "",
        vm_mode=Mode(config.mode).name.lower(),
        stats=maps.stats(),
        conntrack_entries=meta.entries,
        conntrack_max=endpoint.conntrack_max,
        half_open={
            direction: meta.half_open[path] for direction, path in PATH_OF_DIRECTION.items()
        },
        half_open_max=config.half_open_max,
        new_connections={
            direction: meta.created[path] for direction, path in PATH_OF_DIRECTION.items()
        },
        events=maps.event_meter().sent,
        reject_answers=reject_answers(maps),
        rules=counted.get((endpoint.vm, endpoint.interface), ()),
        shield=config.endpoint in shielded if config.flood_drops else None,
    )


def _attachments(
    endpoint: KeptEndpoint, names: InterfaceNames
) -> tuple[Attachment | None, Attachment | None]:
    """Return how an endpoint is attached from the VM and to it; None where it is not."""
    known = endpoint.attachments
    # The interface may be gone, or go at this moment: it is not attached then.
    with contextlib.suppress(OSError, VgwError):
        if known is not None and names.of(known[0]) == endpoint.interface:
            ifindex, from_vm, to_vm = known
            if links.is_still(from_vm, ifindex, Path.FROM_VM) and links.is_still(
                to_vm, ifindex, Path.TO_VM
            ):
                return from_vm, to_vm
        ifindex = socket.if_nametoindex(endpoint.interface)
        found_from_vm = links.read_attachment(ifindex, Path.FROM_VM, endpoint.directory)
        found_to_vm = links.read_attachment(ifindex, Path.TO_VM, endpoint.directory)
        if found_from_vm is not None and found_to_vm is not None:
            endpoint.attachments = (ifindex, found_from_vm, found_to_vm)
        return found_from_vm, found_to_vm
    return None, None


def _rules_of_all(host: Host) -> _Rules:
    """Return the counts of the rules in force of all endpoints."""
    names = RuleNames(host.store)
    found: dict[tuple[str, str], tuple[RuleReading, ...]] = {}
    for vm in host.attached():
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(endpoint) for endpoint in host.open_endpoints(vm)]
            counts = _rules(host, vm, opened, names)
            found |= {(vm, each.interface): one for each, one in zip(opened, counts, strict=True)}
    return found


def _rules(
    host: Host, vm: str, opened: Sequence[OpenEndpoint], names: RuleNames
) -> list[tuple[RuleReading, ...]]:
    """Return the counts of the rules in force, of each of a VM's endpoints."""

    def read(counts: RuleCounts) -> list[tuple[RuleReading, ...]]:
        manifest = load_manifest(host.paths.manifest(vm))
        if manifest is None:
            return [()] * len(opened)
        return [
            _rules_of(endpoint, manifest, names, counts, first=number == 0)
            for number, endpoint in enumerate(opened)
        ]

    return read_steadily(host.paths.counts(vm), [endpoint.maps for endpoint in opened], read)


def _rules_of(
    endpoint: OpenEndpoint,
    manifest: Manifest,
    names: RuleNames,
    counts: RuleCounts,
    *,
    first: bool,
) -> tuple[RuleReading, ...]:
    """Return the counts of the rules in force.

    What counters that are gone had counted is remembered for the whole VM; it is shown with the
    VM's first interface, so that sums over interfaces are right.
    """
    labels_of = manifest.in_generation(names.labels)
    totals = dict(counts.carried) if first else {}
    add(totals, counted_now(endpoint.maps, counts, labels_of))
    return tuple(
        RuleReading(
            label.direction, label.policy, label.name, totals.get(label.key, NO_COUNT).packets
        )
        for path in PATH_OF_DIRECTION.values()
        for label in labels_of(manifest.generation, path) or ()
    )
