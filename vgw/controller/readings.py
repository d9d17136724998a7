# SPDX-License-Identifier: Apache-2.0
"""What metrics and loss reports need from the maps of every endpoint, read when asked for.

Endpoints are opened, read and closed VM by VM: no lock is held, no file descriptors are kept, and
what is detached meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence

from vgw import libbpf
from vgw.abi import Path
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.event_reader import Meter
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.metrics import EndpointReading, RuleReading
from vgw.controller.pinned import interfaces_of
from vgw.controller.policy_store import RuleNames
from vgw.controller.reconcile import Host
from vgw.controller.rule_counts import NO_COUNT, RuleCounts, counted_now, plus, read_steadily
from vgw.controller.status import reject_answers
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.policy.model import PATH_OF_DIRECTION


def read_endpoints(host: Host, *, rules: bool = False) -> Iterator[EndpointReading]:
    """Yield what a scrape shows of each endpoint; with `rules` that of each rule too."""
    names = RuleNames(host.store)
    for vm in host.attached():
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(endpoint) for endpoint in host.open_endpoints(vm)]
            counted = _rules(host, vm, opened, names) if rules else [()] * len(opened)
            for endpoint, counts in zip(opened, counted, strict=True):
                yield _reading(endpoint, counts)


def read_meters(host: Host) -> Iterator[Meter]:
    """Yield the event meter of each endpoint; only that map is opened, for this is done often."""
    for vm in host.attached():
        for interface in interfaces_of(host.paths, vm):
            pin = host.paths.endpoint_dir(vm, interface) / "event_meter"
            with contextlib.suppress(OSError, VgwError), contextlib.ExitStack() as stack:
                made = pin.stat().st_ino
                fd = libbpf.get_pinned(pin)
                stack.callback(os.close, fd)
                yield Meter(vm, interface, made, EndpointMaps({"event_meter": fd}).event_meter())


def _reading(endpoint: OpenEndpoint, rules: tuple[RuleReading, ...]) -> EndpointReading:
    maps = endpoint.maps
    meta, config = maps.meta(), maps.config()
    from_vm = to_vm = None
    # The interface may be gone, or go at this moment: it is not attached then.
    with contextlib.suppress(OSError, VgwError):
        ifindex = socket.if_nametoindex(endpoint.interface)
        from_vm = endpoint.attachment(ifindex, Path.FROM_VM)
        to_vm = endpoint.attachment(ifindex, Path.TO_VM)
    return EndpointReading(
        vm=endpoint.vm,
        interface=endpoint.interface,
        generation=config.generation,
        attached=from_vm is not None and to_vm is not None,
        hook=from_vm.hook if from_vm is not None else "",
        mode=from_vm.mode if from_vm is not None else "",
        stats=maps.stats(),
        conntrack_entries=meta.entries,
        conntrack_max=maps.conntrack_max(),
        half_open={
            direction: meta.half_open[path] for direction, path in PATH_OF_DIRECTION.items()
        },
        half_open_max=config.half_open_max,
        new_connections={
            direction: meta.created[path] for direction, path in PATH_OF_DIRECTION.items()
        },
        events=maps.event_meter().sent,
        reject_answers=reject_answers(maps),
        rules=rules,
    )


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
    for key, count in counted_now(endpoint.maps, counts, labels_of):
        totals[key] = plus(totals.get(key, NO_COUNT), count)
    return tuple(
        RuleReading(
            label.direction, label.policy, label.name, totals.get(label.key, NO_COUNT).packets
        )
        for path in PATH_OF_DIRECTION.values()
        for label in labels_of(manifest.generation, path) or ()
    )
