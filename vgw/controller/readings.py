# SPDX-License-Identifier: Apache-2.0
"""What metrics and loss reports need from the maps of every endpoint, read when asked for.

Endpoints are opened, read and closed VM by VM: no lock is held, no file descriptors are kept, and
what is detached meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from vgw import libbpf
from vgw.abi import Path
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.event_reader import Meter
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.metrics import EndpointReading, RuleReading
from vgw.controller.pinned import interfaces_of
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.policy.model import PATH_OF_DIRECTION


def read_endpoints(host: Host, *, rules: bool = False) -> Iterator[EndpointReading]:
    """Yield what a scrape shows of each endpoint; with `rules` that of each rule too."""
    for vm in host.attached():
        manifest = load_manifest(host.paths.manifest(vm)) if rules else None
        for number, endpoint in enumerate(host.open_endpoints(vm)):
            with endpoint:
                counted = () if manifest is None else _rules(endpoint, manifest, number == 0)
                yield _reading(endpoint, counted)


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
    meta = maps.meta()
    from_vm = to_vm = None
    # The interface may be gone, or go at this moment: it is not attached then.
    with contextlib.suppress(OSError, VgwError):
        ifindex = socket.if_nametoindex(endpoint.interface)
        from_vm = endpoint.attachment(ifindex, Path.FROM_VM)
        to_vm = endpoint.attachment(ifindex, Path.TO_VM)
    return EndpointReading(
        vm=endpoint.vm,
        interface=endpoint.interface,
        generation=maps.config().generation,
        attached=from_vm is not None and to_vm is not None,
        hook=from_vm.hook if from_vm is not None else "",
        mode=from_vm.mode if from_vm is not None else "",
        stats=maps.stats(),
        conntrack_entries=meta.entries,
        conntrack_max=maps.conntrack_max(),
        new_connections={
            direction: meta.created[path] for direction, path in PATH_OF_DIRECTION.items()
        },
        events=maps.event_meter().sent,
        rules=rules,
    )


def _rules(endpoint: OpenEndpoint, manifest: Manifest, first: bool) -> tuple[RuleReading, ...]:
    """Return the counts of the rules in force.

    What counters that are gone had counted is remembered for the whole VM; it is shown with the
    VM's first interface, so that sums over interfaces are right.
    """
    entries = [entry for entry in manifest.rules.values() if entry.current]
    counters = endpoint.maps.rule_counters([entry.id for entry in entries])
    found: list[RuleReading] = []
    for entry in entries:
        packets = counters[entry.id].packets if entry.id in counters else 0
        if first and entry.id in manifest.carried:
            packets += manifest.carried[entry.id][0]
        found.append(RuleReading(entry.direction, entry.policy, entry.name, packets))
    return tuple(found)
