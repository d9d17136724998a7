# SPDX-License-Identifier: Apache-2.0
"""Random policies: the compiled image and the evaluator's plain first match name the same rule."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from tests.cases.fixtures import UNGUARDED
from tests.engines import EvaluatorEngine
from tests.frames import ICMP, ICMPV6, IN, OUT, SCTP, TCP, UDP, icmp, sctp, tcp, udp
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.abi import Action, Mode, Path
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Hook,
    Network,
    Service,
    Tier,
)

pytestmark = pytest.mark.bpf

PACKETS = 250
#: Numbers of rules of both directions together; bit vectors have 512 bits a block and tier.
SIZES = (0, 1, 2, 10, 60, 200, 512, 6000)
#: Small worlds, so that rules and packets meet; the ends are where ranges go wrong.
PORTS = (1, 2, 79, 80, 81, 1023, 1024, 8000, 8099, 65534, 65535)
ACTIONS = (Action.ACCEPT, Action.DROP, Action.REJECT, Action.PASS)
DEFAULTS = (Action.ACCEPT, Action.DROP, Action.REJECT)


class World:
    """Random rules and packets over few addresses, ports and protocols."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def policy(self, size: int) -> EffectivePolicy:
        rules = [self._rule(number) for number in range(size)]
        rules.sort(key=lambda rule: list(Tier).index(rule.tier))
        return EffectivePolicy(
            "vm",
            tuple(rule for rule in rules if rule.direction is Direction.INGRESS),
            tuple(rule for rule in rules if rule.direction is Direction.EGRESS),
            Defaults(self.pick.choice(DEFAULTS), self.pick.choice(DEFAULTS)),
        )

    def packet(self) -> tuple[Path, bytes]:
        wire = self.pick.choice((IN, OUT))
        is_ipv6 = self.pick.random() < 0.4
        segment, protocol = self._segment(is_ipv6)
        local, remote = self._address(is_ipv6), self._address(is_ipv6)
        return wire.path, wire.wrap(segment, protocol, str(local), str(remote))

    def _rule(self, number: int) -> EffectiveRule:
        services = tuple(self._service() for _ in range(self.pick.randrange(1, 4)))
        has_ports = all(service.protocol in {TCP, UDP, SCTP} for service in services)
        return EffectiveRule(
            direction=self.pick.choice(tuple(Direction)),
            tier=self.pick.choice(tuple(Tier)),
            policy="random",
            name=f"rule-{number}",
            action=self.pick.choice(ACTIONS),
            peers=self._networks(),
            local=self._networks() if self.pick.random() < 0.3 else ANYWHERE,
            services=services,
            source_ports=(self._range(),) if has_ports and self.pick.random() < 0.3 else (),
        )

    def _networks(self) -> tuple[Network, ...]:
        if self.pick.random() < 0.2:
            return self.pick.choice((ANYWHERE, ANYWHERE[:1], ANYWHERE[1:], ()))
        return tuple(self._network() for _ in range(self.pick.randrange(1, 6)))

    def _network(self) -> Network:
        is_ipv6 = self.pick.random() < 0.4
        address = self._address(is_ipv6)
        lengths = (
            (1, 16, 48, 63, 64, 65, 112, 127, 128) if is_ipv6 else (1, 8, 23, 24, 25, 30, 31, 32)
        )
        return ip_network((address, self.pick.choice(lengths)), strict=False)

    def _address(self, is_ipv6: bool) -> IPv4Address | IPv6Address:
        low = self.pick.choice((0, 1, 2, 3, 127, 128, 254, 255))
        middle = self.pick.choice((0, 1, 255))
        if is_ipv6:
            top = self.pick.choice((0x20010DB8, 0xFD000000, 0x3FFFFFFF))
            return IPv6Address(top << 96 | middle << 64 | low)
        return IPv4Address(self.pick.choice((10, 127, 128, 223)) << 24 | middle << 8 | low)

    def _range(self) -> tuple[int, int]:
        first, last = sorted((self.pick.choice(PORTS), self.pick.choice(PORTS)))
        return first, last

    def _service(self) -> Service:
        kind = self.pick.random()
        if kind < 0.15:
            return ANY_SERVICE
        if kind < 0.7:
            ports = self._range() if self.pick.random() < 0.9 else None
            return Service(self.pick.choice((TCP, UDP, SCTP)), ports=ports)
        if kind < 0.9:
            code = self.pick.choice((None, 0, 255))
            icmp_type = self.pick.choice((0, 8, 13, 128, 129, 139, 255))
            return Service(self.pick.choice((ICMP, ICMPV6)), icmp_type=icmp_type, icmp_code=code)
        return Service(self.pick.choice((0, ICMP, 47, ICMPV6, 255)))

    def _segment(self, is_ipv6: bool) -> tuple[bytes, int]:
        sport, dport = self.pick.choice(PORTS), self.pick.choice(PORTS)
        kind = self.pick.random()
        if kind < 0.4:
            return tcp(sport, dport), TCP
        if kind < 0.65:
            return self.pick.choice(((udp(sport, dport), UDP), (sctp(sport, dport), SCTP)))
        if kind < 0.9:
            icmp_type = self.pick.choice((0, 8, 13, 128, 129, 139))
            message = icmp(icmp_type, self.pick.choice((0, 1, 255)), 7 << 16, bytes(8))
            family = ICMPV6 if is_ipv6 else ICMP
            return message, self.pick.choice((family, family, family, ICMP, ICMPV6))
        # 0 is hop-by-hop in IPv6, which is another table's subject.
        return bytes(8), self.pick.choice((47, 50, 255))


@pytest.mark.parametrize("size", SIZES)
def test_random_policies(artefact: loader.Artefact, size: int) -> None:
    world = World(size)
    facts = endpoint_facts(replace(UNGUARDED, conntrack_max=1024), Mode.ENFORCE)
    policy = world.policy(size)
    program = ProgramEngine(artefact, world.pick.choice((Hook.XDP, Hook.TC)), facts, policy)
    model = EvaluatorEngine(facts, policy)
    rules = set()
    try:
        for number in range(PACKETS):
            path, frame = world.packet()
            program.reset()
            model.reset()
            got, said = program.judge(path, frame), model.judge(path, frame)
            assert got == said, f"packet {number}, {path.name} {frame.hex()}"
            rules.add(said.rule_key)
    finally:
        program.close()
    assert len(rules) >= min(size, 5)
