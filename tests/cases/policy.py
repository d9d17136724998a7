# SPDX-License-Identifier: Apache-2.0
"""Verdict table of the rules: tiers, pass, peers, services, ranges at both ends, defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.cases.fixtures import (
    CUT_OFF,
    GUARDED,
    SERVER,
    TYPICAL,
    WATCHED,
    egress,
    ingress,
    networks,
    policy,
    ports,
)
from tests.cases.table import (
    DEFAULT,
    DENIED,
    Case,
    Expected,
    Fixture,
    Rows,
    accepted,
    by_rule,
    dropped,
)
from tests.frames import (
    ICMP,
    ICMPV6,
    IN,
    OTHER_VM_MAC,
    OUT,
    PEER4,
    PEER6,
    SCTP,
    STRANGER4,
    STRANGER6,
    TCP,
    UDP,
    VM4,
    VM6,
    Wire,
    arp,
    echo,
    icmp,
    sctp,
    tcp,
    udp,
)
from vgw.abi import Action, Path, Reason, Verdict
from vgw.policy.model import ANY_SERVICE, EffectiveRule, Service, Tier

ACCEPT, DROP, REJECT, PASS = Action.ACCEPT, Action.DROP, Action.REJECT, Action.PASS
SERVER_ROWS, USUAL_ROWS = Rows(SERVER), Rows(TYPICAL)
PROTOCOL = dropped(Reason.PROTOCOL)
REJECTED = by_rule("nope", Verdict.REJECT)


def _services() -> Iterator[Case]:
    rows: dict[str, tuple[bytes, int, Expected]] = {
        "TCP 443": (tcp(dport=443), TCP, by_rule("site")),
        "TCP 80": (tcp(dport=80), TCP, by_rule("site")),
        "TCP 79": (tcp(dport=79), TCP, DENIED),
        "TCP 81": (tcp(dport=81), TCP, DENIED),
        "TCP 442": (tcp(dport=442), TCP, DENIED),
        "TCP 444": (tcp(dport=444), TCP, DENIED),
        "TCP 7999, below the range": (tcp(dport=7999), TCP, DENIED),
        "TCP 8000, first of the range": (tcp(dport=8000), TCP, by_rule("range")),
        "TCP 8050": (tcp(dport=8050), TCP, by_rule("range")),
        "TCP 8099, last of the range": (tcp(dport=8099), TCP, by_rule("range")),
        "TCP 8100, above the range": (tcp(dport=8100), TCP, DENIED),
        "TCP 3306 is rejected": (tcp(dport=3306), TCP, REJECTED),
        "TCP from 443": (tcp(443, 40000), TCP, DENIED),
        "UDP 443": (udp(dport=443), UDP, DENIED),
        "UDP 53": (udp(dport=53), UDP, by_rule("dns")),
        "TCP 53": (tcp(dport=53), TCP, DENIED),
        "SCTP 53": (sctp(dport=53), SCTP, DENIED),
        "SCTP 443": (sctp(dport=443), SCTP, DENIED),
        "I5 SCTP 3868": (sctp(dport=3868), SCTP, by_rule("diameter")),
        "I5 SCTP 3869": (sctp(dport=3869), SCTP, DENIED),
        "TCP 3868": (tcp(dport=3868), TCP, DENIED),
    }
    for name, (segment, protocol, expected) in rows.items():
        yield SERVER_ROWS.into(f"{name}, IPv4", IN.wrap4(segment, protocol), expected)
        yield SERVER_ROWS.into(f"{name}, IPv6", IN.wrap6(segment, protocol), expected)
    yield SERVER_ROWS.out(
        "egress TCP 23", OUT.wrap4(tcp(dport=23), TCP), by_rule("no-telnet", Verdict.DROP)
    )
    yield SERVER_ROWS.out("egress UDP 23", OUT.wrap4(udp(dport=23), UDP), DEFAULT)
    yield SERVER_ROWS.out("egress TCP 443 has no ingress rule's name", OUT.wrap4(tcp(), 6), DEFAULT)


def _peers() -> Iterator[Case]:
    sources = {
        "192.0.2.0": True,
        "192.0.2.255": True,
        "192.0.1.255": False,
        "192.0.3.0": False,
        "2001:db8:1::10": False,
    }
    for source, inside in sources.items():
        local = VM6 if ":" in source else VM4
        frame = IN.wrap(tcp(dport=22), TCP, local, source)
        yield SERVER_ROWS.into(f"ops from {source}", frame, by_rule("office") if inside else DENIED)
    rows = {
        "ping from the office": (IN.wrap4(echo(8), ICMP), by_rule("ping")),
        "ping6 from the office": (IN.wrap6(echo(128), ICMPV6), by_rule("ping")),
        "ping from a stranger": (IN.wrap4(echo(8), ICMP, remote=STRANGER4), DENIED),
        "ping6 from a stranger": (IN.wrap6(echo(128), 58, remote=STRANGER6), DENIED),
        "H13 timestamp from the office": (IN.wrap4(icmp(13), ICMP), PROTOCOL),
    }
    for name, (frame, expected) in rows.items():
        yield SERVER_ROWS.into(name, frame, expected)
    lengths = policy(
        ingress("host", ACCEPT, peers=networks("192.0.2.10/32")),
        ingress("half", ACCEPT, peers=networks("128.0.0.0/1")),
        ingress("host6", ACCEPT, peers=networks("2001:db8:1::10/128")),
        ingress("odd6", ACCEPT, peers=networks("2001:db8:1:8000::/49", "fd00::/8")),
        ingress("all4", ACCEPT, peers=networks("0.0.0.0/0")),
        ingress=DROP,
        egress=DROP,
    )
    rows_of = Rows(Fixture("prefix lengths", GUARDED, lengths))
    peers = {
        "192.0.2.10": by_rule("host"),
        "192.0.2.11": by_rule("half"),
        "128.0.0.0": by_rule("half"),
        "255.255.255.254": by_rule("half"),
        "127.255.255.255": by_rule("all4"),
        "0.0.0.1": by_rule("all4"),
        "2001:db8:1::10": by_rule("host6"),
        "2001:db8:1::11": DENIED,
        "2001:db8:1:8000::": by_rule("odd6"),
        "2001:db8:1:7fff:ffff:ffff:ffff:ffff": DENIED,
        "fdff::1": by_rule("odd6"),
        "fe00::1": DENIED,
        "::192.0.2.10": DENIED,
        "::": DENIED,
    }
    for peer, expected in peers.items():
        local = VM6 if ":" in peer else VM4
        yield rows_of.into(f"prefix of {peer}", IN.wrap(tcp(), TCP, local, peer), expected)


def _tier(tier: Tier, name: str, action: Action, service: Service) -> EffectiveRule:
    return replace(ingress(name, action, services=(service,)), tier=tier)


def _tiers() -> Iterator[Case]:
    tiers = policy(
        _tier(Tier.ADMIN, "admin-pass-web", PASS, ports(TCP, 80)),
        _tier(Tier.ADMIN, "admin-unreached", DROP, ports(TCP, 80, 81)),
        _tier(Tier.ADMIN, "admin-ssh", DROP, ports(TCP, 22)),
        _tier(Tier.ADMIN, "admin-pass-all", PASS, ports(TCP, 9000, 9100)),
        _tier(Tier.GROUP, "group-web", ACCEPT, ports(TCP, 80)),
        _tier(Tier.GROUP, "group-ssh", ACCEPT, ports(TCP, 22)),
        _tier(Tier.GROUP, "group-pass", PASS, ports(TCP, 9001, 9002)),
        _tier(Tier.GROUP, "group-9002", DROP, ports(TCP, 9002)),
        _tier(Tier.VM, "vm-9001", REJECT, ports(TCP, 9001)),
        _tier(Tier.VM, "vm-pass", PASS, ports(TCP, 9002)),
        _tier(Tier.BASELINE, "base-9002", ACCEPT, ports(TCP, 9002)),
        _tier(Tier.BASELINE, "base-pass", PASS, ports(TCP, 9003)),
        _tier(Tier.BASELINE, "base-unreached", ACCEPT, ports(TCP, 9003)),
        ingress=DROP,
        egress=ACCEPT,
    )
    rows = Rows(Fixture("tiers", GUARDED, tiers))
    expected = {
        80: by_rule("group-web"),
        81: by_rule("admin-unreached", Verdict.DROP),
        22: by_rule("admin-ssh", Verdict.DROP),
        9000: DENIED,
        9001: by_rule("vm-9001", Verdict.REJECT),
        9002: by_rule("base-9002"),
        9003: DENIED,
        9100: DENIED,
        25: DENIED,
    }
    for port, outcome in expected.items():
        yield rows.into(f"tiers, port {port}", IN.wrap4(tcp(dport=port), TCP), outcome)


def _order() -> Iterator[Case]:
    first_wins = policy(
        ingress("narrow", ACCEPT, peers=networks("192.0.2.10/32"), services=(ports(TCP, 80),)),
        ingress("wide-drop", DROP, peers=networks("192.0.2.0/24")),
        ingress("shadowed", ACCEPT, peers=networks("192.0.2.11/32"), services=(ports(TCP, 80),)),
        ingress("rest", ACCEPT, services=(ports(TCP, 1, 65535),)),
        ingress=DROP,
        egress=DROP,
    )
    rows = Rows(Fixture("order", GUARDED, first_wins))
    wide = by_rule("wide-drop", Verdict.DROP)
    table = {
        "N5 narrow before wide": (PEER4, tcp(dport=80), TCP, by_rule("narrow")),
        "N5 wide by port": (PEER4, tcp(dport=81), TCP, wide),
        "N5 shadowed": ("192.0.2.11", tcp(dport=80), TCP, wide),
        "N5 wide, UDP": ("192.0.2.11", udp(), UDP, wide),
        "N5 wide, echo": ("192.0.2.11", echo(8), ICMP, wide),
        "N5 wide, GRE": ("192.0.2.11", bytes(8), 47, PROTOCOL),
        "N5 rest": (STRANGER4, tcp(dport=81), TCP, by_rule("rest")),
        "N5 rest, first port": (STRANGER4, tcp(dport=1), TCP, by_rule("rest")),
        "N5 rest, last port": (STRANGER4, tcp(dport=65535), TCP, by_rule("rest")),
        "N5 rest, UDP": (STRANGER4, udp(), UDP, DENIED),
    }
    for name, (peer, segment, protocol, expected) in table.items():
        yield rows.into(name, IN.wrap4(segment, protocol, remote=peer), expected)


def _icmp_rules() -> Iterator[Case]:
    rules = policy(
        egress("timestamp", ACCEPT, services=(Service(ICMP, icmp_type=13, icmp_code=0),)),
        egress("no-code-3", DROP, services=(Service(ICMP, icmp_type=8, icmp_code=3),)),
        egress("node-info", ACCEPT, services=(Service(ICMPV6, icmp_type=139),)),
        egress("to-peer", ACCEPT, peers=networks(PEER4), services=(Service(ICMP),)),
        egress("ping6", ACCEPT, services=(Service(ICMPV6, icmp_type=128),)),
        ingress=DROP,
        egress=DROP,
    )
    rows = Rows(Fixture("icmp", GUARDED, rules))
    table = {
        "timestamp": (icmp(13), ICMP, STRANGER4, by_rule("timestamp")),
        "timestamp, code 1": (icmp(13, 1), ICMP, STRANGER4, PROTOCOL),
        "echo, code 3": (icmp(8, 3), ICMP, PEER4, by_rule("no-code-3", Verdict.DROP)),
        "echo, code 0": (icmp(8, 0), ICMP, PEER4, by_rule("to-peer")),
        "echo, code 0 to a stranger": (icmp(8, 0), ICMP, STRANGER4, DENIED),
        "mask request by icmp/any": (icmp(17), ICMP, PEER4, by_rule("to-peer")),
        "type 139 over IPv4": (icmp(139), ICMP, STRANGER4, PROTOCOL),
        "type 128 over IPv4": (icmp(128), ICMP, STRANGER4, PROTOCOL),
        "node information": (icmp(139), ICMPV6, PEER6, by_rule("node-info")),
        "node information reply": (icmp(140), ICMPV6, PEER6, PROTOCOL),
        "type 13 over IPv6": (icmp(13), ICMPV6, PEER6, PROTOCOL),
        "echo6": (icmp(128, 9), ICMPV6, PEER6, by_rule("ping6")),
    }
    for name, (segment, protocol, peer, expected) in table.items():
        local = VM6 if ":" in peer else VM4
        frame = OUT.wrap(segment, protocol, local, peer)
        yield rows.out(f"H13 icmp rules, {name}", frame, expected)


def _local_and_source_ports() -> Iterator[Case]:
    rules = policy(
        ingress("local", ACCEPT, local=networks(f"{VM4}/32"), services=(ports(TCP, 80),)),
        ingress("second", ACCEPT, local=networks("10.20.0.200/30"), services=(ports(TCP, 80),)),
        ingress("ntp", ACCEPT, services=(ports(UDP, 123),), source_ports=((123, 123),)),
        ingress(
            "high", ACCEPT, services=(ports(TCP, 9000),), source_ports=((1024, 2000), (4000, 4000))
        ),
        ingress("nobody", ACCEPT, peers=()),
        ingress("nowhere", ACCEPT, local=()),
        ingress("silent", ACCEPT, services=()),
        egress("from-second", ACCEPT, local=networks("10.20.0.201/32")),
        egress("to-peer", ACCEPT, peers=networks(PEER4), services=(ports(TCP, 443),)),
        ingress=DROP,
        egress=DROP,
    )
    rows = Rows(Fixture("local", GUARDED, rules))
    web = tcp(dport=80)
    yield rows.into("local is the VM's side", IN.wrap4(web, TCP), by_rule("local"))
    for local, inside in (
        ("10.20.0.199", 0),
        ("10.20.0.200", 1),
        ("10.20.0.203", 1),
        ("10.20.0.204", 0),
    ):
        frame = IN.wrap4(web, TCP, local=local)
        yield rows.into(f"local {local}", frame, by_rule("second") if inside else DENIED)
    yield rows.into("local over IPv6", IN.wrap6(web, TCP), DENIED)
    for sport, expected in ((122, DENIED), (123, by_rule("ntp")), (124, DENIED)):
        yield rows.into(f"source port {sport}", IN.wrap4(udp(sport, 123), UDP), expected)
    for sport in (1, 1023, 1024, 2000, 2001, 3999, 4000, 4001, 65535):
        inside = 1024 <= sport <= 2000 or sport == 4000
        frame = IN.wrap4(tcp(sport, 9000), TCP)
        yield rows.into(
            f"source port {sport} of ranges", frame, by_rule("high") if inside else DENIED
        )
    yield rows.into("N3 empty peers, local and services", IN.wrap4(tcp(), TCP), DENIED)
    second = OUT.wrap4(udp(), UDP, local="10.20.0.201")
    yield rows.out("egress local", second, by_rule("from-second"))
    yield rows.out("egress peer", OUT.wrap4(tcp(), TCP), by_rule("to-peer"))
    yield rows.out("egress peer and another port", OUT.wrap4(tcp(dport=444), TCP), DENIED)
    yield rows.out("egress to a stranger", OUT.wrap4(tcp(), TCP, remote=STRANGER4), DENIED)


def _defaults() -> Iterator[Case]:
    for segment, protocol, name in ((tcp(), 6, "TCP"), (udp(), 17, "UDP"), (sctp(), 132, "SCTP")):
        yield USUAL_ROWS.out(f"default, {name}", OUT.wrap4(segment, protocol), DEFAULT)
        yield USUAL_ROWS.into(f"default, {name}", IN.wrap4(segment, protocol), DENIED)
    yield USUAL_ROWS.out("default, ESP", OUT.wrap4(bytes(16), 50), PROTOCOL)
    yield USUAL_ROWS.into("default, echo", IN.wrap4(echo(8), ICMP), DENIED)
    refusing = Rows(Fixture("rejecting", GUARDED, policy(ingress=REJECT, egress=REJECT)))
    refused = Expected(Verdict.REJECT, Reason.DEFAULT)
    yield refusing.out("default reject", OUT.wrap4(tcp(), TCP), refused)
    yield refusing.into("default reject, echo6", IN.wrap6(echo(128), 58), refused)
    yield refusing.out("default reject, GRE", OUT.wrap4(bytes(8), 47), PROTOCOL)
    everything = policy(egress("all", ACCEPT, services=(ANY_SERVICE,)), ingress=DROP, egress=DROP)
    rows = Rows(Fixture("any", GUARDED, everything))
    yield rows.out("any, echo", OUT.wrap4(echo(8), ICMP), by_rule("all"))
    yield rows.out("any, echo6", OUT.wrap6(echo(128), ICMPV6), by_rule("all"))
    yield rows.out("any, timestamp", OUT.wrap4(icmp(13), ICMP), PROTOCOL)
    yield rows.out("any, VRRP", OUT.wrap4(bytes(8), 112), PROTOCOL)


def _modes() -> Iterator[Case]:
    watched, cut_off = Rows(WATCHED), Rows(CUT_OFF)

    def would_drop(reason: Reason, rule: str | None = None) -> Expected:
        return Expected(Verdict.WOULD_DROP, reason, rule)

    yield watched.into("monitor, accepted", IN.wrap4(tcp(), TCP), by_rule("site"))
    yield watched.into("monitor, default", IN.wrap4(tcp(dport=25), 6), would_drop(Reason.DEFAULT))
    nope = IN.wrap4(tcp(dport=3306), TCP)
    yield watched.into("monitor, rejected", nope, would_drop(Reason.RULE, "nope"))
    spoofed = Wire(Path.FROM_VM, OTHER_VM_MAC).wrap4(tcp(), TCP)
    yield watched.out("monitor, spoofed", spoofed, would_drop(Reason.SPOOF_MAC))
    yield watched.out(
        "monitor, unreadable", OUT.wrap4(tcp(flags="SF"), 6), would_drop(Reason.TCP_FLAGS)
    )
    yield watched.out(
        "monitor, no state", OUT.wrap4(tcp(flags="A"), 6), would_drop(Reason.NO_STATE)
    )
    refused = dropped(Reason.QUARANTINE)
    yield from cut_off.both("quarantine, TCP", lambda w: w.wrap4(tcp(), TCP), refused)
    yield from cut_off.both(
        "quarantine, ARP", lambda w: w.frame(arp(1, VM4, PEER4), 0x0806), refused
    )
    yield from cut_off.both("quarantine, unreadable", lambda w: w.frame(b"", 0x0800), refused)
    yield USUAL_ROWS.out(
        "enforce, ARP", OUT.frame(arp(1, VM4, PEER4), 0x0806), accepted(Reason.ARP)
    )


CASES: tuple[Case, ...] = (
    *_services(),
    *_peers(),
    *_tiers(),
    *_order(),
    *_icmp_rules(),
    *_local_and_source_ports(),
    *_defaults(),
    *_modes(),
)
