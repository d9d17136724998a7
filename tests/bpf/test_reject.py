# SPDX-License-Identifier: Apache-2.0
"""Answers to rejected packets, byte by byte, as the programs make them of the packets."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.bpf.answers import (
    ACCEPTING,
    ACK,
    DROPPING,
    FAMILIES,
    PATHS,
    REJECTING,
    RST,
    SKB_MARK,
    TC_SHOT,
    TRUNK,
    Answer,
    Rejecter,
    check_addresses,
    check_error,
    check_reset,
    facts_of,
    run_revoked,
    wire_of,
    wrap,
)
from tests.bpf.test_stages import FACTS, HERE, rules
from tests.bpf.unanswered import NEVER, NEVER_OF_FLOW, in_frame, out_frame
from tests.cases.fixtures import UNGUARDED
from tests.frames import (
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    OUT,
    PEER4,
    SCTP,
    TCP,
    UDP,
    echo,
    sctp,
    tagged,
    tcp,
    udp,
)
from tests.program_engine import SKB_SIZE
from vgw import abi, libbpf, loader
from vgw.abi import Action, Mode, Path, Verdict
from vgw.policy.model import Direction, EffectivePolicy, Hook

pytestmark = pytest.mark.bpf


@pytest.fixture(scope="module", params=[Hook.XDP, Hook.TC], ids=str)
def rejecter(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[Rejecter]:
    made = Rejecter(artefact, request.param)
    yield made
    made.engine.close()


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


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC])
def test_catalogue_H12_stages_answer_too(artefact: loader.Artefact, hook: Hook) -> None:
    """A rule that only the stage finds: without it the packet is dropped and gets no answer."""
    here, there = HERE, "10.0.1.0"
    found = [
        replace(
            rule, peers=tuple(ip_network(there) if str(p)[:-3] == here else p for p in rule.peers)
        )
        for rule in rules(Direction.EGRESS)
    ]
    last = replace(found[-1], action=Action.REJECT)
    staged = EffectivePolicy("vm", (), (*found[:-1], last))
    rejecter = Rejecter(artefact, hook, facts=FACTS, rules=staged)
    frame = OUT.wrap(tcp(4000, 80), TCP, here, there)
    answer = Answer.of(rejecter.answer(Path.FROM_VM, frame))
    check_addresses(answer, Path.FROM_VM, frame)
    for place in rejecter.engine.stages():
        libbpf.map_delete(*place)
    assert rejecter.run(Path.FROM_VM, frame) is None
    rejecter.engine.close()


# --- never ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEVER)
def test_catalogue_H12_never_answered(rejecter: Rejecter, name: str) -> None:
    before = rejecter.answers()
    assert rejecter.run(*NEVER[name]) is None
    assert rejecter.answers() == before


@pytest.mark.parametrize("name", NEVER_OF_FLOW)
def test_catalogue_H12_never_answered_even_if_rejected(
    artefact: loader.Artefact, name: str
) -> None:
    assert run_revoked(artefact, *NEVER_OF_FLOW[name]) == (None, Verdict.REJECT, (0, 0, 0))


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
