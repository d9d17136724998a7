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
from vgw.policy.search_tree import build_search


def narrow_image(
    rules: Sequence[EffectiveRule], searches: Sequence[Search], by_default: int
) -> bytes:
    """Return the image of at most image.NARROW_RULES rules.

    `by_default` is the rule word of the default. Raises SearchTooDeepError.
    """
    lines = image.Lines()
    used = (1 << len(rules)) - 1
    found = [_classify(search) for search in searches]
    masks = dict.fromkeys(mask for _, admitted in found for mask in admitted if mask != used)
    classes = {mask: number for number, mask in enumerate(masks, 1)} | {used: image.EVERY_RULE}
    tables = [
        build_search(lines, search, starts, [classes[mask] for mask in admitted])
        for search, (starts, admitted) in zip(searches, found, strict=True)
    ]
    return lines.finish(
        image.NARROW,
        rules=lines.append(_rule_words(rules)),
        firsts=0,
        records=lines.append(array.array("Q", [used, *masks]).tobytes()),
        vectors=0,
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
