# SPDX-License-Identifier: Apache-2.0
"""Headers of packets to look up in a rule set: hitting no rule for sure, rules, or a few flows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Final, NamedTuple

from bench.prefixes import WIDTH, unicast
from vgw.policy.model import (
    ANY_SERVICE,
    ECHO_REQUEST,
    ICMP_PROTOCOLS,
    TCP,
    EffectiveRule,
    Network,
    Service,
)

TRACES: Final = ("random", "shuffled", "hot")
_HOT_FLOWS: Final = 16
_PORTS: Final = (1, 65535)


class Header(NamedTuple):
    """The fields that rules toward a VM look at, all numbers.

    `remote` is the source, `local` the destination (the VM's side), `protocol` the IP protocol.
    Of ICMP, `sport` is 0 and `dport` is type << 8 | code.
    """

    version: int
    remote: int
    local: int
    protocol: int
    sport: int
    dport: int


def headers(
    trace: str, rules: Sequence[EffectiveRule], version: int, count: int, seed: int = 1
) -> list[Header]:
    """Return `count` headers made for a rule set of one IP version.

    `trace` says how. random: each field is inside that field of some rule, of another rule for each
    field, so all fields are known but mostly no rule matches. shuffled: each header is inside all
    fields of one rule, which a rule before it may also match. hot: 16 such headers over and over.
    """
    rng = random.Random(f"{seed} {trace} {version} {len(rules)}")  # noqa: S311 - repeatable
    if trace == "random":
        return [_header(rng, version, *(rng.choice(rules) for _ in range(3))) for _ in range(count)]
    flows = _HOT_FLOWS if trace == "hot" else count
    inside = [_header(rng, version, *[rng.choice(rules)] * 3) for _ in range(flows)]
    return list(islice(cycle(inside), count))


def _header(
    rng: random.Random,
    version: int,
    remote: EffectiveRule,
    local: EffectiveRule,
    traffic: EffectiveRule,
) -> Header:
    """Draw a header whose fields are inside those of the given rules."""
    protocol, sport, dport = _traffic(rng, traffic)
    return Header(
        version,
        _address(rng, version, remote.peers),
        _address(rng, version, local.local),
        protocol,
        sport,
        dport,
    )


def _address(rng: random.Random, version: int, networks: tuple[Network, ...]) -> int:
    network = next(network for network in networks if network.version == version)
    if network.prefixlen == 0:
        # A multicast address would be judged before any rule.
        return unicast(rng, version)
    free = WIDTH[version] - network.prefixlen
    return int(network.network_address) | rng.getrandbits(free)


def _traffic(rng: random.Random, rule: EffectiveRule) -> tuple[int, int, int]:
    """Return (protocol, source port, destination port) of a packet that a rule's service covers."""
    service = rule.services[0]
    if service == ANY_SERVICE:
        service = Service(TCP, _PORTS)
    protocol = service.protocol or TCP
    if protocol in ICMP_PROTOCOLS:
        return protocol, 0, ECHO_REQUEST[protocol] << 8
    first, last = rule.source_ports[0] if rule.source_ports else _PORTS
    low, high = service.ports or _PORTS
    return protocol, rng.randint(first, last), rng.randint(low, high)
