# SPDX-License-Identifier: Apache-2.0
"""Distribution of ordered rules over interval maps so that the first match still decides.

nftables' concatenated interval maps (pipapo) refuse an element whose first or last corner lies
inside one that is there. Of several elements that match they return any: the first inserted in
small maps, another one in large maps (seen on Linux 6.18). So rules that overlap share a map only
if they say the same, and the others go into maps that are asked later.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

#: Inclusive range of numbers.
Span = tuple[int, int]
#: A rule as one range for each field.
Box = Sequence[Span]


def layers(boxes: Sequence[Box], verdicts: Sequence[Hashable]) -> list[list[int]]:
    """Return for each map, in the order in which to ask them, its rules in that to insert them.

    Rules are given, and returned, by their index. One that a single earlier rule covers wholly
    never matches and is in no map.
    """
    fields = [_Field(spans) for spans in zip(*boxes, strict=True)]
    found: list[list[int]] = []
    members: list[int] = []
    saying: dict[Hashable, int] = {}
    for number, box in enumerate(boxes):
        before = (1 << number) - 1
        overlapping, at_first, at_last = before, before, before
        for field, (first, last) in zip(fields, box, strict=True):
            overlapping &= field.overlapping(first, last)
            at_first &= field.at[first]
            at_last &= field.at[last]
        if at_first & at_last:
            continue
        same = saying.get(verdicts[number], 0)
        level = _level(members, overlapping, at_first | at_last | overlapping & ~same)
        if level == len(found):
            found.append([])
            members.append(0)
        found[level].append(number)
        members[level] |= 1 << number
        saying[verdicts[number]] = same | 1 << number
    return found


def _level(members: Sequence[int], overlapping: int, conflicting: int) -> int:
    """Return the first map behind all that has to be asked before."""
    for level in reversed(range(len(members))):
        if members[level] & conflicting:
            return level + 1
        if members[level] & overlapping:
            return level
    return 0


class _Field:
    """One field of all rules: sets of rules, as bits of an integer, at the ends of their ranges."""

    def __init__(self, spans: Iterable[Span]) -> None:
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for number, (first, last) in enumerate(spans):
            starts[first] = starts.get(first, 0) | 1 << number
            ends[last] = ends.get(last, 0) | 1 << number
        #: Value -> rules whose range has it.
        self.at: dict[int, int] = {}
        self._started: dict[int, int] = {}
        current = started = 0
        for value in sorted(starts.keys() | ends.keys()):
            started |= starts.get(value, 0)
            current |= starts.get(value, 0)
            self.at[value] = current
            self._started[value] = started
            current &= ~ends.get(value, 0)

    def overlapping(self, first: int, last: int) -> int:
        """Return the rules whose range has a value in common with one of the ranges."""
        return self.at[first] | self._started[last] & ~self._started[first]
