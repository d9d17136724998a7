# SPDX-License-Identifier: Apache-2.0
"""Searches lead every value to the range it is in, in few steps however ranges lie."""

from __future__ import annotations

import random
from bisect import bisect_right

import pytest

from bench.image_reader import ImageReader
from vgw.policy import image
from vgw.policy.ranges import Search
from vgw.policy.search_tree import SearchTooDeepError, build_search


def build(starts: list[int], words: int, steps: int) -> ImageReader:
    """Make an image with one search whose ranges lead to classes 1, 2, 3 and so on."""
    lines = image.Lines()
    refs = list(range(1, len(starts) + 1))
    table = build_search(lines, Search("a field", words, steps), starts, refs)
    return ImageReader(
        lines.finish(
            image.NARROW if lines.are_small() else image.LARGE,
            rules=0,
            firsts=0,
            searches=[table] * 10,
            used=0,
            by_default=0,
        )
    )


def split(value: int, words: int) -> list[int]:
    return [value >> 32 * (words - 1 - n) & 0xFFFFFFFF for n in range(words)]


def clustered(rng: random.Random, count: int, bits: int) -> list[int]:
    """Return starts that crowd together the more, the nearer to 0 they are."""
    return [0, *sorted({rng.getrandbits(rng.randint(1, bits)) or 1 for _ in range(count)})]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 65, 300, 5000])
@pytest.mark.parametrize("words", [1, 4])
@pytest.mark.parametrize("shape", ["even", "clustered", "one place"])
def test_each_value_comes_to_its_range(count: int, words: int, shape: str) -> None:
    rng = random.Random(f"{count}{words}{shape}")
    bits = 32 * words
    if shape == "even":
        starts = [0, *sorted({rng.getrandbits(bits) or 1 for _ in range(count)})]
    elif shape == "clustered":
        starts = clustered(rng, count, bits)
    else:
        base = rng.getrandbits(bits - 16) << 16
        starts = [0, *sorted(base | rng.getrandbits(16) for _ in range(count) if base)]
        starts = sorted(set(starts))
    reader = build(starts, words, image.ADDRESS_STEPS)
    for start in rng.sample(starts, min(len(starts), 300)):
        for value in (start - 1, start, start + 1, rng.getrandbits(bits)):
            if 0 <= value < 1 << bits:
                found, steps = reader.search(reader.searches[0], split(value, words))
                assert found == bisect_right(starts, value)
                assert steps <= image.ADDRESS_STEPS


def test_services_are_found_in_few_steps() -> None:
    ports = sorted(random.Random(1).sample(range(1, 65536), 20_000))
    build([0, *(6 << 16 | port for port in ports)], 1, image.VALUE_STEPS)


def test_catalogue_L8_a_search_that_takes_too_long_is_refused() -> None:
    starts = clustered(random.Random(2), 5000, 128)
    with pytest.raises(SearchTooDeepError):
        build(starts, 4, 1)


def test_neighbours_that_lead_to_one_place_are_one_range() -> None:
    lines = image.Lines()
    before = len(lines)
    build_search(lines, Search("a field", 1, 0), [0, 5, 9], [1, 1, 1])
    assert len(lines) == before
