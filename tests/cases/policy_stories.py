# SPDX-License-Identifier: Apache-2.0
"""Packet stories in which the policy or the endpoint changes, or the table of flows is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

from tests.cases.fixtures import (
    ALL_ACCEPTED,
    GUARDED,
    NOTHING_ACCEPTED,
    OTHER_PROTOCOLS,
    SERVER,
    SERVICES,
    TRUNK,
    TYPICAL,
    USUAL,
    WATCHED,
    egress,
    ingress,
    networks,
    policy,
    ports,
)
from tests.cases.stories import ANSWER, PING, PONG, QUERY, error_in
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    NO_STATE,
    RELATED,
    UNRELATED,
    Apply,
    Case,
    Expected,
    Reconfigure,
    Wait,
    by_rule,
    dropped,
    into,
    out,
)
from tests.frames import (
    ARP,
    ICMPV6,
    IN,
    OTHER_VM_MAC,
    OUT,
    PEER4,
    TCP,
    UDP,
    VM4,
    Wire,
    arp,
    echo,
    icmp_error,
    tagged,
    tcp,
    udp,
)
from vgw.abi import Action, Mode, Path, Reason, Verdict
from vgw.policy.model import ANY_SERVICE, Service
from vgw.policy.model import ICMP as ICMP_PROTOCOL

PROTOCOL = dropped(Reason.PROTOCOL)


def _policy_changes() -> Iterator[Case]:
    no_site = policy(ingress=Action.DROP, egress=Action.ACCEPT)
    syn, ack = IN.wrap4(tcp(), TCP), IN.wrap4(tcp(flags="A"), TCP)
    answer = OUT.wrap4(tcp(443, 40000, "SA"), TCP)
    opened = (into(syn, by_rule("site")), out(answer, ESTABLISHED), into(ack, ESTABLISHED))
    confirmed = Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "site")
    yield Case(
        "G20 revoked rule cuts at the next packet",
        SERVER,
        (*opened, Apply(no_site), into(ack, DENIED), into(ack, NO_STATE), out(answer, NO_STATE)),
    )
    yield Case(
        "G20 the VM's next packet is cut as well",
        SERVER,
        (*opened, Apply(no_site), out(OUT.wrap4(tcp(443, 40000, "A"), TCP), DENIED)),
    )
    dropping = policy(ingress("deny", Action.DROP), ingress=Action.ACCEPT, egress=Action.ACCEPT)
    rejecting = policy(ingress("deny", Action.REJECT), ingress=Action.ACCEPT, egress=Action.ACCEPT)
    yield Case(
        "G20 cut by a rule",
        SERVER,
        (*opened, Apply(dropping), into(ack, by_rule("deny", Verdict.DROP)), into(ack, NO_STATE)),
    )
    yield Case(
        "G20 cut by rejection",
        SERVER,
        (*opened, Apply(rejecting), out(answer, by_rule("deny", Verdict.REJECT))),
    )
    yield Case(
        "G20 unchanged rule is confirmed once",
        SERVER,
        (*opened, Apply(SERVICES), into(ack, confirmed), into(ack, ESTABLISHED)),
    )
    yield Case(
        "G20 confirmed by a reply",
        SERVER,
        (*opened, Apply(SERVICES), out(answer, confirmed), into(ack, ESTABLISHED)),
    )
    yield Case(
        "G20 given back before the next packet",
        SERVER,
        (*opened, Apply(no_site), Apply(SERVICES), into(ack, confirmed)),
    )
    yield Case(
        "G20 given back after a cut: a new SYN opens",
        SERVER,
        (
            *opened,
            Apply(no_site),
            into(ack, DENIED),
            Apply(SERVICES),
            into(ack, NO_STATE),
            into(syn, by_rule("site")),
            out(answer, ESTABLISHED),
        ),
    )
    by_default = policy(ingress=Action.ACCEPT, egress=Action.DROP)
    yield Case(
        "G20 the default takes over",
        SERVER,
        (*opened, Apply(by_default), out(answer, ESTABLISHED), into(ack, ESTABLISHED)),
    )
    yield Case(
        "G20 no policy for a while",
        SERVER,
        (
            *opened,
            Apply(None),
            into(ack, dropped(Reason.NO_POLICY)),
            Apply(SERVICES),
            into(ack, confirmed),
        ),
    )


def _more_changes() -> Iterator[Case]:
    dns = egress("dns", Action.ACCEPT, peers=networks(PEER4), services=(ports(UDP, 53),))
    only_dns = policy(dns, ingress=Action.DROP, egress=Action.DROP)
    yield Case(
        "G20 UDP judged as its first packet",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Apply(only_dns),
            into(ANSWER, Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "dns")),
            Apply(NOTHING_ACCEPTED),
            into(ANSWER, DENIED),
            out(QUERY, DENIED),
            Apply(USUAL),
            into(ANSWER, DENIED),
            out(QUERY, DEFAULT),
        ),
    )
    no_ping = Service(ICMP_PROTOCOL, icmp_type=8)
    pings_only = policy(
        egress("ping", Action.ACCEPT, services=(no_ping,)), ingress=Action.DROP, egress=Action.DROP
    )
    yield Case(
        "G20 ping judged by its request",
        TYPICAL,
        (
            out(PING, DEFAULT),
            Apply(pings_only),
            into(PONG, Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "ping")),
            Apply(NOTHING_ACCEPTED),
            into(PONG, DENIED),
            into(PONG, NO_STATE),
        ),
    )
    error = error_in(QUERY[14:])
    yield Case(
        "G20 an error confirms its flow",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Apply(only_dns),
            into(error, Expected(Verdict.ACCEPT, Reason.CT_RELATED, "dns")),
            into(ANSWER, ESTABLISHED),
        ),
    )
    yield Case(
        "G20 an error cuts its flow",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Apply(NOTHING_ACCEPTED),
            into(error, DENIED),
            into(error, UNRELATED),
            Apply(USUAL),
            into(ANSWER, DENIED),
        ),
    )
    gre, back = OUT.wrap4(bytes(8), 47), IN.wrap4(bytes(8), 47)
    yield Case(
        "G20 GRE without a rule any more",
        OTHER_PROTOCOLS,
        (out(gre, by_rule("gre")), Apply(ALL_ACCEPTED), into(back, PROTOCOL)),
    )
    yield Case(
        "monitor keeps a flow that enforce would cut",
        WATCHED,
        (
            into(IN.wrap4(tcp(), TCP), by_rule("site")),
            Apply(USUAL),
            into(IN.wrap4(tcp(flags="A"), TCP), Expected(Verdict.WOULD_DROP, Reason.DEFAULT)),
            Apply(SERVICES),
            into(
                IN.wrap4(tcp(flags="A"), TCP),
                Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "site"),
            ),
        ),
    )
    would_drop = Expected(Verdict.WOULD_DROP, Reason.DEFAULT)
    ssh, ssh_back = IN.wrap4(tcp(dport=25), TCP), OUT.wrap4(tcp(25, 40000, "SA"), TCP)
    yield Case(
        "monitor opens no flow for what it would drop",
        WATCHED,
        (
            into(ssh, would_drop),
            out(ssh_back, Expected(Verdict.WOULD_DROP, Reason.NO_STATE)),
            into(ssh, would_drop),
        ),
    )


def _error6_in(quoted: bytes) -> bytes:
    return IN.wrap6(icmp_error(1, quoted), ICMPV6)


def _foreign_icmp() -> Iterator[Case]:
    """ICMP's numbers over the other family are protocols like any, and have no types."""
    flows = {
        "ICMP over IPv6": (
            ICMP_PROTOCOL,
            OUT.wrap6(echo(0), ICMP_PROTOCOL),
            IN.wrap6(echo(0), ICMP_PROTOCOL),
            _error6_in,
        ),
        "ICMPv6 over IPv4": (
            ICMPV6,
            OUT.wrap4(echo(0), ICMPV6),
            IN.wrap4(echo(0), ICMPV6),
            error_in,
        ),
    }
    for name, (protocol, there, back, error) in flows.items():
        opened = (out(there, by_rule("all-icmp")), into(back, ESTABLISHED))
        quoting = error(there[14:])
        for what, service in (
            ("type 0", Service(protocol, icmp_type=0)),
            ("type 0, code 0", Service(protocol, icmp_type=0, icmp_code=0)),
            ("echo requests", Service(protocol, icmp_type=8 if protocol == 1 else 128)),
            ("the family's own", Service(ICMPV6 if protocol == 1 else ICMP_PROTOCOL)),
            ("ordinary traffic", ANY_SERVICE),
        ):
            accepting = (
                ingress("some", Action.ACCEPT, services=(service,)),
                egress("some", Action.ACCEPT, services=(service,)),
            )
            some = policy(*accepting, ingress=Action.ACCEPT, egress=Action.ACCEPT)
            yield Case(
                f"G20 {name}, only {what} accepted now",
                OTHER_PROTOCOLS,
                (*opened, Apply(some), into(back, PROTOCOL), out(there, PROTOCOL)),
            )
            yield Case(
                f"G20 {name}, only {what} accepted now, the VM's packet",
                OTHER_PROTOCOLS,
                (*opened, Apply(some), out(there, PROTOCOL), into(back, PROTOCOL)),
            )
            yield Case(
                f"G20 {name}, only {what} accepted now, an error",
                OTHER_PROTOCOLS,
                (
                    *opened,
                    into(quoting, RELATED),
                    Apply(some),
                    into(quoting, PROTOCOL),
                    into(quoting, UNRELATED),
                ),
            )
        whole = egress("whole", Action.ACCEPT, services=(Service(protocol),))
        yield Case(
            f"G20 {name}, the protocol accepted now",
            OTHER_PROTOCOLS,
            (
                *opened,
                Apply(policy(whole, ingress=Action.DROP, egress=Action.DROP)),
                into(back, Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "whole")),
                out(there, ESTABLISHED),
            ),
        )


def _endpoint_changes() -> Iterator[Case]:
    moved = replace(GUARDED, addresses=(ip_address("10.20.0.50"),))
    foreign = dropped(Reason.SPOOF_ADDRESS)
    yield Case(
        "F25 the VM's address changes",
        TYPICAL,
        (out(QUERY, DEFAULT), Reconfigure(moved), out(QUERY, foreign), into(ANSWER, ESTABLISHED)),
    )
    quarantine = dropped(Reason.QUARANTINE)
    yield Case(
        "quarantine and back",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Reconfigure(GUARDED, Mode.QUARANTINE),
            out(QUERY, quarantine),
            into(ANSWER, quarantine),
            Reconfigure(GUARDED),
            into(ANSWER, ESTABLISHED),
        ),
    )
    spoofed = OUT.wrap4(udp(40000, 53), UDP, local="10.20.0.12")
    yield Case(
        "F2 spoofed source with an open flow",
        TYPICAL,
        (out(QUERY, DEFAULT), out(spoofed, foreign), into(ANSWER, ESTABLISHED)),
    )
    query_100, answer_100 = tagged(QUERY, 100), tagged(ANSWER, 100)
    closed = policy(ingress=Action.DROP, egress=Action.ACCEPT)
    yield Case(
        "B1 a flow belongs to its VLAN",
        TRUNK,
        (
            Apply(closed),
            out(query_100, DEFAULT),
            into(ANSWER, DENIED),
            into(tagged(ANSWER, 4094), DENIED),
            into(answer_100, ESTABLISHED),
        ),
    )
    mapped = IN.wrap6(udp(53, 40000), UDP, local=f"::ffff:{VM4}", remote=f"::ffff:{PEER4}")
    yield Case(
        "E21 IPv4-mapped packet in an IPv4 flow",
        TYPICAL,
        (out(QUERY, DEFAULT), into(mapped, dropped(Reason.BAD_ADDRESS)), into(ANSWER, ESTABLISHED)),
    )


def _without_policy() -> Iterator[Case]:
    none = dropped(Reason.NO_POLICY)
    arp_request = OUT.frame(arp(1, VM4, PEER4), ARP)
    frames = {
        "TCP": OUT.wrap4(tcp(), TCP),
        "ARP": arp_request,
        "unreadable": OUT.wrap4(tcp(flags="SF"), TCP),
        "spoofed": Wire(Path.FROM_VM, OTHER_VM_MAC).wrap4(tcp(), TCP),
    }
    for name, frame in frames.items():
        yield Case(f"no policy, {name}", TYPICAL, (Apply(None), out(frame, none)))
    yield Case("no policy, to_vm", TYPICAL, (Apply(None), into(ANSWER, none)))


def _full() -> Iterator[Case]:
    full = dropped(Reason.CT_FULL)
    queries = [OUT.wrap4(udp(40000 + i, 53), UDP) for i in range(6)]
    opened = tuple(out(query, DEFAULT) for query in queries[:4])
    late = IN.wrap4(udp(53, 40003), UDP)
    yield Case(
        "L4 full table",
        TYPICAL,
        (
            *opened,
            out(queries[4], full),
            out(queries[5], full),
            out(queries[0], ESTABLISHED),
            into(late, ESTABLISHED),
            into(IN.wrap4(udp(53, 40004), UDP), DENIED),
        ),
        conntrack_max=4,
    )
    yield Case(
        "L4 dropped packets take no room",
        SERVER,
        (
            *(into(IN.wrap4(udp(1000 + i, 99), UDP), DENIED) for i in range(8)),
            into(IN.wrap4(udp(1000, 53), UDP), by_rule("dns")),
        ),
        conntrack_max=4,
    )
    again = tuple(out(query, DEFAULT) for query in queries[:4])
    yield Case(
        "L4 timed-out flows of the same tuples are used again",
        TYPICAL,
        (*opened, Wait(40), *again),
        conntrack_max=4,
    )


CASES: tuple[Case, ...] = (
    *_policy_changes(),
    *_more_changes(),
    *_foreign_icmp(),
    *_endpoint_changes(),
    *_without_policy(),
    *_full(),
)
