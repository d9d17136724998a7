# SPDX-License-Identifier: Apache-2.0
"""Packet stories of connection tracking other than TCP: UDP, echo, errors, DHCP."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import (
    CLOSED,
    OPEN,
    OTHER_PROTOCOLS,
    TYPICAL,
)
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    NO_STATE,
    RELATED,
    UNRELATED,
    Case,
    Wait,
    accepted,
    by_rule,
    dropped,
    into,
    out,
)
from tests.frames import (
    BROADCAST_MAC,
    GATEWAY4,
    ICMP,
    ICMPV6,
    IN,
    OUT,
    PEER4,
    PEER6,
    SCTP,
    STRANGER4,
    STRANGER6,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    Wire,
    bootp,
    echo,
    icmp,
    icmp_error,
    ipv4,
    ipv6,
    sctp,
    solicitation,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

QUERY, ANSWER = OUT.wrap4(udp(40000, 53), UDP), IN.wrap4(udp(53, 40000), UDP)
QUERY6, ANSWER6 = OUT.wrap6(udp(40000, 53), UDP), IN.wrap6(udp(53, 40000), UDP)
PING, PONG = OUT.wrap4(echo(8), ICMP), IN.wrap4(echo(0), ICMP)
PING6, PONG6 = OUT.wrap6(echo(128), ICMPV6), IN.wrap6(echo(129), ICMPV6)
ANSWER_TO_SYN = tcp(443, 40000, "SA", seq=5000, ack=1001)
SYN, SYN_ACK = OUT.wrap4(tcp(), TCP), IN.wrap4(ANSWER_TO_SYN, TCP)
DHCP = accepted(Reason.DHCP)
PROTOCOL = dropped(Reason.PROTOCOL)


def _udp() -> Iterator[Case]:
    wrong_port = IN.wrap4(udp(54, 40000), UDP)
    stranger = IN.wrap4(udp(53, 40000), UDP, remote=STRANGER4)
    steps = (out(QUERY, DEFAULT), into(ANSWER, ESTABLISHED), into(wrong_port, DENIED))
    yield Case("I3 UDP reply", TYPICAL, (*steps, into(stranger, DENIED)))
    yield Case("I3 UDP reply, IPv6", TYPICAL, (out(QUERY6, DEFAULT), into(ANSWER6, ESTABLISHED)))
    yield Case("I3 UDP reply first", TYPICAL, (into(ANSWER, DENIED), out(QUERY, DEFAULT)))
    yield Case(
        "I4 single packet lives 30 s",
        TYPICAL,
        (out(QUERY, DEFAULT), Wait(28), into(ANSWER, ESTABLISHED)),
    )
    yield Case(
        "I4 single packet dies after 30 s",
        TYPICAL,
        (out(QUERY, DEFAULT), Wait(32), into(ANSWER, DENIED)),
    )
    yield Case(
        "I4 repeated query is refreshed but not replied",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Wait(20),
            out(QUERY, ESTABLISHED),
            Wait(20),
            out(QUERY, ESTABLISHED),
            Wait(32),
            into(ANSWER, DENIED),
            out(QUERY, DEFAULT),
        ),
    )
    replied = (out(QUERY, DEFAULT), into(ANSWER, ESTABLISHED))
    yield Case("I4 replied lives 120 s", TYPICAL, (*replied, Wait(118), into(ANSWER, ESTABLISHED)))
    yield Case("I4 replied dies after 120 s", TYPICAL, (*replied, Wait(122), into(ANSWER, DENIED)))
    associated = (
        out(OUT.wrap4(sctp(), SCTP), DEFAULT),
        into(IN.wrap4(sctp(3868, 40000), SCTP), ESTABLISHED),
    )
    yield Case(
        "I5 SCTP lives 600 s",
        TYPICAL,
        (*associated, Wait(598), into(IN.wrap4(sctp(3868, 40000), SCTP), ESTABLISHED)),
    )
    yield Case(
        "I5 SCTP dies after 600 s",
        TYPICAL,
        (*associated, Wait(602), into(IN.wrap4(sctp(3868, 40000), SCTP), DENIED)),
    )
    as_tcp = IN.wrap4(tcp(53, 40000, "SA"), TCP)
    yield Case("I3 UDP flow is not TCP's", TYPICAL, (out(QUERY, DEFAULT), into(as_tcp, NO_STATE)))
    gre, back = OUT.wrap4(bytes(8), 47), IN.wrap4(bytes(8), 47)
    yield Case(
        "I7 GRE by rule is stateful",
        OTHER_PROTOCOLS,
        (into(back, PROTOCOL), out(gre, by_rule("gre")), into(back, ESTABLISHED)),
    )
    yield Case(
        "I8 ESP flow is not AH's",
        OTHER_PROTOCOLS,
        (
            out(OUT.wrap4(bytes(16), 50), by_rule("esp")),
            into(IN.wrap4(bytes(16), 50), ESTABLISHED),
            into(IN.wrap4(bytes(16), 51), PROTOCOL),
        ),
    )


def _echo() -> Iterator[Case]:
    yield Case("H1 ping", TYPICAL, (out(PING, DEFAULT), into(PONG, ESTABLISHED)))
    yield Case("H1 ping6", TYPICAL, (out(PING6, DEFAULT), into(PONG6, ESTABLISHED)))
    other_id = IN.wrap4(echo(0, 8), ICMP)
    other_host = IN.wrap4(echo(0), ICMP, remote=STRANGER4)
    steps = (out(PING, DEFAULT), into(other_id, NO_STATE), into(other_host, NO_STATE))
    yield Case("H1 replies of others", TYPICAL, (*steps, into(PONG, ESTABLISHED)))
    yield Case("H1 reply from the VM", TYPICAL, (out(OUT.wrap4(echo(0), ICMP), NO_STATE),))
    request_in, reply_out = IN.wrap4(echo(8), ICMP), OUT.wrap4(echo(0), ICMP)
    yield Case(
        "H1 one identifier in both directions",
        TYPICAL,
        (out(PING, DEFAULT), into(request_in, DENIED), out(reply_out, NO_STATE)),
    )
    yield Case(
        "H1 pings in both directions",
        OPEN,
        (
            out(PING, DEFAULT),
            out(reply_out, NO_STATE),
            into(request_in, DEFAULT),
            out(reply_out, ESTABLISHED),
            into(PONG, ESTABLISHED),
        ),
    )
    zero_in = IN.wrap6(echo(128, 0), ICMPV6)
    neighbour = OUT.wrap6(solicitation(VM6), ICMPV6, hop_limit=255)
    yield Case(
        "H2 ND opens no echo flow",
        TYPICAL,
        (out(neighbour, accepted(Reason.ND)), into(zero_in, DENIED)),
    )
    yield Case(
        "H2 other ICMP opens no flow",
        OTHER_PROTOCOLS,
        (
            out(OUT.wrap4(icmp(13), ICMP), by_rule("all-icmp")),
            into(IN.wrap4(icmp(14), ICMP), PROTOCOL),
            into(IN.wrap4(echo(0, 0), ICMP), NO_STATE),
        ),
    )
    yield Case(
        "H1 ping lives 30 s",
        TYPICAL,
        (out(PING, DEFAULT), Wait(28), into(PONG, ESTABLISHED), Wait(28), into(PONG, ESTABLISHED)),
    )
    yield Case("H1 ping dies", TYPICAL, (out(PING, DEFAULT), Wait(32), into(PONG, NO_STATE)))


def error_in(quoted: bytes, to: str = VM4, sender: str = STRANGER4) -> bytes:
    return IN.wrap4(icmp_error(3, quoted, 1), ICMP, local=to, remote=sender)


def _errors() -> Iterator[Case]:
    sent = SYN[14:]
    flow = (out(SYN, DEFAULT),)
    yield Case("H3 error about our SYN", TYPICAL, (*flow, into(error_in(sent), RELATED)))
    yield Case("H3 error cut to 28 bytes", TYPICAL, (*flow, into(error_in(sent[:28]), RELATED)))
    yield Case(
        "H4 outer destination is another of ours",
        TYPICAL,
        (*flow, into(error_in(sent, to="10.20.0.201"), UNRELATED)),
    )
    back = ipv4(ANSWER_TO_SYN, TCP, PEER4, VM4)
    yield Case("H5 quote the wrong way round", TYPICAL, (*flow, into(error_in(back), UNRELATED)))
    yield Case(
        "H3 the VM's error about what it got",
        TYPICAL,
        (
            *flow,
            into(SYN_ACK, ESTABLISHED),
            out(OUT.wrap4(icmp_error(3, back, 3), ICMP), RELATED),
            out(OUT.wrap4(icmp_error(3, sent, 3), ICMP), UNRELATED),
            out(OUT.wrap4(icmp_error(3, back), ICMP, remote=STRANGER4), UNRELATED),
        ),
    )
    other_flow = ipv4(tcp(40001), TCP, VM4, PEER4)
    yield Case("H5 another flow", TYPICAL, (*flow, into(error_in(other_flow), UNRELATED)))
    yield Case(
        "H3 error about UDP",
        TYPICAL,
        (out(QUERY, DEFAULT), into(error_in(QUERY[14:], sender=PEER4), RELATED)),
    )
    yield Case(
        "H3 an error does not prolong a flow",
        TYPICAL,
        (
            out(QUERY, DEFAULT),
            Wait(20),
            into(error_in(QUERY[14:]), RELATED),
            Wait(20),
            into(ANSWER, DENIED),
            into(error_in(QUERY[14:]), UNRELATED),
        ),
    )
    yield Case(
        "H3 error about a ping",
        TYPICAL,
        (
            out(PING, DEFAULT),
            into(error_in(PING[14:]), RELATED),
            into(error_in(ipv4(echo(8, 8), ICMP, VM4, PEER4)), UNRELATED),
            into(error_in(ipv4(echo(0), ICMP, VM4, PEER4)), UNRELATED),
        ),
    )
    yield Case(
        "H3 error about the VM's reply",
        OPEN,
        (
            into(IN.wrap4(echo(8), ICMP), DEFAULT),
            into(error_in(ipv4(echo(0), ICMP, VM4, PEER4)), RELATED),
            into(error_in(PING[14:]), UNRELATED),
            out(OUT.wrap4(icmp_error(11, ipv4(echo(8), ICMP, PEER4, VM4)), ICMP), RELATED),
        ),
    )
    too_big = IN.wrap6(icmp_error(2, QUERY6[14:], rest=1280), ICMPV6, remote="2001:db8:f::1")
    yield Case("H9 packet too big", TYPICAL, (out(QUERY6, DEFAULT), into(too_big, RELATED)))
    lost = IN.wrap6(icmp_error(3, PING6[14:]), ICMPV6)
    yield Case("H9 hop limit exceeded", TYPICAL, (out(PING6, DEFAULT), into(lost, RELATED)))
    wrong = IN.wrap6(icmp_error(1, ipv6(udp(40001, 53), UDP, VM6, PEER6)), ICMPV6)
    yield Case(
        "H5 error6 about another flow", TYPICAL, (out(QUERY6, DEFAULT), into(wrong, UNRELATED))
    )
    gre = OUT.wrap4(bytes(8), 47)
    yield Case(
        "H3 error about GRE",
        OTHER_PROTOCOLS,
        (out(gre, by_rule("gre")), into(error_in(gre[14:]), RELATED)),
    )


def _dhcp() -> Iterator[Case]:
    wire = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC)
    nowhere, everywhere = UNSPECIFIED4, "255.255.255.255"
    ask = wire.wrap4(udp(68, 67, bootp()), UDP, local=nowhere, remote=everywhere)
    offer = IN.wrap4(udp(67, 68, bootp(2)), UDP, remote="10.20.0.1")
    ask6 = OUT.wrap6(udp(546, 547), UDP, remote="ff02::1:2")
    offer6 = IN.wrap6(udp(547, 546), UDP)
    yield Case(
        "F21 answers for 60 s",
        TYPICAL,
        (
            out(ask, DHCP),
            into(offer, DHCP),
            Wait(58),
            into(offer, DHCP),
            Wait(4),
            into(offer, DENIED),
        ),
    )
    yield Case("F21 DHCPv6", TYPICAL, (into(offer6, DENIED), out(ask6, DHCP), into(offer6, DHCP)))
    wrong = wire.wrap4(udp(68, 67, bootp(2)), UDP, local=nowhere, remote=everywhere)
    yield Case(
        "F21 an invalid request asks for nothing",
        TYPICAL,
        (out(wrong, dropped(Reason.DHCP_INVALID)), into(offer, DENIED)),
    )
    elsewhere = IN.wrap4(udp(67, 69), UDP)
    yield Case("F21 other ports", TYPICAL, (out(ask, DHCP), into(elsewhere, DENIED)))
    refused, refused6 = into(offer, DENIED), into(offer6, DENIED)
    yield Case(
        "F21 DHCPv4 does not ask for DHCPv6",
        TYPICAL,
        (out(ask, DHCP), refused6, into(offer, DHCP), refused6),
    )
    yield Case(
        "F21 DHCPv6 does not ask for DHCPv4",
        TYPICAL,
        (out(ask6, DHCP), refused, into(offer6, DHCP), refused),
    )
    yield Case(
        "F21 each family has its own 60 s",
        TYPICAL,
        (
            out(ask, DHCP),
            Wait(40),
            out(ask6, DHCP),
            into(offer, DHCP),
            Wait(22),
            refused,
            into(offer6, DHCP),
            out(ask, DHCP),
            Wait(40),
            into(offer, DHCP),
            refused6,
        ),
    )
    yield from _renewals()


def _renewals() -> Iterator[Case]:
    """A renewal asks one server: traffic like any, which opens a flow and no more."""
    server, spare = GATEWAY4, "10.20.0.2"
    renew = OUT.wrap4(udp(68, 67, bootp()), UDP, remote=server)
    answer = IN.wrap4(udp(67, 68, bootp(2)), UDP, remote=server)
    stranger = IN.wrap4(udp(67, 68, bootp(2)), UDP, remote=spare)
    yield Case(
        "F19 renewal",
        TYPICAL,
        (
            into(answer, DENIED),
            out(renew, DEFAULT),
            into(answer, ESTABLISHED),
            into(stranger, DENIED),
            out(renew, ESTABLISHED),
            into(stranger, DENIED),
        ),
    )
    yield Case(
        "F19 renewal that no rule accepts",
        CLOSED,
        (out(renew, DENIED), into(answer, DENIED), into(stranger, DENIED)),
    )
    broken = OUT.wrap4(udp(68, 67, bootp(2)), UDP, remote=server)
    yield Case(
        "F20 invalid renewal in an open flow",
        TYPICAL,
        (
            out(broken, dropped(Reason.DHCP_INVALID)),
            into(answer, DENIED),
            out(renew, DEFAULT),
            out(broken, dropped(Reason.DHCP_INVALID)),
            into(answer, ESTABLISHED),
        ),
    )
    ask = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC).wrap4(
        udp(68, 67, bootp()), UDP, remote="255.255.255.255"
    )
    yield Case(
        "F19 a renewal does not lengthen the 60 s of a request",
        TYPICAL,
        (
            out(ask, DHCP),
            Wait(40),
            out(renew, DEFAULT),
            into(stranger, DHCP),
            Wait(22),
            into(stranger, DENIED),
        ),
    )
    renew6 = OUT.wrap6(udp(546, 547), UDP)
    answer6 = IN.wrap6(udp(547, 546), UDP)
    stranger6 = IN.wrap6(udp(547, 546), UDP, remote=STRANGER6)
    yield Case(
        "F19 renewal by DHCPv6",
        TYPICAL,
        (out(renew6, DEFAULT), into(answer6, ESTABLISHED), into(stranger6, DENIED)),
    )
    yield Case(
        "F19 renewal by DHCPv6 that no rule accepts",
        CLOSED,
        (out(renew6, DENIED), into(answer6, DENIED)),
    )


CASES: tuple[Case, ...] = (*_udp(), *_echo(), *_errors(), *_dhcp())
