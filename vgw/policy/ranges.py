# SPDX-License-Identifier: Apache-2.0
"""The rules of one direction as sets of numbers: what a lookup searches for in each field.

Addresses are numbers of their own family. A service is the protocol and the destination port, or
the type and code of ICMP; a source is the protocol and the source port (bpf/query.h makes the
same of packets). Many rules share a set, so sets have numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from vgw import abi
from vgw.policy.image import ADDRESS_STEPS, VALUE_STEPS
from vgw.policy.model import (
    ECHO_REQUEST,
    ICMP_PROTOCOLS,
    PORT_PROTOCOLS,
    TCP,
    UDP,
    EffectiveRule,
    Network,
    Service,
)

#: Inclusive range of values.
Range = tuple[int, int]
Ranges = tuple[Range, ...]

_BITS: Final = {4: 32, 6: 128}
_VALUE_BITS: Final = 32
#: Services and source ports of TCP and of UDP, which are most; bpf/policy.h knows them by these.
_FAMILIES: Final = ((TCP << 16, TCP << 16 | 0xFFFF), (UDP << 16, UDP << 16 | 0xFFFF))


@dataclass(frozen=True, slots=True)
class Search:
    """What the rules admit in one field of packets of one family.

    `of_rule[n]` is the number in `sets` of what rule n admits. `words` is the width of a value in
    words of 32 bits, `steps` how many a program takes behind the first table to find one. Values
    of each of `families` and those of none are searched for apart.
    """

    name: str
    words: int
    steps: int
    sets: list[Ranges] = field(default_factory=list)
    of_rule: list[int] = field(default_factory=list)
    families: tuple[Range, ...] = ()

    @property
    def whole(self) -> Ranges:
        """The set of all values."""
        return ((0, (1 << 32 * self.words) - 1),)

    def restricts(self) -> bool:
        """Tell whether any rule does not admit every value."""
        whole = self.whole
        return any(ranges != whole for ranges in self.sets)


def searches_of(rules: Sequence[EffectiveRule]) -> tuple[Search, ...]:
    """Return the searches of rules in the order of bpf/image.h."""
    found: list[Search] = []
    for version in (4, 6):
        for name, networks in (
            ("remote", [rule.peers for rule in rules]),
            ("local", [rule.local for rule in rules]),
        ):
            search = Search(f"{name} IPv{version}", _BITS[version] // 32, ADDRESS_STEPS)
            _number(search, networks, partial(_addresses, version))
            found.append(search)
    service = Search("service", 1, VALUE_STEPS, families=_FAMILIES)
    _number(service, [rule.services for rule in rules], _services)
    source = Search("source port", 1, VALUE_STEPS, families=_FAMILIES)
    _number(source, [rule.source_ports for rule in rules], _sources)
    return (*found, service, source)


def _number(search: Search, values: Sequence[Hashable], ranges_of: Callable[[Any], Ranges]) -> None:
    """Fill a search from one value of each rule; equal values and equal sets are numbered once."""
    by_identity: dict[int, int] = {}
    by_ranges: dict[Ranges, int] = {}
    for value in values:
        number = by_identity.get(id(value))
        if number is None:
            ranges = ranges_of(value)
            number = by_ranges.setdefault(ranges, len(by_ranges))
            if number == len(search.sets):
                search.sets.append(ranges)
            by_identity[id(value)] = number
        search.of_rule.append(number)


def merged(ranges: Iterable[Range]) -> Ranges:
    """Return the ranges sorted and disjoint, neighbours joined."""
    joined: list[Range] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def _addresses(version: int, networks: tuple[Network, ...]) -> Ranges:
    """Return the addresses of one family. IPv4-mapped addresses never come as IPv6 ones."""
    bits = _BITS[version]
    found: list[Range] = []
    for network in networks:
        if network.version == version:
            first = int(network.network_address)
            found.append((first, first | (1 << bits - network.prefixlen) - 1))
    return tuple(found) if len(found) < 2 else merged(found)


def _services(services: tuple[Service, ...]) -> Ranges:
    return merged(part for service in services for part in _service(service))


def _service(service: Service) -> list[Range]:
    protocol = service.protocol
    if protocol is None:
        ports = [(number << 16, number << 16 | 0xFFFF) for number in PORT_PROTOCOLS]
        echo = [
            (number << 16 | request << 8, number << 16 | request << 8 | 0xFF)
            for number, request in ECHO_REQUEST.items()
        ]
        return ports + echo
    base = protocol << 16
    if service.ports is not None:
        return [(base | service.ports[0], base | service.ports[1])]
    if service.icmp_type is not None:
        first = base | service.icmp_type << 8
        if service.icmp_code is None:
            return [(first, first | 0xFF)]
        return [(first | service.icmp_code, first | service.icmp_code)]
    whole = [(base, base | 0xFFFF)]
    if protocol in ICMP_PROTOCOLS:
        foreign = abi.SERVICE_FOREIGN_ICMP | base
        whole.append((foreign, foreign | 0xFFFF))
    return whole


def _sources(source_ports: tuple[tuple[int, int], ...]) -> Ranges:
    """Return the sources a rule admits; only TCP, UDP and SCTP are restricted by their ports."""
    greatest = (1 << _VALUE_BITS) - 1
    if not source_ports:
        return ((0, greatest),)
    ranges: list[Range] = []
    free = 0
    for protocol in sorted(PORT_PROTOCOLS):
        base = protocol << 16
        ranges.append((free, base - 1))
        ranges += [(base | first, base | last) for first, last in source_ports]
        free = base + 0x10000
    return merged([*ranges, (free, greatest)])
