# SPDX-License-Identifier: Apache-2.0
"""Building narrow images: those of at most 64 rules, where a class is one word of bits."""

from __future__ import annotations

import array
import operator
from collections.abc import Sequence
from itertools import accumulate

from vgw.policy import image
from vgw.policy.model import EffectiveRule
from vgw.policy.ranges import Search
from vgw.policy.search_tree import build_searches


def narrow_image(
    rules: Sequence[EffectiveRule], searches: Sequence[Search], by_default: int
) -> bytes | None:
    """Return the narrow image of rules, None where they are too many or it would not be small.

    `by_default` is the rule word of the default. Raises SearchTooDeepError.
    """
    if len(rules) > image.NARROW_RULES:
        return None
    lines = image.Lines()
    used = (1 << len(rules)) - 1
    found = [_classify(search) for search in searches]
    masks = tuple(dict.fromkeys(mask for _, admitted in found for mask in admitted))
    first = lines.append(array.array("Q", masks).tobytes()) * image.WORDS_PER_LINE
    classes = {mask: number for number, mask in enumerate(masks, first)}
    tables = [
        table
        for search, (starts, admitted) in zip(searches, found, strict=True)
        for table in build_searches(lines, search, starts, [classes[mask] for mask in admitted])
    ]
    words = lines.append(_rule_words(rules))
    if not lines.are_small():
        return None
    return lines.finish(
        image.NARROW,
        rules=words,
        firsts=0,
        searches=tables,
        used=used,
        by_default=by_default,
    )


def _classify(search: Search) -> tuple[list[int], list[int]]:
    """Return where ranges of values begin that the same rules admit, and the bits of those."""
    masks = [0] * len(search.sets)
    for bit, number in enumerate(search.of_rule):
        masks[number] |= 1 << bit
    # The ranges of a set are disjoint, so a toggle at both ends of each is enough.
    toggles: dict[int, int] = {0: 0}
    for mask, ranges in zip(masks, search.sets, strict=True):
        for first, last in ranges:
            toggles[first] = toggles.get(first, 0) ^ mask
            toggles[last + 1] = toggles.get(last + 1, 0) ^ mask
    toggles.pop(search.whole[0][1] + 1, None)
    starts = sorted(toggles)
    return starts, list(accumulate((toggles[start] for start in starts), operator.xor))


def _rule_words(rules: Sequence[EffectiveRule]) -> bytes:
    """Return the rule words; bits are in the order of the rules."""
    words = array.array("Q")
    for number, rule in enumerate(rules):
        following = (n for n in range(number, len(rules)) if rules[n].tier is not rule.tier)
        next_tier = next(following, len(rules))
        words.append(image.rule_word(number, rule.action, rule.log, next_tier))
    return words.tobytes()
