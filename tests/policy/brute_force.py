# SPDX-License-Identifier: Apache-2.0
"""Many headers judged by many rules at once, the plain way: every rule is asked about every header.

It reads rules as the policy language defines them, and shares nothing with what compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vgw.abi import Action
from vgw.policy.model import (
    ECHO_REQUEST,
    ICMP_PROTOCOLS,
    PORT_PROTOCOLS,
    TIERS,
    EffectiveRule,
    Network,
    Service,
)

Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.uint64]
LOW_BITS = (1 << 64) - 1
NO_MATCH = -1


@dataclass(frozen=True)
class Headers:
    """Columns of headers of one IP version; ports are 0 where the protocol has none.

    `remote` and `local` have two columns: high and low half, of IPv4 only the low one is used.
    `icmp` is type << 8 | code, -1 where the header is not of the version's own ICMP.
    """

    version: int
    remote: Numbers
    local: Numbers
    protocol: Numbers
    sport: Numbers
    dport: Numbers
    icmp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.protocol)

    def recombined(self, times: int, seed: int) -> Headers:
        """Return so many times as many headers: addresses and transport of different ones."""
        rng = np.random.default_rng(seed)
        remote, local, transport = (rng.integers(len(self), size=times * len(self)) for _ in "rlt")
        return Headers(
            self.version,
            self.remote[remote],
            self.local[local],
            self.protocol[transport],
            self.sport[transport],
            self.dport[transport],
            self.icmp[transport],
        )

    def ordinary(self) -> Bools:
        """Tell of which headers `any` and the defaults speak."""
        found = np.isin(self.protocol, list(PORT_PROTOCOLS))
        for protocol, request in ECHO_REQUEST.items():
            found |= (self.protocol == protocol) & (self.icmp >> 8 == request) & (self.icmp >= 0)
        return found


def make_headers(
    version: int,
    rows: Sequence[tuple[int, int, int, int, int, int]],
) -> Headers:
    """Make columns of rows of (remote, local, protocol, sport, dport, icmp)."""

    def halves(column: int) -> Numbers:
        values = [row[column] for row in rows]
        return np.array([(v >> 64, v & LOW_BITS) for v in values], np.uint64).reshape(-1, 2)

    def plain(column: int) -> Numbers:
        return np.array([row[column] for row in rows], np.uint64)

    icmp = np.array([row[5] for row in rows], np.int64)
    return Headers(version, halves(0), halves(1), plain(2), plain(3), plain(4), icmp)


def first_matches(rules: Sequence[EffectiveRule], headers: Headers) -> npt.NDArray[np.int64]:
    """Return the number of the rule that decides about each header, NO_MATCH where none does."""
    found = np.full(len(headers), NO_MATCH, np.int64)
    for tier in TIERS:
        left = found == NO_MATCH
        for number, rule in enumerate(rules):
            if rule.tier is not tier or not left.any():
                continue
            hit = left & matches(rule, headers)
            if rule.action is not Action.PASS:
                found[hit] = number
            left &= ~hit
    return found


def matches(rule: EffectiveRule, headers: Headers) -> Bools:
    return (
        within(rule.peers, headers.version, headers.remote)
        & within(rule.local, headers.version, headers.local)
        & served(rule.services, headers)
        & from_source(rule.source_ports, headers)
    )


def within(networks: Sequence[Network], version: int, addresses: Numbers) -> Bools:
    found = np.zeros(len(addresses), bool)
    for network in networks:
        if network.version == version:
            base, mask = int(network.network_address), int(network.netmask)
            high = (addresses[:, 0] & np.uint64(mask >> 64)) == np.uint64(base >> 64)
            low = (addresses[:, 1] & np.uint64(mask & LOW_BITS)) == np.uint64(base & LOW_BITS)
            found |= high & low
    return found


def served(services: Sequence[Service], headers: Headers) -> Bools:
    found = np.zeros(len(headers), bool)
    for service in services:
        if service.protocol is None:
            found |= headers.ordinary()
            continue
        hit = headers.protocol == service.protocol
        if service.ports is not None:
            hit &= (headers.dport >= service.ports[0]) & (headers.dport <= service.ports[1])
        if service.icmp_type is not None:
            hit &= (headers.icmp >= 0) & (headers.icmp >> 8 == service.icmp_type)
            if service.icmp_code is not None:
                hit &= headers.icmp & 0xFF == service.icmp_code
        found |= hit
    return found


def from_source(ranges: Sequence[tuple[int, int]], headers: Headers) -> Bools:
    if not ranges:
        return np.ones(len(headers), bool)
    found = ~np.isin(headers.protocol, list(PORT_PROTOCOLS))
    for first, last in ranges:
        found |= (headers.sport >= first) & (headers.sport <= last)
    return found


def own_icmp(version: int) -> int:
    """Return the protocol number of an IP version's own ICMP."""
    return 1 if version == 4 else 58


def is_foreign_icmp(version: int, protocol: int) -> bool:
    return protocol in ICMP_PROTOCOLS and protocol != own_icmp(version)
