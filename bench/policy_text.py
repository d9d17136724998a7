# SPDX-License-Identifier: Apache-2.0
"""Rule sets as the text of a `vgw/v1` policy file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.rulesets import POLICY
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    Direction,
    EffectiveRule,
    Network,
    Service,
)

_PEERS: Final = {Direction.INGRESS: "from", Direction.EGRESS: "to"}
_PROTOCOLS: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The VM a policy is for and its one interface as the host names it."""

    vm: str
    interface: str
    mac: str
    addresses: tuple[str, ...]
    conntrack_max: int


def policy_text(
    rules: Sequence[EffectiveRule], endpoint: Endpoint, direction: Direction = Direction.INGRESS
) -> str:
    """Return a policy in which these rules, and none else, judge one direction.

    The other one is accepted. Of rules from the VM on, peers are still the network's side.
    """
    other = Direction.EGRESS if direction is Direction.INGRESS else Direction.INGRESS
    addresses = ", ".join(f'"{address}"' for address in endpoint.addresses)
    lines = [
        "schema: vgw/v1",
        "vms:",
        f"  {endpoint.vm}:",
        "    interfaces:",
        f"      - name: {endpoint.interface}",
        f"        mac: {endpoint.mac}",
        f"        addresses: [{addresses}]",
        f"        conntrack_max: {endpoint.conntrack_max}",
        "policies:",
        f"  - name: {POLICY}",
        "    tier: group",
        "    applies_to: {all: true}",
        f"    {direction}:",
        *(f"      - {{{', '.join(_fields(rule, direction))}}}" for rule in rules),
        f"defaults: {{{direction}: drop, {other}: accept}}",
    ]
    return "\n".join(lines) + "\n"


def _fields(rule: EffectiveRule, direction: Direction) -> Iterator[str]:
    yield f"name: {rule.name}"
    yield f"action: {rule.action.name.lower()}"
    if rule.peers != ANYWHERE:
        yield f"{_PEERS[direction]}: [{_networks(rule.peers)}]"
    if rule.local != ANYWHERE:
        yield f"local: [{_networks(rule.local)}]"
    if rule.services != (ANY_SERVICE,):
        yield f"services: [{', '.join(map(_service, rule.services))}]"
    if rule.source_ports:
        yield f"source_ports: [{', '.join(map(_range, rule.source_ports))}]"


def _networks(networks: tuple[Network, ...]) -> str:
    return ", ".join(f'"{network}"' for network in networks)


def _service(service: Service) -> str:
    if service.protocol is None:
        return "any"
    word = _PROTOCOLS[service.protocol]
    return f"{word}/any" if service.ports is None else f"{word}/{_range(service.ports)}"


def _range(span: tuple[int, int]) -> str:
    first, last = span
    return str(first) if first == last else f"{first}-{last}"
