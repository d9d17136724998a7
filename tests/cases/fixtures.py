# SPDX-License-Identifier: Apache-2.0
"""The endpoints and policies that the verdict tables start from."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

from tests.cases.table import Fixture
from tests.frames import PAIR4, PEER4, STRANGER4, VM4, VM6
from vgw.abi import Action, Mode
from vgw.policy.model import (
    ANY_SERVICE,
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    AllowedPair,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Guards,
    Interface,
    Network,
    Service,
    Tier,
)


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def ports(protocol: int, first: int, last: int | None = None) -> Service:
    return Service(protocol, ports=(first, first if last is None else last))


def ingress(name: str, action: Action, **fields: object) -> EffectiveRule:
    return _rule(Direction.INGRESS, name, action, fields)


def egress(name: str, action: Action, **fields: object) -> EffectiveRule:
    return _rule(Direction.EGRESS, name, action, fields)


def _rule(
    direction: Direction, name: str, action: Action, fields: dict[str, object]
) -> EffectiveRule:
    rule = EffectiveRule(direction, Tier.VM, "test", name, action)
    return replace(rule, **fields)  # type: ignore[arg-type]


def policy(*rules: EffectiveRule, ingress: Action, egress: Action) -> EffectivePolicy:
    """Return a policy of rules given in the order of evaluation, and its defaults."""
    return EffectivePolicy(
        "web01",
        tuple(rule for rule in rules if rule.direction is Direction.INGRESS),
        tuple(rule for rule in rules if rule.direction is Direction.EGRESS),
        Defaults(ingress, egress),
    )


GUARDED = Interface(
    name="tap-web01",
    mac="52:54:00:00:00:11",
    addresses=(ip_address(VM4), ip_address(VM6)),
    allowed_pairs=(
        AllowedPair(ip_network(PAIR4), "00:00:5e:00:01:01"),
        AllowedPair(ip_network("10.20.0.200/30")),
        AllowedPair(ip_network("2001:db8:20:8000::/65"), "00:00:5e:00:01:01"),
    ),
)
UNGUARDED = replace(GUARDED, guards=Guards(*[False] * 6))
NAMELESS = Interface(name="tap-unknown")
NO_MAC = replace(GUARDED, mac=None, allowed_pairs=())

ALL_ACCEPTED = policy(ingress=Action.ACCEPT, egress=Action.ACCEPT)
NOTHING_ACCEPTED = policy(ingress=Action.DROP, egress=Action.DROP)
#: What a file without `defaults` gives.
USUAL = policy(ingress=Action.DROP, egress=Action.ACCEPT)

SERVICES = policy(
    ingress("site", Action.ACCEPT, services=(ports(TCP, 80), ports(TCP, 443))),
    ingress("range", Action.ACCEPT, services=(ports(TCP, 8000, 8099),)),
    ingress("office", Action.ACCEPT, peers=networks("192.0.2.0/24"), services=(ports(TCP, 22),)),
    ingress("nope", Action.REJECT, services=(ports(TCP, 3306),)),
    ingress("dns", Action.ACCEPT, services=(ports(UDP, 53),)),
    ingress("diameter", Action.ACCEPT, services=(ports(SCTP, 3868),)),
    ingress(
        "ping",
        Action.ACCEPT,
        peers=networks("192.0.2.0/24", "2001:db8:1::/48"),
        services=(Service(ICMP, icmp_type=8), Service(ICMPV6, icmp_type=128)),
    ),
    egress("no-telnet", Action.DROP, services=(ports(TCP, 23),)),
    ingress=Action.DROP,
    egress=Action.ACCEPT,
)

OPEN = Fixture("open", GUARDED, ALL_ACCEPTED)
UNGUARDED_OPEN = Fixture("unguarded", UNGUARDED, ALL_ACCEPTED)
CLOSED = Fixture("closed", GUARDED, NOTHING_ACCEPTED)
TYPICAL = Fixture("typical", GUARDED, USUAL)
TRUNK = Fixture("trunk", replace(GUARDED, vlans=(100, 4094)), ALL_ACCEPTED)
NAMELESS_OPEN = Fixture("nameless", NAMELESS, ALL_ACCEPTED)
NO_MAC_OPEN = Fixture("no-mac", NO_MAC, ALL_ACCEPTED)
SERVER = Fixture("server", GUARDED, SERVICES)
WATCHED = Fixture("watched", GUARDED, SERVICES, Mode.MONITOR)
CUT_OFF = Fixture("cut-off", GUARDED, ALL_ACCEPTED, Mode.QUARANTINE)

OTHER_PROTOCOLS = Fixture(
    "protocols",
    GUARDED,
    policy(
        egress("gre", Action.ACCEPT, services=(Service(47),)),
        egress("esp", Action.ACCEPT, services=(Service(50), Service(51))),
        egress("all-tcp", Action.ACCEPT, peers=networks(PEER4), services=(Service(TCP),)),
        egress("all-icmp", Action.ACCEPT, services=(Service(ICMP), Service(ICMPV6))),
        egress("zero", Action.ACCEPT, peers=networks(STRANGER4), services=(Service(0),)),
        egress("rest", Action.ACCEPT, services=(ANY_SERVICE,)),
        ingress=Action.DROP,
        egress=Action.DROP,
    ),
)
