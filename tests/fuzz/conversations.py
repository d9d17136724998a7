# SPDX-License-Identifier: Apache-2.0
"""Sequences to start from: conversations between the VM and its peers, and the tables' stories."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final

from tests.cases import TABLES
from tests.cases.table import Send, Wait
from tests.frames import (
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
    VM4,
    VM6,
    bootp,
    echo,
    icmp_error,
    sctp,
    tagged,
    tcp,
    udp,
)
from tests.fuzz.trial import Shot
from vgw.abi import Path
from vgw.policy.flows import other

Story = tuple[Shot | Wait, ...]

_HOSTS: Final = ((VM4, PEER4), (VM6, PEER6), (VM4, STRANGER4), (VM6, STRANGER6))
_PORTS: Final = ((40000, 443), (40001, 22), (40000, 3306), (40002, 8050), (1024, 23), (53, 53))
_MSS: Final = 1000


class _Talk:
    """Makes the packets of one conversation; `client` is the path of the side that opens."""

    def __init__(self, client: Path, hosts: tuple[str, str], vlan: int = 0) -> None:
        self.client = client
        self.hosts = hosts
        self.vlan = vlan
        self.is_ipv4 = "." in hosts[0]
        self.echo_protocol = ICMP if self.is_ipv4 else ICMPV6

    def shot(self, by_client: bool, segment: bytes, protocol: int) -> Shot:
        path = self.client if by_client else other(self.client)
        wire = OUT if path is Path.FROM_VM else IN
        frame = wire.wrap(segment, protocol, *self.hosts)
        return Shot(path, tagged(frame, self.vlan) if self.vlan else frame)

    def error(self, by_client: bool, about: Shot, kind: int, code: int = 0, rest: int = 0) -> Shot:
        """Return an ICMP error about a packet of this conversation."""
        quoted = about.frame[18 if self.vlan else 14 :]
        return self.shot(by_client, icmp_error(kind, quoted, code, rest), self.echo_protocol)


def _tcp(talk: _Talk, ports: tuple[int, int], end: str) -> Iterator[Shot]:
    """Yield handshake, data and an end: the letters are what either side sends, server's lower."""
    here, there = 1000, 5000
    size = {True: here, False: there}

    def segment(by_client: bool, flags: str, payload: bytes = b"") -> Shot:
        sport, dport = ports if by_client else ports[::-1]
        acknowledged = size[not by_client] if "A" in flags else 0
        made = tcp(sport, dport, flags, seq=size[by_client], ack=acknowledged, payload=payload)
        size[by_client] += len(payload) + ("S" in flags) + ("F" in flags)
        return talk.shot(by_client, made, TCP)

    yield segment(True, "S")
    yield segment(False, "SA")
    yield segment(True, "A")
    request = segment(True, "PA", b"GET /")
    yield request
    yield segment(False, "A", bytes(_MSS))
    if end == "error":
        kind, code = (3, 4) if talk.is_ipv4 else (2, 0)
        yield talk.error(False, request, kind, code, 1400)
    for letter in end if end != "error" else "FfAa":
        yield segment(letter.isupper(), {"F": "FA", "R": "R", "A": "A", "S": "S"}[letter.upper()])


def _datagrams(talk: _Talk, ports: tuple[int, int], protocol: int) -> Iterator[Shot]:
    make = udp if protocol == UDP else sctp
    question = talk.shot(True, make(*ports, b"question"), protocol)
    yield question
    yield talk.shot(False, make(*ports[::-1], b"answer"), protocol)
    yield talk.shot(True, make(*ports, b"again"), protocol)
    kind, code = (3, 3) if talk.is_ipv4 else (1, 4)
    yield talk.error(False, question, kind, code)
    yield talk.shot(False, make(*ports[::-1], bytes(_MSS)), protocol)


def _others(talk: _Talk) -> Iterator[Story]:
    ping, pong = (8, 0) if talk.is_ipv4 else (128, 129)
    for identifier in (7, 8):
        asked = talk.shot(True, echo(ping, identifier), talk.echo_protocol)
        answered = talk.shot(False, echo(pong, identifier), talk.echo_protocol)
        back = talk.shot(False, echo(ping, identifier), talk.echo_protocol)
        kind = 11 if talk.is_ipv4 else 3
        yield asked, answered, asked, talk.error(False, asked, kind), back
    for protocol in (47, 50, 4, 41, 253):
        payload = bytes(range(32))
        yield talk.shot(True, payload, protocol), talk.shot(False, payload, protocol)


def _conversations() -> Iterator[Story]:
    for client in Path:
        for hosts in _HOSTS:
            talk = _Talk(client, hosts)
            yield from _others(talk)
            for ports in _PORTS:
                for end in ("FAfAa", "fAFa", "R", "r", "Ff", "S", "error"):
                    yield tuple(_tcp(talk, ports, end))
                for protocol in (UDP, SCTP):
                    yield tuple(_datagrams(talk, ports, protocol))
        for vlan in (100, 4094):
            yield tuple(_tcp(_Talk(client, _HOSTS[0], vlan), _PORTS[0], "Ff"))
            yield tuple(_datagrams(_Talk(client, _HOSTS[1], vlan), _PORTS[0], UDP))


def _dhcp() -> Iterator[Story]:
    ask = OUT.wrap4(udp(68, 67, bootp()), UDP, local="0.0.0.0", remote="255.255.255.255")  # noqa: S104
    ask = b"\xff" * 6 + ask[6:]
    offer = IN.wrap4(udp(67, 68, bootp(2)), UDP)
    yield Shot(Path.FROM_VM, ask), Shot(Path.TO_VM, offer), Wait(59), Shot(Path.TO_VM, offer)


def _told() -> Iterator[Story]:
    """Yield the packets and pauses of the verdict tables' stories."""
    for case in chain(*TABLES.values()):
        story = tuple(
            Shot(step.path, step.frame, step.gso) if isinstance(step, Send) else step
            for step in case.steps
            if isinstance(step, Wait) or (isinstance(step, Send) and step.for_test_run)
        )
        if sum(isinstance(step, Shot) for step in story) > 1:
            yield story[:30]


def make_stories() -> tuple[Story, ...]:
    """Return all stories, in an order that never changes."""
    return (*_conversations(), *_dhcp(), *_told())


def table_frames() -> Iterator[Shot]:
    """Yield the packets of the verdict tables that a test run can be given."""
    for case in chain(*TABLES.values()):
        for step in case.steps:
            if isinstance(step, Send) and step.for_test_run:
                yield Shot(step.path, step.frame, step.gso)
