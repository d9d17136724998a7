# SPDX-License-Identifier: Apache-2.0
"""An address added to a group that a large policy uses: from when on its packets pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from scripts.lab.wire import arp_request
from tests.controller import conftest as own_host
from tests.lab.swap_policies import PEER_MAC, VMS, mac_bytes
from tests.lab.swap_traffic import Traffic
from vgw import libbpf
from vgw.controller import change, images, reconcile
from vgw.controller.policy_store import PolicyStore
from vgw.controller.reconcile import Host
from vgw.maps import EndpointMaps
from vgw.policy.frame import build_frame
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

pytestmark = pytest.mark.lab

#: A host of its own for each test, gone afterwards.
netns, paths, host = own_host.netns, own_host.paths, own_host.host
tap = own_host.tap

RULES = 10_000
NEWCOMER, MEMBER, STRANGER = "198.51.100.7", "198.51.100.1", "198.51.100.8"
SERVICE = 4000
VM, INTERFACE = next(iter(VMS.items()))
#: What an apply is made of, in its order: where a function is looked up, and its name.
PARTS: list[tuple[Any, str]] = [
    (reconcile, "desired_state"),
    (change, "compile_policy"),
    (images, "_make"),
    (EndpointMaps, "stage"),
    (PolicyStore, "keep_names"),
    (EndpointMaps, "switch"),
    (libbpf, "wait_for_programs"),
    (EndpointMaps, "release"),
    (PolicyStore, "keep_matches"),
]


def large_policy(*, own: bool) -> PolicyDocument:
    """Return a policy with a group in each of its rules, the last of which is for the service.

    `own`: each rule has a network of its own besides.
    """
    more = ", 10.{}.{}.0/24" if own else ""
    rules = "\n".join(
        f"      - {{name: r{n}, action: accept, from: [members{more.format(n // 250, n % 250)}],"
        f" services: [tcp/{1000 + n % 5000}]}}"
        for n in range(RULES - 1)
    )
    text = f"""
schema: vgw/v1
vms:
  {VM}:
    interfaces:
      - {{name: {INTERFACE.name}, mac: '{INTERFACE.mac}', addresses: [{INTERFACE.address}]}}
groups: {{members: {{cidrs: [{MEMBER}]}}}}
policies:
  - name: large
    tier: vm
    applies_to: {{all: true}}
    ingress:
{rules}
      - {{name: last, action: accept, from: [members], services: [udp/{SERVICE}]}}
defaults: {{ingress: drop, egress: drop}}
"""
    return parse_sources([("policy.yaml", text)])


def with_newcomer(document: PolicyDocument) -> PolicyDocument:
    """Return the document with one address more in its group."""
    group = document.groups["members"]
    grown = replace(group, cidrs=(*group.cidrs, ip_network(NEWCOMER)))
    return replace(document, groups={**document.groups, "members": grown}, digest="grown")


def frame(address: str) -> bytes:
    return build_frame(
        {"src": address, "dst": INTERFACE.address, "proto": "udp", "dport": SERVICE, "length": 4},
        source_mac=mac_bytes(PEER_MAC),
        destination_mac=mac_bytes(INTERFACE.mac),
    )


def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, float]]]:
    """Note when each part of an apply begins and ends."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            begin = time.monotonic()
            try:
                return original(*arguments, **options)
            finally:
                found[name].append((begin, time.monotonic()))

        monkeypatch.setattr(owner, name, watched)

    for owner, name in PARTS:
        watch(owner, name)
    return found


@pytest.mark.parametrize("own", [False, True], ids=["group", "group and network"])
def test_an_address_added_to_a_group_of_a_large_policy_passes(
    host: Host, tap: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, *, own: bool
) -> None:
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    vm = tap(INTERFACE.name)
    document = large_policy(own=own)
    host.attach(document, VM)
    grown = with_newcomer(document)
    frames = {address: [frame(address)] for address in (NEWCOMER, MEMBER, STRANGER)}
    mark = arp_request(PEER_MAC, MEMBER, INTERFACE.address)
    parts = timed(monkeypatch)

    with Traffic(frames, mark, (INTERFACE.name, vm)) as running:
        begin = time.monotonic()
        host.apply(grown)
        end = time.monotonic()
        tally = running.stop()

    assert tally.arrived[MEMBER] == tally.sent[MEMBER]
    assert STRANGER not in tally.arrived
    assert 0 < tally.arrived[NEWCOMER] < tally.sent[NEWCOMER]
    switched = parts["switch"][0][1]
    assert tally.first[NEWCOMER] > parts["switch"][0][0]
    _show("apply", begin, end, begin)
    _show("until the switch", begin, switched, begin)
    _show("until the first packet", begin, tally.first[NEWCOMER], begin)
    for _, name in PARTS:
        for one in parts[name]:
            _show(name, *one, begin)


def _show(name: str, begin: float, end: float, start: float) -> None:
    """Print a time and when it began; seen with -s."""
    print(f"{name:24} {(end - begin) * 1000:8.1f} ms from {(begin - start) * 1000:8.1f}")
