# SPDX-License-Identifier: Apache-2.0
"""Random rules, and headers on both sides of every boundary that the rules have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from tests.policy.brute_force import Headers, is_foreign_icmp, make_headers, own_icmp
from vgw.abi import Action
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    PORT_PROTOCOLS,
    TIERS,
    Direction,
    EffectiveRule,
    Network,
    Service,
)

PROTOCOLS = (6, 17, 132, 1, 58, 47, 50, 0, 255)
WIDTH = {4: 32, 6: 128}


class World:
    """A seeded source of rules and headers; `crowded`: their addresses are near each other."""

    def __init__(self, seed: int, *, crowded: bool = False) -> None:
        self.rng = random.Random(seed)
        self.crowded = crowded

    def rules(
        self, count: int, direction: Direction = Direction.INGRESS
    ) -> tuple[EffectiveRule, ...]:
        """Return rules of all tiers, some of them PASS, sorted by tier."""
        rng = self.rng
        tiers = sorted(rng.choices(range(len(TIERS)), k=count))
        actions = (Action.ACCEPT, Action.DROP, Action.REJECT, Action.PASS)
        return tuple(
            EffectiveRule(
                direction=direction,
                tier=TIERS[tier],
                policy="p",
                name=f"r{number}",
                action=rng.choices(actions, (4, 4, 1, 1))[0],
                peers=self.networks(),
                local=self.networks() if rng.random() < 0.4 else ANYWHERE,
                services=tuple(self.service() for _ in range(rng.choice((1, 1, 1, 3)))),
                source_ports=(self.ports(),) if rng.random() < 0.15 else (),
                log=rng.random() < 0.1,
            )
            for number, tier in enumerate(tiers)
        )

    def networks(self) -> tuple[Network, ...]:
        kind = self.rng.random()
        if kind < 0.1:
            return ANYWHERE
        if kind < 0.12:
            return ()
        return tuple(self.network() for _ in range(self.rng.choice((1, 1, 1, 2, 5))))

    def network(self) -> Network:
        version = self.rng.choice((4, 4, 6))
        length = self.rng.choice((0, 1, 8, 12, 16, 20, 24, 24, 28, 31, 32))
        if version == 6:
            length = self.rng.choice((0, 3, 32, 48, 56, 64, 64, 80, 96, 112, 127, 128))
        mask = (1 << WIDTH[version]) - (1 << WIDTH[version] - length)
        address = self.address(version) & mask
        return IPv4Network((address, length)) if version == 4 else IPv6Network((address, length))

    def address(self, version: int) -> int:
        rng = self.rng
        if version == 4:
            base = (
                10 << 24 | 20 << 16
                if self.crowded
                else rng.choice((10, 10, 172, 192, 255, 0)) << 24
            )
            return base | rng.getrandbits(16 if self.crowded else 24) & rng.getrandbits(24)
        base = 0x20010DB8 << 96
        if not self.crowded:
            base = rng.choice((base, base, 0xFE80 << 112, 0, (1 << 128) - (1 << 100)))
        return base | rng.getrandbits(96) & rng.getrandbits(96) & rng.getrandbits(96)

    def service(self) -> Service:
        kind = self.rng.random()
        if kind < 0.1:
            return ANY_SERVICE
        if kind < 0.2:
            return Service(self.rng.choice(PROTOCOLS))
        if kind < 0.3:
            code = self.rng.choice((None, 0, 1, 255))
            return Service(self.rng.choice((1, 58)), None, self.rng.choice((0, 3, 8, 128)), code)
        return Service(self.rng.choice((6, 6, 17, 132)), self.ports())

    def ports(self) -> tuple[int, int]:
        first = self.rng.choice((1, 22, 53, 80, 443, 1024, 65535, self.rng.randint(1, 65535)))
        last = self.rng.choice((first, first, first + 1, 1023, 65535, self.rng.randint(1, 65535)))
        return min(first, last), min(65535, max(first, last))

    def headers(self, rules: Sequence[EffectiveRule], version: int, count: int) -> Headers:
        """Return headers whose fields are at a boundary of some rule, or anything."""
        rows = []
        for _ in range(count):
            peers, local, third = (self.rng.choice(rules) if rules else None for _ in range(3))
            if self.rng.random() < 0.5:
                local = third = peers  # all fields of one rule, so that deep matches are met
            protocol, sport, dport, icmp = self.transport(third, version)
            rows.append(
                (
                    self.near(version, peers.peers if peers else ()),
                    self.near(version, local.local if local else ()),
                    protocol,
                    sport,
                    dport,
                    icmp,
                )
            )
        return make_headers(version, rows)

    def near(self, version: int, networks: Sequence[Network]) -> int:
        """Return an address on, inside or beside a boundary of a network."""
        mine = [network for network in networks if network.version == version]
        if not mine or self.rng.random() < 0.1:
            return self.address(version)
        network = self.rng.choice(mine)
        first, last = int(network.network_address), int(network.broadcast_address)
        chosen = self.rng.choice((first - 1, first, last, last + 1, self.rng.randint(first, last)))
        return chosen % (1 << WIDTH[version])

    def transport(self, rule: EffectiveRule | None, version: int) -> tuple[int, int, int, int]:
        """Return (protocol, source port, destination port, ICMP type and code or -1)."""
        rng = self.rng
        service = rng.choice(rule.services) if rule else ANY_SERVICE
        protocol = service.protocol if service.protocol is not None else rng.choice(PROTOCOLS)
        if rng.random() < 0.1:
            protocol = rng.choice(PROTOCOLS)
        if protocol == own_icmp(version):
            kind = service.icmp_type if service.icmp_type is not None else rng.choice((8, 128, 0))
            code = service.icmp_code or 0
            kind, code = (
                (kind + rng.choice((0, 0, 0, 1))) & 0xFF,
                (code + rng.choice((0, 0, 1))) & 0xFF,
            )
            return protocol, 0, 0, kind << 8 | code
        if protocol not in PORT_PROTOCOLS or is_foreign_icmp(version, protocol):
            return protocol, 0, 0, -1
        source = rule.source_ports[0] if rule and rule.source_ports else (1024, 65535)
        return protocol, self.port(*source), self.port(*(service.ports or (1, 65535))), -1

    def port(self, first: int, last: int) -> int:
        chosen = self.rng.choice((first - 1, first, last, last + 1, self.rng.randint(first, last)))
        return min(max(chosen, 1), 65535)
