# SPDX-License-Identifier: Apache-2.0
"""Verdict table of what a VM may want of its host, of payloads that ask for ports, of groups.

Nothing is special to the packet path: what no rule names gets the default, whatever is inside.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import (
    CLOSED,
    GUARDED,
    OPEN,
    TYPICAL,
    egress,
    ingress,
    networks,
    policy,
    ports,
)
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    Case,
    Fixture,
    Rows,
    by_rule,
    dropped,
    into,
    out,
)
from tests.frames import (
    BROADCAST4,
    GATEWAY4,
    GATEWAY6,
    IN,
    OUT,
    PEER4,
    TCP,
    UDP,
    tcp,
    udp,
)
from vgw.abi import Action, Reason

CLOSED_ROWS, OPEN_ROWS = Rows(CLOSED), Rows(OPEN)
METADATA = "169.254.169.254"
NAMED = Fixture(
    "host services named",
    GUARDED,
    policy(
        egress("vxlan", Action.ACCEPT, peers=networks(GATEWAY4), services=(ports(UDP, 4789),)),
        egress("bfd", Action.ACCEPT, peers=networks(GATEWAY4), services=(ports(UDP, 3784),)),
        egress("metadata", Action.ACCEPT, peers=networks(METADATA), services=(ports(TCP, 80),)),
        ingress=Action.DROP,
        egress=Action.DROP,
    ),
)
NAMED_ROWS = Rows(NAMED)
TUNNELS = {"VXLAN": 4789, "Geneve": 6081, "GUE": 6080, "FOU": 5555, "WireGuard": 51820}
#: Inside of VXLAN: a frame of the host's, with an answer that no rule would let pass.
INSIDE = bytes.fromhex("0800000000000100") + IN.wrap4(tcp(), TCP)


def _tunnels() -> Iterator[Case]:
    for name, port in TUNNELS.items():
        for host in (GATEWAY4, GATEWAY6):
            wrap = OUT.wrap4 if "." in host else OUT.wrap6
            frame = wrap(udp(40000, port, INSIDE), UDP, remote=host)
            yield CLOSED_ROWS.out(f"I10 {name} to {host}", frame, DENIED)
            yield OPEN_ROWS.out(f"I10 {name} to {host}, egress accepts", frame, DEFAULT)
    frame = OUT.wrap4(udp(40000, 4789, INSIDE), UDP, remote=GATEWAY4)
    yield NAMED_ROWS.out("I10 VXLAN that a rule names", frame, by_rule("vxlan"))
    other = OUT.wrap4(udp(40000, 4789, INSIDE), UDP, remote=PEER4)
    yield NAMED_ROWS.out("I10 VXLAN to another host than the rule's", other, DENIED)


def _bfd() -> Iterator[Case]:
    control = bytes.fromhex("2003031800000001000000000000c3500000c35000000000")
    for port in (3784, 3785, 4784):
        frame = OUT.wrap4(udp(49152, port, control), UDP, remote=GATEWAY4, ttl=255)
        yield CLOSED_ROWS.out(f"I11 BFD {port}", frame, DENIED)
        expected = by_rule("bfd") if port == 3784 else DENIED
        yield NAMED_ROWS.out(f"I11 BFD {port}, a rule names 3784", frame, expected)
        frame = OUT.wrap6(udp(49152, port, control), UDP, remote=GATEWAY6, hop_limit=255)
        yield CLOSED_ROWS.out(f"I11 BFD {port} over IPv6", frame, DENIED)


def _management() -> Iterator[Case]:
    addresses = {"metadata": METADATA, "the gateway": GATEWAY4, "loopback": "127.0.0.1"}
    for name, address in addresses.items():
        for port in (22, 80, 2379, 2380, 9477):
            frame = OUT.wrap4(tcp(dport=port), TCP, remote=address)
            yield CLOSED_ROWS.out(f"I14 {name}, port {port}", frame, DENIED)
            named = by_rule("metadata") if (name, port) == ("metadata", 80) else DENIED
            yield NAMED_ROWS.out(f"I14 {name}, port {port}, one named", frame, named)
    frame = OUT.wrap6(tcp(dport=80), TCP, remote="fd00:ec2::254")
    yield CLOSED_ROWS.out("I14 metadata over IPv6", frame, DENIED)


def _helpers() -> Iterator[Case]:
    """A payload in an open connection names a port; nothing connects to it afterwards."""
    asked = {
        "FTP, active": (21, "out", b"PORT 10,20,0,11,156,65\r\n"),
        "FTP, extended": (21, "out", b"EPRT |1|10.20.0.11|40001|\r\n"),
        "FTP, passive": (21, "in", b"227 Entering Passive Mode (10,20,0,11,156,65)\r\n"),
        "IRC": (6667, "out", b"PRIVMSG x :\x01DCC SEND f 169082891 40001 9\x01\r\n"),
        "SIP": (5060, "out", b"INVITE sip:x SIP/2.0\r\n\r\nc=IN IP4 10.20.0.11\r\nm=audio 40001 "),
    }
    for name, (port, side, payload) in asked.items():
        here, there = tcp(40000, port), tcp(port, 40000, "SA", seq=5000, ack=1001)
        confirm = tcp(40000, port, "A", seq=1001, ack=5001)
        if side == "out":
            segment = tcp(40000, port, "A", seq=1001, ack=5001, payload=payload)
            asking = out(OUT.wrap4(segment, TCP), ESTABLISHED)
        else:
            segment = tcp(port, 40000, "A", seq=5001, ack=1001, payload=payload)
            asking = into(IN.wrap4(segment, TCP), ESTABLISHED)
        yield Case(
            f"I13 {name}",
            TYPICAL,
            (
                out(OUT.wrap4(here, TCP), DEFAULT),
                into(IN.wrap4(there, TCP), ESTABLISHED),
                out(OUT.wrap4(confirm, TCP), ESTABLISHED),
                asking,
                into(IN.wrap4(tcp(20, 40001), TCP), DENIED),
                into(IN.wrap4(tcp(port, 40001), TCP), DENIED),
                into(IN.wrap4(udp(port, 40001), UDP), DENIED),
            ),
        )


def _multicast() -> Iterator[Case]:
    question = OUT.wrap4(udp(5353, 5353), UDP, remote="224.0.0.251")
    answer = IN.wrap4(udp(5353, 5353), UDP)
    yield Case(
        "J5 a host's answer to a question to a group is no reply",
        TYPICAL,
        (out(question, DEFAULT), into(answer, DENIED), out(question, ESTABLISHED)),
    )
    question6 = OUT.wrap6(udp(5353, 5353), UDP, remote="ff02::fb")
    yield Case(
        "J5 a host's answer to a question to a group is no reply, IPv6",
        TYPICAL,
        (out(question6, DEFAULT), into(IN.wrap6(udp(5353, 5353), UDP), DENIED)),
    )
    services = (ports(UDP, 5353),)
    listens = Fixture(
        "listens to a group",
        GUARDED,
        policy(
            ingress("group", Action.ACCEPT, local=networks("224.0.0.251/32"), services=services),
            ingress=Action.DROP,
            egress=Action.DROP,
        ),
    )
    asked = IN.wrap4(udp(5353, 5353), UDP, local="224.0.0.251")
    yield Case(
        "J5 the VM's answer to a question to a group is no reply",
        listens,
        (into(asked, by_rule("group")), out(OUT.wrap4(udp(5353, 5353), UDP), DENIED)),
    )
    as_group = OUT.wrap4(udp(5353, 5353), UDP, local="224.0.0.251")
    yield Case(
        "J5 nor may it answer as the group",
        listens,
        (into(asked, by_rule("group")), out(as_group, dropped(Reason.SPOOF_ADDRESS))),
    )


def _broadcasts() -> Iterator[Case]:
    storm = OUT.wrap4(udp(40000, 9), UDP, remote=BROADCAST4)
    yield CLOSED_ROWS.out("J1 broadcast without a rule", storm, DENIED)
    yield Case(
        "J1 a storm is one flow, and nobody's answer to it is a reply",
        TYPICAL,
        (
            out(storm, DEFAULT),
            *(out(storm, ESTABLISHED),) * 8,
            into(IN.wrap4(udp(9, 40000), UDP), DENIED),
        ),
    )


CASES: tuple[Case, ...] = (
    *_tunnels(),
    *_bfd(),
    *_management(),
    *_helpers(),
    *_multicast(),
    *_broadcasts(),
)
