# SPDX-License-Identifier: Apache-2.0
"""Packet stories of fragments: the first one is judged, later ones belong to its flow or go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.cases.fixtures import (
    NOTHING_ACCEPTED,
    OPEN,
    OTHER_PROTOCOLS,
    SERVER,
    TRUNK,
    TYPICAL,
    WATCHED,
    egress,
    policy,
    ports,
)
from tests.cases.table import (
    DEFAULT,
    DENIED,
    ESTABLISHED,
    Apply,
    Case,
    Expected,
    Fixture,
    Wait,
    by_rule,
    dropped,
    into,
    out,
)
from tests.cases.tcp_stories import HANDSHAKE, got, sent
from tests.datagrams import piece
from tests.frames import (
    ICMP,
    ICMPV6,
    IN,
    OTHER_VM4,
    OTHER_VM6,
    OUT,
    SCTP,
    STRANGER4,
    STRANGER6,
    TCP,
    UDP,
    VM4,
    VM6,
    Wire,
    echo,
    sctp,
    tagged,
    tcp,
    udp,
)
from vgw.abi import Action, Reason, Verdict

FRAGMENT = dropped(Reason.FRAGMENT)
GRE = 47
#: Bytes of the first fragment; all datagrams here have 48 but where it says otherwise.
FIRST = 24


@dataclass(frozen=True, slots=True)
class Family:
    """An IP version, with the ids of its cases: IPv4's group D, and what is like it in group E."""

    name: str
    wrap: Callable[..., bytes]
    ping: tuple[bytes, int]
    stranger: str
    other_vm: str
    own: str

    def segments(self) -> dict[str, tuple[bytes, int]]:
        """Return a segment of 48 bytes for each protocol that has a flow."""
        return {
            "TCP": (tcp(payload=bytes(28)), TCP),
            "UDP": (udp(payload=bytes(40)), UDP),
            "SCTP": (sctp(payload=bytes(36)), SCTP),
            "echo": self.ping,
            "GRE": (bytes(48), GRE),
        }

    def query(self, wire: Wire = OUT, dport: int = 53) -> bytes:
        """Return a frame with a UDP datagram of 48 bytes."""
        return self.wrap(wire, udp(40000, dport, bytes(40)), UDP)

    def opening(self, wire: Wire = OUT, dport: int = 443, sport: int = 40000) -> bytes:
        """Return a frame with a SYN of 48 bytes."""
        return self.wrap(wire, tcp(sport, dport, payload=bytes(28)), TCP)

    def id(self, ipv4: str, ipv6: str) -> str:
        return ipv4 if self.name == "IPv4" else ipv6

    def case(self, ipv4: str, ipv6: str, name: str, fixture: Fixture, *steps: object) -> Case:
        title = f"{self.id(ipv4, ipv6)} {name}, {self.name}"
        return Case(title, fixture, steps)  # type: ignore[arg-type]


FAMILIES = (
    Family("IPv4", Wire.wrap4, (echo(8, payload=bytes(40)), ICMP), STRANGER4, OTHER_VM4, VM4),
    Family("IPv6", Wire.wrap6, (echo(128, payload=bytes(40)), ICMPV6), STRANGER6, OTHER_VM6, VM6),
)


def _accepted(family: Family) -> Iterator[Case]:
    for name, (segment, protocol) in family.segments().items():
        frame = family.wrap(OUT, segment, protocol)
        fixture, first = (OTHER_PROTOCOLS, by_rule("gre")) if name == "GRE" else (TYPICAL, DEFAULT)
        yield family.case(
            "D4",
            "E13",
            f"{name} in two pieces",
            fixture,
            out(piece(frame, 0, FIRST), first),
            out(piece(frame, FIRST), ESTABLISHED),
        )
        yield family.case(
            "D4",
            "E13",
            f"{name} in three pieces, the packet sent twice",
            fixture,
            out(piece(frame, 0, FIRST), first),
            out(piece(frame, FIRST, 32), ESTABLISHED),
            out(piece(frame, 32), ESTABLISHED),
            out(piece(frame, 0, FIRST, identification=78), ESTABLISHED),
            out(piece(frame, FIRST, identification=78), ESTABLISHED),
        )
        if name != "GRE":
            frame = family.wrap(IN, segment, protocol)
            yield family.case(
                "D4",
                "E13",
                f"{name} from outside in two pieces",
                OPEN,
                into(piece(frame, 0, FIRST), DEFAULT),
                into(piece(frame, FIRST), ESTABLISHED),
            )
    answer = family.wrap(IN, udp(53, 40000, bytes(40)), UDP)
    yield family.case(
        "D4",
        "E13",
        "fragments of an answer",
        TYPICAL,
        out(family.query(), DEFAULT),
        into(piece(answer, 0, FIRST), ESTABLISHED),
        into(piece(answer, FIRST), ESTABLISHED),
    )


def _ports(family: Family) -> Iterator[Case]:
    site, mail = family.opening(IN), family.opening(IN, 25)
    for dport, judged, rest in (
        (443, by_rule("site"), ESTABLISHED),
        (25, DENIED, FRAGMENT),
        (3306, by_rule("nope", Verdict.REJECT), FRAGMENT),
    ):
        frame = family.opening(IN, dport)
        yield family.case(
            "D1",
            "E13",
            f"the first piece is judged by its ports, {dport}",
            SERVER,
            into(piece(frame, 0, FIRST), judged),
            into(piece(frame, FIRST), rest),
        )
    yield family.case(
        "D5",
        "E13",
        "later piece of nothing, though its addresses have a flow and its bytes look like TCP",
        SERVER,
        into(site, by_rule("site")),
        into(piece(family.wrap(IN, bytes(24) + tcp(), TCP), FIRST), FRAGMENT),
    )
    denied = Expected(Verdict.WOULD_DROP, Reason.DEFAULT)
    yield family.case(
        "D5",
        "E13",
        "monitor remembers nothing that it would drop",
        WATCHED,
        into(piece(mail, 0, FIRST), denied),
        into(piece(mail, FIRST), Expected(Verdict.WOULD_DROP, Reason.FRAGMENT)),
    )


def _order(family: Family) -> Iterator[Case]:
    frame = family.query()
    first, middle, last = piece(frame, 0, 24), piece(frame, 24, 32), piece(frame, 32)
    yield family.case(
        "D6",
        "E13",
        "in reverse order, then again in order",
        TYPICAL,
        out(last, FRAGMENT),
        out(middle, FRAGMENT),
        out(first, DEFAULT),
        out(middle, ESTABLISHED),
        out(last, ESTABLISHED),
    )
    yield family.case(
        "D6",
        "E13",
        "last before middle, all twice",
        TYPICAL,
        out(first, DEFAULT),
        *(out(last, ESTABLISHED), out(middle, ESTABLISHED)) * 2,
        out(first, ESTABLISHED),
        out(last, ESTABLISHED),
    )


def _overlaps(family: Family) -> Iterator[Case]:
    frame = family.query()
    first, last = out(piece(frame, 0, 24), DEFAULT), piece(frame, 24)
    for name, overlapping in {
        "its tail by one unit": piece(frame, 16),
        "all but its head": piece(frame, 8),
        "its tail from the middle, more to come": piece(frame, 16, 40),
        "its head, from offset 1 and more to come": piece(frame, 8, 16),
    }.items():
        yield family.case(
            "D7",
            "E16",
            f"a piece that overlaps the first one, {name}",
            TYPICAL,
            first,
            out(overlapping, FRAGMENT),
            out(last, FRAGMENT),
            out(piece(frame, 0, 24), ESTABLISHED),
            out(last, ESTABLISHED),
        )
    opening = family.opening()
    yield family.case(
        "D3",
        "E13",
        "flags of TCP rewritten from offset 1",
        TYPICAL,
        out(piece(opening, 0, FIRST), DEFAULT),
        out(piece(family.wrap(OUT, bytes(8) + tcp(), TCP), 8), FRAGMENT),
        out(piece(opening, FIRST), FRAGMENT),
    )
    yield family.case(
        "D7",
        "E17",
        "one id, another protocol",
        TYPICAL,
        first,
        out(piece(frame, 24, protocol=TCP), FRAGMENT),
        out(last, ESTABLISHED),
    )


def _ids(family: Family) -> Iterator[Case]:
    frame = family.query()
    first, last = out(piece(frame, 0, 24), DEFAULT), out(piece(frame, 24), ESTABLISHED)
    answer = family.wrap(IN, udp(53, 40000, bytes(40)), UDP)
    elsewhere = family.wrap(OUT, udp(payload=bytes(40)), UDP, remote=family.stranger)
    spoofed = family.wrap(OUT, udp(payload=bytes(40)), UDP, local=family.other_vm)
    yield family.case(
        "D10",
        "E13",
        "what is remembered is of this id, these addresses and this direction",
        TYPICAL,
        first,
        out(piece(frame, 24, identification=78), FRAGMENT),
        out(piece(frame, 24, identification=77 << 8), FRAGMENT),
        out(piece(elsewhere, 24), FRAGMENT),
        out(piece(spoofed, 24), dropped(Reason.SPOOF_ADDRESS)),
        into(piece(answer, 24), FRAGMENT),
        last,
    )
    web, telnet = family.opening(), family.opening(dport=23)
    yield family.case(
        "D10",
        "E13",
        "the id used again by a denied packet",
        SERVER,
        out(piece(web, 0, FIRST), DEFAULT),
        out(piece(web, FIRST), ESTABLISHED),
        out(piece(telnet, 0, FIRST), by_rule("no-telnet", Verdict.DROP)),
        out(piece(web, FIRST), FRAGMENT),
    )
    yield family.case(
        "D10",
        "E13",
        "the id used again by an accepted packet, which ends with its own flow",
        TYPICAL,
        out(piece(web, 0, FIRST), DEFAULT),
        out(piece(family.opening(sport=40001), 0, FIRST), DEFAULT),
        out(piece(web, FIRST), ESTABLISHED),
        out(family.wrap(OUT, tcp(40001, flags="R", seq=1001), TCP), ESTABLISHED),
        Wait(12),
        out(piece(web, FIRST), FRAGMENT),
    )
    tagged_frame = tagged(frame, 100)
    yield family.case(
        "D13",
        "E13",
        "what is remembered is of this VLAN",
        TRUNK,
        out(piece(tagged_frame, 0, 24), DEFAULT),
        out(piece(frame, 24), FRAGMENT),
        out(piece(tagged(frame, 4094), 24), FRAGMENT),
        out(piece(tagged_frame, 24), ESTABLISHED),
    )
    syn = tagged(family.opening(), 100)
    yield family.case(
        "D13",
        "E13",
        "SYN in a tag, in pieces",
        TRUNK,
        out(piece(syn, 0, FIRST), DEFAULT),
        out(piece(syn, FIRST), ESTABLISHED),
    )


def _changes(family: Family) -> Iterator[Case]:
    frame = family.query()
    first, last = out(piece(frame, 0, 24), DEFAULT), piece(frame, 24)
    yield family.case(
        "D4",
        "E13",
        "the flow revoked between its pieces",
        TYPICAL,
        first,
        Apply(NOTHING_ACCEPTED),
        out(last, DENIED),
        out(last, FRAGMENT),
    )
    dns = egress("dns", Action.ACCEPT, services=(ports(UDP, 53),))
    only_dns = policy(dns, ingress=Action.DROP, egress=Action.DROP)
    yield family.case(
        "D4",
        "E13",
        "the flow confirmed between its pieces",
        TYPICAL,
        first,
        Apply(only_dns),
        out(last, Expected(Verdict.ACCEPT, Reason.CT_ESTABLISHED, "dns")),
        out(last, ESTABLISHED),
    )
    yield family.case(
        "D4", "E13", "pieces within 30 s", TYPICAL, first, Wait(28), out(last, ESTABLISHED)
    )
    yield family.case(
        "D4", "E13", "pieces 30 s apart", TYPICAL, first, Wait(32), out(last, FRAGMENT)
    )


def _long_flows() -> Iterator[Case]:
    """The flow outlives what is remembered of a datagram, and the other way round."""
    data = sent("A", 1001, 5001, bytes(28))
    first, last = out(piece(data, 0, 24), ESTABLISHED), piece(data, 24)
    yield Case(
        "D4 later pieces do not lengthen the 30 s",
        TYPICAL,
        (
            *HANDSHAKE,
            first,
            Wait(28),
            out(last, ESTABLISHED),
            Wait(4),
            out(last, FRAGMENT),
            first,
            out(last, ESTABLISHED),
        ),
    )
    yield Case(
        "D4 a flow that ended takes its pieces along",
        TYPICAL,
        (
            *HANDSHAKE,
            first,
            into(got("R", 5001, 0), ESTABLISHED),
            Wait(8),
            out(last, ESTABLISHED),
            Wait(4),
            out(last, FRAGMENT),
        ),
    )


def _tiny(family: Family) -> Iterator[Case]:
    """First fragments whose upper header is not whole, and the shortest that are."""
    optioned = tcp(words=8, payload=bytes(28))
    for name, (segment, protocol, size) in {
        "8 bytes of TCP": (tcp(payload=bytes(28)), TCP, 8),
        "16 bytes of TCP": (tcp(payload=bytes(28)), TCP, 16),
        "24 of 32 bytes of TCP's header": (optioned, TCP, 24),
        "8 bytes of SCTP": (sctp(payload=bytes(36)), SCTP, 8),
        "UDP that claims to be whole": (udp(payload=bytes(40), length=16), UDP, 24),
        "UDP with length 7": (udp(payload=bytes(40), length=7), UDP, 24),
    }.items():
        frame = family.wrap(OUT, segment, protocol)
        yield family.case(
            "D2",
            "E12",
            name,
            OPEN,
            out(piece(frame, 0, size), FRAGMENT),
            out(piece(frame, size), FRAGMENT),
        )
    for name, (segment, protocol, size) in {
        "32 bytes of TCP's header": (optioned, TCP, 32),
        "8 bytes of UDP": (udp(payload=bytes(40)), UDP, 8),
        "8 bytes of an echo": (*family.ping, 8),
        "16 bytes of SCTP": (sctp(payload=bytes(36)), SCTP, 16),
    }.items():
        frame = family.wrap(OUT, segment, protocol)
        yield family.case(
            "D1",
            "E12",
            f"{name} are enough",
            OPEN,
            out(piece(frame, 0, size), DEFAULT),
            out(piece(frame, size), ESTABLISHED),
        )
    frame = family.wrap(OUT, *family.ping)
    yield family.case(
        "D12",
        "E13",
        "a later piece of 4 bytes of an echo",
        OPEN,
        out(piece(frame, 0, 40), DEFAULT),
        out(piece(frame, 40, 44, more=False), ESTABLISHED),
        out(piece(frame, 40, 44, more=False, identification=78), FRAGMENT),
    )


def _impossible(family: Family) -> Iterator[Case]:
    frame = family.query()
    first, last = out(piece(frame, 0, 24), DEFAULT), out(piece(frame, 24), ESTABLISHED)
    later = {
        "D8 the end beyond 65535": piece(frame, 24, place=65528),
        "D8 the end just beyond 65535": piece(frame, 0, 16, place=65520, more=False),
        "D9 23 bytes and more to come": piece(frame, 24, 47),
        "D9 no bytes": piece(frame, 48),
        "D9 no bytes and more to come": piece(frame, 48, more=True),
    }
    for name, broken in later.items():
        identity, title = name.split(" ", 1)
        yield family.case(
            identity,
            identity if identity == "D8" else "E13",
            f"later piece, {title}",
            TYPICAL,
            first,
            out(broken, FRAGMENT),
            last,
        )
    for name, broken in {
        "23 bytes and more to come": piece(frame, 0, 23),
        "no bytes and more to come": piece(frame, 0, 0),
    }.items():
        yield family.case(
            "D9", "E13", f"first piece, {name}", TYPICAL, first, out(broken, FRAGMENT)
        )
    yield family.case(
        "D8",
        "E13",
        "the end at 65535",
        TYPICAL,
        first,
        out(piece(frame, 0, 15, place=65520, more=False), ESTABLISHED),
    )


def _all(family: Family) -> Iterator[Case]:
    yield from _accepted(family)
    yield from _ports(family)
    yield from _order(family)
    yield from _overlaps(family)
    yield from _ids(family)
    yield from _changes(family)
    yield from _tiny(family)
    yield from _impossible(family)


CASES: tuple[Case, ...] = (
    *(case for family in FAMILIES for case in _all(family)),
    *_long_flows(),
)
