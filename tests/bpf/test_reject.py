# SPDX-License-Identifier: Apache-2.0
"""Answers to rejected packets, byte by byte, as the programs make them of the packets.

In a test run an answer goes nowhere: it is the frame that the program leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from tests.cases.fixtures import GUARDED, UNGUARDED, egress, ingress, policy
from tests.frames import (
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    IN,
    OUT,
    PEER4,
    PEER6,
    SCTP,
    TCP,
    UDP,
    VM4,
    VM6,
    VM_MAC,
    Wire,
    echo,
    ethernet,
    fragment6,
    icmp,
    icmp_error,
    ipv4,
    ipv6,
    sctp,
    tagged,
    tcp,
    udp,
)
from tests.program_engine import SKB_SIZE, ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import Action, Mode, Path
from vgw.policy.frame import internet_checksum
from vgw.policy.guards import EndpointFacts, endpoint_facts
from vgw.policy.model import ANY_SERVICE, EffectivePolicy, Hook, Interface, Service
from vgw.policy.packet_fields import ETHERTYPE_IPV4, ETHERTYPE_IPV6

pytestmark = pytest.mark.bpf

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


def facts_of(interface: Interface, mode: Mode = Mode.ENFORCE) -> EndpointFacts:
    return endpoint_facts(replace(interface, conntrack_max=1024), mode)


@pytest.fixture(scope="module", params=[Hook.XDP, Hook.TC], ids=str)
def rejecter(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[Rejecter]:
    made = Rejecter(artefact, request.param)
    yield made
    made.engine.close()


# --- reading an answer ---------------------------------------------------------------------------


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


# --- TCP -----------------------------------------------------------------------------------------

#: Name -> the segment and the sequence number, acknowledgement and flags of its answer.
SEGMENTS = {
    "SYN": (tcp(flags="S", seq=1000), 0, 1001, RST | ACK),
    "SYN with options": (tcp(flags="S", seq=7, words=10, payload=bytes(20)), 0, 8, RST | ACK),
    "SYN with data": (tcp(flags="S", seq=7, words=6, payload=bytes(13)), 0, 17, RST | ACK),
    "last sequence number": (tcp(flags="S", seq=0xFFFFFFFF), 0, 0, RST | ACK),
}


@PATHS
@FAMILIES
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("padding", [0, 6])
def test_catalogue_H12_tcp_gets_a_reset(
    rejecter: Rejecter, path: Path, family: int, name: str, padding: int
) -> None:
    segment, sequence, acknowledged, flags = SEGMENTS[name]
    frame = wrap(wire_of(path), family, segment, TCP) + bytes(padding)
    answer = Answer.of(rejecter.answer(path, frame))
    check_addresses(answer, path, frame)
    check_reset(answer, segment, (sequence, acknowledged, flags))


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


@PATHS
@FAMILIES
def test_catalogue_H12_tcp_with_ack_gets_its_number(
    artefact: loader.Artefact, path: Path, family: int
) -> None:
    """A connection that a new policy rejects: the number that its peer waits for, nothing else."""
    rejecter = Rejecter(artefact, Hook.XDP, rules=ACCEPTING)
    wire = wire_of(path)
    try:
        syn = wrap(wire, family, tcp(flags="S"), TCP)
        passed = libbpf.prog_test_run(rejecter.engine.program(path), syn)
        assert passed.data_out == syn
        rejecter.engine.set_policy(REJECTING)
        data = tcp(flags="AP", seq=1001, ack=77777, payload=bytes(500))
        frame = wrap(wire, family, data, TCP)
        answer = Answer.of(rejecter.answer(path, frame))
    finally:
        rejecter.engine.close()
    check_addresses(answer, path, frame)
    check_reset(answer, data, (77777, 0, RST))


# --- everything else -----------------------------------------------------------------------------

#: Name -> protocol (ICMP: ICMPv6 in IPv6), upper part for IPv4 and for IPv6.
MESSAGES = {
    "UDP": (UDP, udp(payload=b"question"), udp(payload=b"question")),
    "UDP without payload": (UDP, udp(), udp()),
    "UDP, 1400 bytes": (UDP, udp(payload=bytes(1400)), udp(payload=bytes(1400))),
    "SCTP": (SCTP, sctp(payload=bytes(20)), sctp(payload=bytes(20))),
    "ping": (ICMP, echo(8), echo(128)),
    "GRE": (47, bytes(range(40)), bytes(range(40))),
    "five bytes": (253, bytes(range(1, 6)), bytes(range(1, 6))),
    "one byte": (253, b"x", b"x"),
}


@PATHS
@FAMILIES
@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("padding", [0, 22])
def test_catalogue_H12_others_get_prohibited(
    rejecter: Rejecter, path: Path, family: int, name: str, padding: int
) -> None:
    protocol, *segments = MESSAGES[name]
    frame = wrap(wire_of(path), family, segments[family == 6], protocol)
    answer = Answer.of(rejecter.answer(path, frame + bytes(padding)))
    check_addresses(answer, path, frame)
    check_error(answer, frame[14:], is_udp=protocol == UDP)


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


def test_completing_a_checksum_breaks_other_messages(rejecter: Rejecter) -> None:
    """The control: an answer that does not foresee it is not right any more after that."""
    frame = OUT.wrap6(echo(128), ICMPV6)
    answer = Answer.of(rejecter.answer(Path.FROM_VM, frame))
    assert answer.checksum(answer.message) == 0
    assert answer.checksum(answer.completed(6)) != 0


@PATHS
@FAMILIES
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_catalogue_H12_the_tag_is_kept(
    rejecter: Rejecter, path: Path, family: int, protocol: int
) -> None:
    frame = tagged(wrap(wire_of(path), family, tcp() if protocol == TCP else udp(), protocol), 100)
    answer = Answer.of(rejecter.answer(path, frame))
    assert len(answer.link) == 18
    check_addresses(answer, path, frame)
    assert answer.checksum(answer.message) == 0


@PATHS
@pytest.mark.parametrize("ttl", [0, 1])
def test_catalogue_C9_the_answer_has_a_ttl_of_its_own(
    rejecter: Rejecter, path: Path, ttl: int
) -> None:
    frame = wire_of(path).wrap4(udp(), UDP, ttl=ttl)
    assert Answer.of(rejecter.answer(path, frame)).hop_limit == 64


@PATHS
@FAMILIES
@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_catalogue_C9_no_answer_is_answered(
    rejecter: Rejecter, path: Path, family: int, protocol: int
) -> None:
    segment = {TCP: tcp(), UDP: udp(), ICMP: echo(8 if family == 4 else 128)}[protocol]
    answer = rejecter.answer(path, wrap(wire_of(path), family, segment, protocol))
    other = Path.FROM_VM if path is Path.TO_VM else Path.TO_VM
    assert rejecter.run(other, answer) is None


# --- never ---------------------------------------------------------------------------------------


def never_either(wire: Wire) -> Iterator[tuple[str, bytes]]:
    """Yield what is not answered on either path."""
    quoted = ipv4(udp(), UDP, PEER4, VM4)
    yield "TCP RST", wire.wrap4(tcp(flags="R"), TCP)
    yield "TCP RST with ACK", wire.wrap6(tcp(flags="RA"), TCP)
    yield "ICMP error", wire.wrap4(icmp_error(3, quoted, 3), ICMP)
    yield "ICMPv6 error", wire.wrap6(icmp_error(1, ipv6(udp(), UDP, PEER6, VM6), 4), ICMPV6)
    yield "echo reply", wire.wrap4(echo(0), ICMP)
    yield "ICMPv6 echo reply", wire.wrap6(echo(129), ICMPV6)
    yield "ICMP timestamp", wire.wrap4(icmp(13, payload=bytes(12)), ICMP)
    yield "node information", wire.wrap6(icmp(139, payload=bytes(8)), ICMPV6)
    yield "ICMPv6 in IPv4", wire.wrap4(echo(128), ICMPV6)
    yield "ICMP in IPv6", wire.wrap6(echo(8), ICMP)
    yield "fragment", wire.wrap4(udp(payload=bytes(24)), UDP, fragment=0x2000)
    yield "later fragment", wire.wrap4(bytes(24), UDP, fragment=3)
    yield "atomic fragment", wire.wrap6(udp(), UDP, headers=fragment6(UDP), first=44)
    yield "unreadable", wire.wrap4(b"", TCP)


def out_frame(destination: str, mac: bytes, source: str | None = None) -> bytes:
    """Return a UDP frame that the VM sends."""
    if ":" in destination:
        packet = ipv6(udp(), UDP, source or VM6, destination)
        return ethernet(packet, ETHERTYPE_IPV6, source=VM_MAC, destination=mac)
    packet = ipv4(udp(), UDP, source or VM4, destination)
    return ethernet(packet, ETHERTYPE_IPV4, source=VM_MAC, destination=mac)


def in_frame(source: str, *, mac: bytes = GATEWAY_MAC, destination: str | None = None) -> bytes:
    """Return a UDP frame toward the VM."""
    if ":" in source:
        packet = ipv6(udp(), UDP, source, destination or VM6)
        return ethernet(packet, ETHERTYPE_IPV6, source=mac, destination=VM_MAC)
    packet = ipv4(udp(), UDP, source, destination or VM4)
    return ethernet(packet, ETHERTYPE_IPV4, source=mac, destination=VM_MAC)


BROADCAST_MAC = b"\xff" * 6
GROUP_MAC = bytes.fromhex("01005e010203")
#: Name -> path and frame that is not answered.
NEVER = {
    **{
        f"{name}, {wire.path.name.lower()}": (wire.path, frame)
        for wire in (OUT, IN)
        for name, frame in never_either(wire)
    },
    "to a group": (Path.FROM_VM, out_frame("239.1.2.3", GROUP_MAC)),
    "to a group by a unicast MAC": (Path.FROM_VM, out_frame("239.1.2.3", GATEWAY_MAC)),
    "to a group, IPv6": (Path.FROM_VM, out_frame("ff05::2", bytes.fromhex("333300000002"))),
    "to a group by a unicast MAC, IPv6": (Path.FROM_VM, out_frame("ff05::2", GATEWAY_MAC)),
    "broadcast": (Path.FROM_VM, out_frame("255.255.255.255", BROADCAST_MAC)),
    "directed broadcast": (Path.FROM_VM, out_frame("10.20.0.255", BROADCAST_MAC)),
    "reserved": (Path.FROM_VM, out_frame("240.0.0.1", GATEWAY_MAC)),
    "to nobody": (Path.FROM_VM, out_frame("0.0.0.0", GATEWAY_MAC)),  # noqa: S104
    "to nobody, IPv6": (Path.FROM_VM, out_frame("::", GATEWAY_MAC)),
    "to loopback": (Path.FROM_VM, out_frame("127.0.0.1", GATEWAY_MAC)),
    "to loopback, IPv6": (Path.FROM_VM, out_frame("::1", GATEWAY_MAC)),
    "to itself": (Path.FROM_VM, out_frame(VM4, GATEWAY_MAC)),
    "from nobody": (Path.TO_VM, in_frame("0.0.0.0")),  # noqa: S104
    "from nobody, IPv6": (Path.TO_VM, in_frame("::")),
    "from loopback": (Path.TO_VM, in_frame("127.0.0.1")),
    "from loopback, IPv6": (Path.TO_VM, in_frame("::1")),
    "from a group": (Path.TO_VM, in_frame("224.0.0.1")),
    "from a group, IPv6": (Path.TO_VM, in_frame("ff02::1")),
    "from broadcast": (Path.TO_VM, in_frame("255.255.255.255")),
    "from a group MAC": (Path.TO_VM, in_frame(PEER4, mac=GROUP_MAC)),
    "from itself": (Path.TO_VM, in_frame(VM4)),
    "from itself, IPv6": (Path.TO_VM, in_frame(VM6)),
}


@pytest.mark.parametrize("name", NEVER)
def test_catalogue_H12_never_answered(rejecter: Rejecter, name: str) -> None:
    before = rejecter.answers()
    assert rejecter.run(*NEVER[name]) is None
    assert rejecter.answers() == before


def test_their_neighbours_are_answered(rejecter: Rejecter) -> None:
    """The control: frames that differ from those above only in what keeps them from answers."""
    assert rejecter.run(Path.FROM_VM, out_frame("223.1.2.3", GATEWAY_MAC)) is not None
    assert rejecter.run(Path.FROM_VM, out_frame("128.0.0.1", GATEWAY_MAC)) is not None
    assert rejecter.run(Path.FROM_VM, out_frame("2001:db8::1", GATEWAY_MAC)) is not None
    assert rejecter.run(Path.TO_VM, in_frame("fe80::1")) is not None
    assert rejecter.run(Path.TO_VM, in_frame(PEER4)) is not None


@pytest.mark.parametrize("mode", [Mode.MONITOR, Mode.QUARANTINE])
@PATHS
def test_modes_that_do_not_answer(artefact: loader.Artefact, mode: Mode, path: Path) -> None:
    rejecter = Rejecter(artefact, Hook.TC, facts=facts_of(TRUNK, mode))
    frame = wire_of(path).wrap4(udp(), UDP)
    run = libbpf.prog_test_run(rejecter.engine.program(path), frame)
    assert run.retval == (0xFFFFFFFF if mode is Mode.MONITOR else TC_SHOT)
    assert run.data_out == frame
    assert rejecter.answers() == (0, 0, 0)
    rejecter.engine.close()


@PATHS
def test_a_drop_is_not_answered(artefact: loader.Artefact, path: Path) -> None:
    rejecter = Rejecter(artefact, Hook.XDP, rules=DROPPING)
    assert rejecter.run(path, wire_of(path).wrap4(udp(), UDP)) is None
    assert rejecter.answers() == (0, 0, 0)
    rejecter.engine.close()


def test_catalogue_L14_a_frame_that_may_be_anothers_is_not_answered(
    artefact: loader.Artefact,
) -> None:
    """Without the MAC guard a flooded frame for another VM is judged, but must not be cut off."""
    rejecter = Rejecter(artefact, Hook.TC, facts=facts_of(UNGUARDED))
    assert rejecter.run(Path.TO_VM, in_frame(PEER4)) is None
    assert rejecter.run(Path.FROM_VM, out_frame(PEER4, GATEWAY_MAC)) is not None
    rejecter.engine.close()


# --- the budget ----------------------------------------------------------------------------------


@PATHS
def test_catalogue_L14_the_rate_is_limited(artefact: loader.Artefact, path: Path) -> None:
    rejecter = Rejecter(artefact, Hook.XDP, per_second=3)
    frame = wire_of(path).wrap4(udp(), UDP)
    runs = 10
    for _ in range(20):  # until all of it lies in one second
        before = rejecter.answers()
        rejecter.run(path, frame)
        window = rejecter.engine.maps.reject_meter().window
        if rejecter.answers().sent != before.sent + 1:
            continue
        for _ in range(runs):
            rejecter.run(path, frame)
        if rejecter.engine.maps.reject_meter().window == window:
            break
    else:
        pytest.fail("no second was long enough")
    after = rejecter.answers()
    used = rejecter.engine.maps.reject_meter().used
    assert used >= runs + 1
    assert after.sent - before.sent <= 3
    assert sum(after) - sum(before) == runs + 1
    rejecter.engine.close()


@PATHS
def test_catalogue_L14_zero_never_answers(artefact: loader.Artefact, path: Path) -> None:
    rejecter = Rejecter(artefact, Hook.XDP, per_second=0)
    assert rejecter.run(path, wire_of(path).wrap4(tcp(), TCP)) is None
    assert rejecter.answers() == (0, 0, 0)
    rejecter.engine.close()


def test_xdp_does_not_answer_super_frames(artefact: loader.Artefact) -> None:
    rejecter = Rejecter(artefact, Hook.XDP)
    frame = OUT.wrap4(udp(payload=bytes(2048 - 42)), UDP)
    assert rejecter.run(Path.FROM_VM, frame) is not None
    assert rejecter.run(Path.FROM_VM, OUT.wrap4(udp(payload=bytes(2048 - 41)), UDP)) is None
    assert rejecter.answers() == (1, 0, 1)
    rejecter.engine.close()


# --- an answer on its way ------------------------------------------------------------------------


@PATHS
def test_an_endpoint_lets_its_own_answer_pass(artefact: loader.Artefact, path: Path) -> None:
    """An answer that the one program sends comes by the other one, which knows it by its mark."""
    rejecter = Rejecter(artefact, Hook.TC)
    frame = wire_of(path).wrap4(tcp(flags="R"), TCP)
    mark = rejecter.engine.maps.config().reply_mark
    for sent, expected in ((mark, 0xFFFFFFFF), (mark + 1, TC_SHOT), (0, TC_SHOT)):
        before = rejecter.engine.maps.stats()
        context = bytearray(SKB_SIZE)
        struct.pack_into("=I", context, SKB_MARK, sent)
        run = libbpf.prog_test_run(rejecter.engine.program(path), frame, ctx_in=bytes(context))
        assert run.retval == expected
        assert run.data_out == frame
        assert (rejecter.engine.maps.stats() == before) is (sent == mark)
    rejecter.engine.close()


def test_without_a_hook_that_needs_it_there_is_no_mark(artefact: loader.Artefact) -> None:
    rejecter = Rejecter(artefact, Hook.XDP)
    assert rejecter.engine.maps.config().reply_mark == 0
    assert bytes(abi.RejectMeter()) == bytes(rejecter.engine.maps.reject_meter())
    rejecter.engine.close()
