# SPDX-License-Identifier: Apache-2.0
"""The sequences are the same again, and what is made of packets is what it should be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from scapy.layers.inet import IP, UDP, defragment
from scapy.layers.inet6 import IPv6, defragment6
from scapy.layers.l2 import Ether

from tests.cases.fixtures import OPEN, TYPICAL
from tests.engines import Outcome
from tests.frames import IN, OUT, tcp, udp
from tests.fuzz.compare import MODEL, Disagreement, Said, find_disagreement
from tests.fuzz.run import Result, Settings
from tests.fuzz.sequences import LONGEST, Sequences, fragments, turned
from tests.fuzz.shrink import shrink
from tests.fuzz.summary import problems
from tests.fuzz.trial import SCENES, Scene, Shot, Trial, name_of
from vgw.abi import Path, Reason, Verdict

ACCEPTED = Outcome(Verdict.ACCEPT, Reason.DEFAULT, None)
DROPPED = Outcome(Verdict.DROP, Reason.DEFAULT, None)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return Sequences(seed=1)


def test_a_sequence_follows_from_seed_and_number(sequences: Sequences) -> None:
    again = Sequences(seed=1)
    numbers = (0, 1, 77, 77, 5)
    assert [sequences.trial(n) for n in numbers] == [again.trial(n) for n in numbers]
    assert sequences.trial(0) != sequences.trial(1)
    assert Sequences(seed=2).trial(0).steps != sequences.trial(0).steps


def test_sequences_are_of_every_sort(sequences: Sequences) -> None:
    trials = [sequences.trial(number) for number in range(2000)]
    steps = Counter(type(step).__name__ for trial in trials for step in trial.steps)
    assert set(steps) == {"Shot", "Wait", "Apply"}
    assert len({id(trial.scene) for trial in trials}) == len(SCENES)
    # Two pauses, two changes of policy and what is inserted with them come on top.
    assert max(len(trial.steps) for trial in trials) <= LONGEST + 5
    shots = [step for trial in trials for step in trial.steps if isinstance(step, Shot)]
    assert {shot.path for shot in shots} == set(Path)
    assert len({shot.frame for shot in shots}) > len(shots) // 3


@pytest.mark.parametrize("size", [8, 16, 64])
def test_fragments_make_the_packet_again(size: int) -> None:
    datagram = udp(40000, 53, bytes(range(200)))
    frame = OUT.wrap4(datagram, 17)
    (whole,) = defragment(  # type: ignore[no-untyped-call]
        [Ether(piece)[IP] for piece in fragments(frame, size, 7)]
    )
    assert bytes(whole[UDP].payload) == bytes(range(200))
    pieces = [Ether(piece)[IPv6] for piece in fragments(OUT.wrap6(datagram, 17), size, 7)]
    whole = defragment6(pieces)  # type: ignore[no-untyped-call]
    assert bytes(IPv6(bytes(whole))[UDP].payload) == bytes(range(200))


def test_a_packet_turned_is_its_answer() -> None:
    assert turned(OUT.wrap4(tcp(40000, 443), 6))[:34] == IN.wrap4(tcp(443, 40000), 6)[:34]
    frame = OUT.wrap6(tcp(40000, 443), 6)
    assert turned(turned(frame)) == frame


def test_every_policy_of_the_scenes_can_be_named() -> None:
    for scene in SCENES:
        assert name_of(scene.fixture)
        assert name_of(scene.other)


def said_of(trial: Trial) -> dict[str, tuple[Said, ...]]:
    """Return what two engines say, of which one drops what follows a frame with two bytes 7."""
    here = [bool(step.frame.count(7) >= 2) for step in trial.steps if isinstance(step, Shot)]
    program = [DROPPED if any(here[:place]) else ACCEPTED for place in range(len(here))]
    return {MODEL: (ACCEPTED,) * len(here), "tc": tuple(program)}


def check(trial: Trial) -> Disagreement | None:
    return find_disagreement(trial, said_of(trial))


def test_what_is_left_of_a_disagreement_is_small() -> None:
    plain = Shot(Path.TO_VM, bytes(range(8, 100)))
    guilty = Shot(Path.FROM_VM, bytes(range(8, 60)) + b"\x07" + bytes(range(8, 80)) + b"\x07rest")
    trial = Trial("1/1", Scene(TYPICAL, 1, None), (plain,) * 9 + (guilty,) + (plain,) * 9)
    scene = next(each for each in SCENES if each.fixture is TYPICAL)
    found = check(replace(trial, scene=scene))
    assert found is not None
    small = shrink(found, check)
    assert small.trial.scene.fixture is OPEN
    first, second = small.trial.steps
    assert isinstance(first, Shot)
    assert isinstance(second, Shot)
    assert set(first.frame) == {0, 7}
    assert first.frame.endswith(b"\x07")
    assert second.frame == bytes(14)
    assert small.last == {MODEL: ACCEPTED, "tc": DROPPED}


def test_a_run_that_skips_too_much_fails() -> None:
    result = Result(Settings(seed=1))
    assert problems(result) == ["no packet was judged"]
    result.counts.packets = 1000
    result.counts.skipped["xdp"] = 50
    assert not problems(result)
    result.counts.skipped["xdp"] = 500
    assert problems(result) == ["xdp could not be given 500 of 1000 packets"]


def test_an_evaluator_that_raises_is_a_disagreement() -> None:
    trial = Trial("1/1", SCENES[0], (Shot(Path.TO_VM, bytes(20)),))
    found = find_disagreement(trial, {MODEL: ("ValueError: no",), "tc": ("ValueError: no",)})
    assert found is not None
