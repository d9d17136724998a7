# SPDX-License-Identifier: Apache-2.0
"""Sets of numbers as intervals, and which of many sets lie within which."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Final

#: First and last number of an interval.
Interval = tuple[int, int]
#: Disjoint intervals in order, of which no two touch: equal sets of numbers are equal tuples.
IntervalSet = tuple[Interval, ...]

#: What `supersets` may spend, in intervals looked up. Ordinary sets need a few each.
MAX_LOOKUPS: Final = 2_000_000


def union(intervals: Iterable[Interval]) -> IntervalSet:
    """Return the numbers that are in any of the intervals."""
    merged: list[Interval] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def is_within(inner: IntervalSet, outer: IntervalSet) -> bool:
    """Tell whether every number of one set is in the other."""
    for first, last in inner:
        position = bisect_right(outer, (first, math.inf)) - 1
        if position < 0 or outer[position][1] < last:
            return False
    return True


def supersets(sets: Sequence[IntervalSet]) -> list[frozenset[int]]:
    """Return for each of different sets the positions of those that it is within, itself included.

    A set that contains another one has an interval around each of its intervals. So a sweep over
    all intervals in order finds, around that interval of a set which has the fewest others around
    it, all candidates, and only these are compared. Sets with few candidates come first; those for
    which MAX_LOOKUPS does not suffice are only within themselves.
    """
    holders: dict[Interval, list[int]] = {}
    for number, intervals in enumerate(sets):
        for interval in intervals:
            holders.setdefault(interval, []).append(number)
    # Of those that begin together the widest first, so that each follows all that contain it.
    order = sorted(holders, key=lambda interval: (interval[0], -interval[1]))
    crowd = _crowds(order, holders)
    found = [frozenset((number,)) for number in range(len(sets))]
    probes: dict[Interval, list[int]] = {}
    for number, probe in _affordable(sets, crowd):
        probes.setdefault(probe, []).append(number)
    around: list[Interval] = []
    for interval in order:
        around.append(interval)
        if interval in probes:
            first, last = interval
            around = [each for each in around if each[1] >= first]
            candidates = [n for each in around if each[1] >= last for n in holders[each]]
            for number in probes[interval]:
                found[number] = _those_around(sets, number, candidates)
    if () in sets:
        found[sets.index(())] = frozenset(range(len(sets)))
    return found


def _crowds(order: Sequence[Interval], holders: dict[Interval, list[int]]) -> dict[Interval, int]:
    """Return how many sets have an interval that is open where each interval begins."""
    crowd: dict[Interval, int] = {}
    count = 0
    open_until: list[tuple[int, int]] = []
    for interval in order:
        while open_until and open_until[0][0] < interval[0]:
            count -= heappop(open_until)[1]
        count += len(holders[interval])
        heappush(open_until, (interval[1], len(holders[interval])))
        crowd[interval] = count
    return crowd


def _affordable(
    sets: Sequence[IntervalSet], crowd: dict[Interval, int]
) -> Iterable[tuple[int, Interval]]:
    """Iterate over the sets that can be compared, with the interval to look for others around."""
    probes = [
        (number, min(intervals, key=crowd.__getitem__))
        for number, intervals in enumerate(sets)
        if intervals
    ]
    costs = sorted((crowd[probe] * len(sets[number]), number, probe) for number, probe in probes)
    spent = 0
    for cost, number, probe in costs:
        spent += cost
        if spent > MAX_LOOKUPS:
            return
        yield number, probe


def _those_around(
    sets: Sequence[IntervalSet], number: int, candidates: Sequence[int]
) -> frozenset[int]:
    if len(sets[number]) == 1:
        return frozenset(candidates)
    return frozenset(each for each in candidates if is_within(sets[number], sets[each]))
