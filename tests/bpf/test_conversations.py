# SPDX-License-Identifier: Apache-2.0
"""Random conversations through the programs and the evaluator: same packets, same outcomes.

Few addresses, ports and numbers, so that packets often meet the flows of earlier ones; in between
time passes and the policy changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.cases.fixtures import ALL_ACCEPTED, OTHER_PROTOCOLS, SERVER, SERVICES, USUAL, WATCHED
from tests.cases.table import Fixture
from tests.engines import EvaluatorEngine, Outcome
from tests.frames import (
    ICMP,
    ICMPV6,
    IN,
    OUT,
    PEER4,
    PEER6,
    STRANGER4,
    TCP,
    UDP,
    VM4,
    VM6,
    Wire,
    echo,
    icmp_error,
    ipv4,
    ipv6,
    tcp,
    udp,
)
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.abi import Path, Reason
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

PACKETS = 1200
POLICIES = (USUAL, SERVICES, ALL_ACCEPTED, OTHER_PROTOCOLS.policy)
#: Multiples of seven seconds never add up to a timeout, whose last moment cannot be hit exactly.
WAITS = (7, 7, 14, 21, 28, 35, 126, 609, 7203)
TCP_FLAGS = ("S", "S", "SA", "A", "A", "A", "FA", "FA", "R", "RA", "SF", "PA")
NUMBERS = (0, 1000, 1001, 5000, 5001)


class Talk:
    """Makes random packets of a small world."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def packet(self) -> tuple[Path, bytes]:
        wire = self.pick.choice((OUT, IN))
        local, remote = self._ends()
        segment, protocol = self._segment(remote, is_out=wire is OUT)
        return wire.path, wire.wrap(segment, protocol, local, remote)

    def error(self) -> tuple[Path, bytes]:
        """An ICMP error about a packet that may have been seen."""
        wire: Wire = self.pick.choice((OUT, IN))
        local, remote = self._ends()
        segment, protocol = self._segment(remote, is_out=wire is not OUT)
        source, destination = (remote, local) if wire is OUT else (local, remote)
        if self.pick.random() < 0.1:
            source, destination = destination, source
        if ":" in local:
            error = icmp_error(
                self.pick.choice((1, 2, 3)), ipv6(segment, protocol, source, destination)
            )
            return wire.path, wire.wrap6(error, ICMPV6, local=local, remote=remote)
        error = icmp_error(self.pick.choice((3, 11)), ipv4(segment, protocol, source, destination))
        return wire.path, wire.wrap4(error, ICMP, local=local, remote=remote)

    def _ends(self) -> tuple[str, str]:
        return self.pick.choice(((VM4, PEER4), (VM4, PEER4), (VM4, STRANGER4), (VM6, PEER6)))

    def _segment(self, remote: str, *, is_out: bool) -> tuple[bytes, int]:
        # The VM's and the peer's ends of two connections, one opened by each side.
        ports = self.pick.choice(((40000, 443), (443, 40000)))
        sport, dport = ports if is_out else ports[::-1]
        kind = self.pick.random()
        if kind < 0.6:
            seq, ack = self.pick.choice(NUMBERS), self.pick.choice(NUMBERS)
            return tcp(sport, dport, self.pick.choice(TCP_FLAGS), seq=seq, ack=ack), TCP
        if kind < 0.8:
            return udp(sport, dport), UDP
        if kind < 0.9:
            is_ipv6 = ":" in remote
            types = (128, 129) if is_ipv6 else (8, 0)
            return echo(self.pick.choice(types), 7), ICMPV6 if is_ipv6 else ICMP
        return bytes(16), self.pick.choice((47, 50))


def _differences(
    talk: Talk, program: ProgramEngine, model: EvaluatorEngine, seen: set[Reason]
) -> Iterator[str]:
    for number in range(PACKETS):
        event = talk.pick.random()
        if event < 0.10:
            seconds = talk.pick.choice(WAITS)
            program.advance(seconds)
            model.advance(seconds)
        elif event < 0.12:
            policy = talk.pick.choice(POLICIES)
            program.set_policy(policy)
            model.set_policy(policy)
        path, frame = talk.error() if talk.pick.random() < 0.15 else talk.packet()
        got: Outcome = program.judge(path, frame)
        said = model.judge(path, frame)
        seen.add(said.reason)
        if got != said:
            yield f"packet {number}, {path.name} {frame.hex()}: program {got}, evaluator {said}"


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
@pytest.mark.parametrize("fixture", [SERVER, WATCHED], ids=lambda fixture: fixture.name)
def test_random_conversations(artefact: loader.Artefact, hook: Hook, fixture: Fixture) -> None:
    program = ProgramEngine(artefact, hook, fixture.facts, fixture.policy)
    model = EvaluatorEngine(fixture.facts, fixture.policy)
    seen: set[Reason] = set()
    try:
        first = next(_differences(Talk(2026), program, model, seen), None)
    finally:
        program.close()
    assert first is None
    interesting = {
        Reason.CT_ESTABLISHED,
        Reason.CT_RELATED,
        Reason.RULE,
        Reason.DEFAULT,
        Reason.NO_STATE,
        Reason.ICMP_UNRELATED,
        Reason.PROTOCOL,
        Reason.TCP_FLAGS,
    }
    assert interesting <= seen
