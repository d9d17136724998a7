# SPDX-License-Identifier: Apache-2.0
"""Sets as intervals against sets of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgw.policy import intervals
from vgw.policy.intervals import Interval, IntervalSet, is_within, supersets, union

interval_lists = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair))),
    max_size=4,
)


def numbers(found: list[Interval] | IntervalSet) -> set[int]:
    return {number for first, last in found for number in range(first, last + 1)}


@given(interval_lists)
def test_a_union_has_the_same_numbers_in_one_form(found: list[Interval]) -> None:
    merged = union(found)
    assert numbers(merged) == numbers(found)
    assert merged == union((number, number) for number in numbers(found))


@given(interval_lists, interval_lists)
def test_is_within(one: list[Interval], other: list[Interval]) -> None:
    assert is_within(union(one), union(other)) == (numbers(one) <= numbers(other))


@given(st.lists(interval_lists.map(union), unique=True, max_size=40))
def test_supersets(sets: list[IntervalSet]) -> None:
    expected = [
        frozenset(n for n, other in enumerate(sets) if numbers(one) <= numbers(other))
        for one in sets
    ]
    assert supersets(sets) == expected


@given(st.lists(interval_lists.map(union), unique=True, max_size=40), st.integers(0, 60))
def test_supersets_that_cost_too_much_are_left_out(sets: list[IntervalSet], limit: int) -> None:
    every = supersets(sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "MAX_LOOKUPS", limit)
        some = supersets(sets)
    assert all(n in few <= many for n, (few, many) in enumerate(zip(some, every, strict=True)))
    assert all(few in (many, {n}) for n, (few, many) in enumerate(zip(some, every, strict=True)))
