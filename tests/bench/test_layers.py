# SPDX-License-Identifier: Apache-2.0
"""Rules distributed over maps: none is refused, and the first match still decides."""

from __future__ import annotations

import random
from itertools import product

import pytest

from bench.layers import Box, layers

VALUES = 8


def random_box(rng: random.Random) -> Box:
    ends = [sorted((rng.randrange(VALUES), rng.randrange(VALUES))) for _ in range(2)]
    return [(first, last) for first, last in ends]


def contains(box: Box, point: tuple[int, ...]) -> bool:
    return all(first <= value <= last for (first, last), value in zip(box, point, strict=True))


def random_rules(seed: int) -> tuple[list[Box], list[bool]]:
    rng = random.Random(seed)
    return [random_box(rng) for _ in range(40)], [rng.random() < 0.5 for _ in range(40)]


@pytest.mark.parametrize("seed", range(20))
def test_the_first_match_decides(seed: int) -> None:
    boxes, verdicts = random_rules(seed)
    maps = layers(boxes, verdicts)
    for point in product(range(VALUES), repeat=2):
        wanted = [
            verdicts[number] for number in range(len(boxes)) if contains(boxes[number], point)
        ]
        answers = [[verdicts[n] for n in members if contains(boxes[n], point)] for members in maps]
        # Whichever element the first map with any answers by, it says this.
        said = next((set(answer) for answer in answers if answer), set())
        assert said == set(wanted[:1])


@pytest.mark.parametrize("seed", range(20))
def test_no_map_refuses_a_rule(seed: int) -> None:
    boxes, verdicts = random_rules(seed)
    for members in layers(boxes, verdicts):
        for place, number in enumerate(members):
            corners = (
                tuple(span[0] for span in boxes[number]),
                tuple(span[1] for span in boxes[number]),
            )
            for earlier in members[:place]:
                assert not any(contains(boxes[earlier], corner) for corner in corners)


def test_only_rules_that_conflict_need_two_maps() -> None:
    inner, outer, apart = [(2, 3), (2, 3)], [(0, 7), (0, 7)], [(5, 6), (0, 1)]
    low, high = [(0, 4), (0, 4)], [(3, 6), (3, 6)]
    assert layers([inner, outer], "aa") == [[0, 1]]  # the corners of the outer one are free
    assert layers([inner, outer], "ab") == [[0], [1]]
    assert layers([outer, inner], "ab") == [[0]]  # the inner one never matches
    assert layers([low, high, apart], "aab") == [[0, 2], [1]]
