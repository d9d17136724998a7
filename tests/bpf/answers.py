# SPDX-License-Identifier: Apache-2.0
"""Endpoints that reject everything, their answers taken apart, and what an answer must be.

In a test run an answer goes nowhere: it is the frame that the program leaves.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from tests.cases.fixtures import GUARDED, egress, ingress, policy
from tests.frames import (
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    IN,
    OUT,
    TCP,
    VM_MAC,
    Wire,
)
from tests.program_engine import ProgramEngine
from vgw import libbpf, loader
from vgw.abi import Action, Mode, Path, Verdict
from vgw.policy.frame import internet_checksum
from vgw.policy.guards import EndpointFacts, endpoint_facts
from vgw.policy.model import ANY_SERVICE, EffectivePolicy, Hook, Interface, Service
from vgw.policy.packet_fields import ETHERTYPE_IPV4, ETHERTYPE_IPV6

VLAN_ID = 100
TRUNK = replace(GUARDED, vlans=(VLAN_ID,))
#: Every protocol that is rejected only by its number, in a test or by mistake.
NUMBERS = (0, 1, 2, 47, 50, 58, 253)
SERVICES = (ANY_SERVICE, *(Service(number) for number in NUMBERS))
REJECTING = policy(
    ingress("no", Action.REJECT, services=SERVICES),
    egress("no", Action.REJECT, services=SERVICES),
    ingress=Action.DROP,
    egress=Action.DROP,
)
DROPPING = policy(ingress=Action.DROP, egress=Action.DROP)
ACCEPTING = policy(ingress=Action.ACCEPT, egress=Action.ACCEPT)
PLENTY = 10_000
XDP_DROP, XDP_TX = 1, 3
TC_SHOT, TC_REDIRECT = 2, 7

SKB_MARK = 8  # offset in struct __sk_buff
ACK, RST = 0x10, 0x04
UNREACHABLE = {4: (3, 13), 6: (1, 1)}
PATHS = pytest.mark.parametrize("path", Path, ids=lambda path: path.name.lower())
FAMILIES = pytest.mark.parametrize("family", [4, 6])


class Answers(NamedTuple):
    """What has become of the answers."""

    sent: int
    suppressed: int
    failed: int


class Rejecter:
    """An endpoint that rejects everything, and what it answers."""

    def __init__(
        self,
        artefact: loader.Artefact,
        hook: Hook,
        *,
        facts: EndpointFacts | None = None,
        rules: EffectivePolicy = REJECTING,
        per_second: int = PLENTY,
    ) -> None:
        facts = facts or facts_of(TRUNK)
        self.hook = hook
        self.engine = ProgramEngine(artefact, hook, facts, rules, reject_per_second=per_second)

    def run(self, path: Path, frame: bytes) -> bytes | None:
        """Return the answer to a frame, None when it is only dropped."""
        run = libbpf.prog_test_run(self.engine.program(path), frame)
        is_xdp = path is Path.FROM_VM and self.hook is Hook.XDP
        answered, dropped = (XDP_TX, XDP_DROP) if is_xdp else (TC_REDIRECT, TC_SHOT)
        assert run.retval in (answered, dropped)
        return run.data_out if run.retval == answered else None

    def answer(self, path: Path, frame: bytes) -> bytes:
        """Return the answer that there must be."""
        before = self.answers()
        answer = self.run(path, frame)
        assert answer is not None, "not answered"
        assert self.answers() == before._replace(sent=before.sent + 1)
        return answer

    def answers(self) -> Answers:
        """Return what has become of the answers so far."""
        meter = self.engine.maps.reject_meter()
        return Answers(meter.sent, meter.suppressed, meter.failed)


Step = tuple[Path, bytes]


def run_revoked(
    artefact: loader.Artefact, opening: Step, later: Step
) -> tuple[bytes | None, Verdict, Answers]:
    """Let a flow open, then reject everything: what a later packet of it gets, and what was sent.

    The packet's verdict is that of its flow, so even those get REJECT that cannot open one.
    """
    rejecter = Rejecter(artefact, Hook.XDP, rules=ACCEPTING)
    try:
        path, frame = opening
        libbpf.prog_test_run(rejecter.engine.program(path), frame)
        rejecter.engine.set_policy(REJECTING)
        before = rejecter.engine.maps.stats()
        answer = rejecter.run(*later)
        ((_, verdict, _),) = rejecter.engine.maps.stats().keys() - before.keys()
        return answer, verdict, rejecter.answers()
    finally:
        rejecter.engine.close()


def facts_of(interface: Interface, mode: Mode = Mode.ENFORCE) -> EndpointFacts:
    return endpoint_facts(replace(interface, conntrack_max=1024), mode)


@dataclass(frozen=True)
class Answer:
    """An answer taken apart; `link` is what is in front of the IP header."""

    link: bytes
    family: int
    source: bytes
    destination: bytes
    protocol: int
    hop_limit: int
    message: bytes

    @classmethod
    def of(cls, frame: bytes) -> Answer:
        """Take an answer apart that has no byte too many and a right IP header."""
        size = 18 if frame[12:14] == b"\x81\x00" else 14
        link, packet = frame[:size], frame[size:]
        if int.from_bytes(link[-2:], "big") == ETHERTYPE_IPV4:
            assert packet[0] == 0x45
            assert packet[6:8] == b"\x40\0", "it must not be fragmented"
            assert int.from_bytes(packet[2:4], "big") == len(packet)
            assert internet_checksum(packet[:20]) == 0
            fields = packet[12:16], packet[16:20], packet[9], packet[8], packet[20:]
            return cls(link, 4, *fields)
        assert int.from_bytes(link[-2:], "big") == ETHERTYPE_IPV6
        assert packet[:4] == b"\x60\0\0\0"
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
        return cls(link, 6, packet[8:24], packet[24:40], packet[6], packet[7], packet[40:])

    def checksum(self, message: bytes) -> int:
        """Return what is wrong with the checksum in a message of this answer; 0: it is right."""
        pseudo = self.source + self.destination + struct.pack("!II", len(message), self.protocol)
        return internet_checksum((b"" if self.protocol == ICMP else pseudo) + message)

    def completed(self, offset: int) -> bytes:
        """Return the message after a card has filled in a checksum at an offset, as Linux does."""
        filled = internet_checksum(self.message) or 0xFFFF
        return self.message[:offset] + struct.pack("!H", filled) + self.message[offset + 2 :]


def check_addresses(answer: Answer, path: Path, frame: bytes) -> None:
    """The answer goes the way back that the frame came, by its MACs, tag and addresses."""
    size = len(answer.link)
    packet = frame[size:]
    at = slice(12, 20) if answer.family == 4 else slice(8, 40)
    half = (at.stop - at.start) // 2
    assert answer.link == frame[6:12] + frame[:6] + frame[12:size]
    assert answer.destination + answer.source == packet[at][:half] + packet[at][half:]
    assert answer.link[6:12] == (GATEWAY_MAC if path is Path.FROM_VM else VM_MAC)
    assert answer.hop_limit == 64


def wrap(wire: Wire, family: int, segment: bytes, protocol: int) -> bytes:
    if family == 6:
        return wire.wrap6(segment, ICMPV6 if protocol == ICMP else protocol)
    return wire.wrap4(segment, protocol)


def wire_of(path: Path) -> Wire:
    return OUT if path is Path.FROM_VM else IN


def check_reset(answer: Answer, segment: bytes, expected: tuple[int, int, int]) -> None:
    """The answer is a RST with these numbers, right whoever computes its checksum."""
    reset = answer.message
    assert answer.protocol == TCP
    assert len(reset) == 20
    assert reset[:4] == segment[2:4] + segment[:2]
    sequence, acknowledged, offset, flags = struct.unpack("!IIBB", reset[4:14])
    assert (sequence, acknowledged, flags) == expected
    assert offset == 0x50
    assert reset[18:20] == b"\0\0"
    assert answer.checksum(reset) == 0
    completed = answer.completed(16)
    assert answer.checksum(completed) == 0
    assert completed[:16] == reset[:16]


def check_error(answer: Answer, packet: bytes, *, is_udp: bool) -> None:
    """The answer quotes the packet's header and at most 8 bytes; its checksum is right."""
    error = answer.message
    assert answer.protocol == (ICMP if answer.family == 4 else ICMPV6)
    assert tuple(error[:2]) == UNREACHABLE[answer.family]
    assert error[8:] == packet[: (28 if answer.family == 4 else 48)]
    assert error[4:6] == b"\0\0"
    assert answer.checksum(error) == 0
    if not is_udp:
        assert error[6:8] == b"\0\0"
        return
    completed = answer.completed(6)
    assert answer.checksum(completed) == 0
    assert completed[:6] + completed[8:] == error[:6] + error[8:]
