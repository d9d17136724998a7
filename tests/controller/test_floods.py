# SPDX-License-Identifier: Apache-2.0
"""When a flood gets a shield, and when that is taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from vgw.abi import FloodDrop, Path, Reason, Verdict
from vgw.controller.floods import (
    CALM_DROPS,
    CALM_SECONDS,
    FLOOD_DROPS,
    FloodJudge,
    Step,
    Traffic,
    flood_drops,
    saves,
    traffic_from_vm,
)
from vgw.maps import Counter
from vgw.policy.model import Hook

LARGE = 64 << 10


class Second(NamedTuple):
    """What a VM sends in one second: what a shield may drop, and other packets."""

    met: int
    others: int = 0
    size: int = 100


FLOOD, CALM, QUIET = Second(2 * FLOOD_DROPS), Second(CALM_DROPS - 1), Second(0)
#: A flood that is less than what the other packets cost.
BULK = Second(2 * FLOOD_DROPS, 20_000, LARGE)
#: A flood of packets that are dropped where there is a shield or not.
MISSED = Second(0, 2 * FLOOD_DROPS)
NONE = Counter(0, 0)


def plus(first: Counter, packets: int, size: int) -> Counter:
    return Counter(first.packets + packets, first.bytes + packets * size)


def steps(seconds: Sequence[Second]) -> list[Step]:
    """Return what is to be done after each second, up to the end of the watch."""
    now = Traffic(NONE, NONE, NONE)
    judge, found = FloodJudge(now, 0.0), []
    for number, each in enumerate(seconds, 1):
        sent = plus(plus(now.sent, each.met, 60), each.others, each.size)
        if judge.up:
            now = Traffic(sent, now.at_tc, plus(now.at_shield, each.met, 60))
        else:
            now = Traffic(sent, plus(now.at_tc, each.met, 60), now.at_shield)
        found.append(judge.look(now, float(number)))
        if found[-1] is Step.RAISE:
            judge.up = True
        if found[-1] in (Step.LOWER, Step.FORGET):
            break
    return found


PERSIST = int(CALM_SECONDS)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([FLOOD], [Step.RAISE]),
        ([QUIET, FLOOD], [Step.FORGET]),
        ([Second(FLOOD_DROPS - 1)], [Step.FORGET]),
        ([Second(FLOOD_DROPS)], [Step.RAISE]),
        ([BULK], [Step.FORGET]),
        ([MISSED], [Step.FORGET]),
        ([FLOOD, *[MISSED] * 30], [Step.RAISE, *[Step.WAIT] * PERSIST, Step.LOWER]),
        ([FLOOD, FLOOD, Second(CALM_DROPS)], [Step.RAISE, Step.WAIT, Step.WAIT]),
        ([FLOOD, *[CALM] * 30], [Step.RAISE, *[Step.WAIT] * PERSIST, Step.LOWER]),
        ([FLOOD, *[BULK] * 30], [Step.RAISE, *[Step.WAIT] * PERSIST, Step.LOWER]),
        (
            [FLOOD, *[CALM] * PERSIST, FLOOD, *[CALM] * 30],
            [Step.RAISE, *[Step.WAIT] * PERSIST, Step.WAIT, *[Step.WAIT] * PERSIST, Step.LOWER],
        ),
    ],
    ids=[
        "a flood",
        "over already",
        "too few",
        "just enough",
        "not worth it",
        "not for a shield",
        "not for a shield any more",
        "still enough",
        "calm",
        "of no use any more",
        "back within the time",
    ],
)
def test_what_is_done(seconds: list[Second], expected: list[Step]) -> None:
    assert steps(seconds) == expected


def test_a_look_too_soon_says_nothing_and_is_made_again() -> None:
    judge = FloodJudge(Traffic(NONE, NONE, NONE), 1.0)
    many = Counter(10**9, 60 * 10**9)
    assert judge.look(Traffic(many, many, NONE), 1.1) is Step.WAIT
    assert judge.look(Traffic(many, many, NONE), 2.0) is Step.RAISE


def test_a_shield_is_worth_it_by_what_it_saves_and_costs() -> None:
    met = Counter(1000, 60_000)
    assert saves(met, NONE)
    assert not saves(NONE, NONE)
    assert saves(met, Counter(1000, 1000 * 100))
    assert not saves(met, Counter(2000, 2000 * 100))
    assert not saves(met, Counter(200, 200 * LARGE))


def test_what_a_vm_sent_is_counted() -> None:
    stats = {
        (Path.FROM_VM, Verdict.ACCEPT, Reason.DEFAULT): Counter(3, 300),
        (Path.FROM_VM, Verdict.DROP, Reason.RULE): Counter(50, 5000),
        (Path.FROM_VM, Verdict.REJECT, Reason.RULE): Counter(7, 700),
        (Path.TO_VM, Verdict.DROP, Reason.RULE): Counter(9, 900),
    }
    drops = {FloodDrop.AT_TC: Counter(40, 4000), FloodDrop.AT_SHIELD: Counter(5, 500)}
    assert traffic_from_vm(stats, drops) == Traffic(
        Counter(60, 6000), Counter(40, 4000), Counter(5, 500)
    )


@pytest.mark.parametrize(
    ("wanted", "kind", "expected"),
    [
        (Hook.AUTO, "tun", FLOOD_DROPS),
        (Hook.AUTO, "veth", 0),
        (Hook.TC, "tun", 0),
        (Hook.XDP, "tun", 0),
    ],
)
def test_where_floods_are_told_of(wanted: Hook, kind: str, expected: int) -> None:
    assert flood_drops(wanted, kind) == expected
