# SPDX-License-Identifier: Apache-2.0
"""Building the searches of bpf/search.h: from sorted ranges of a field to lines of an image.

A word of a value is searched by a table, one step for however many ranges, where ranges are many,
and by nodes of seven keys where they are few. A table covers just the span that its ranges lie in,
and an entry with many of them gets a table of its own: ranges that crowd together cost a step.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from vgw.policy import image
from vgw.policy.ranges import Search

_WORD: Final = 32
_GREATEST: Final = (1 << _WORD) - 1
#: Ranges that two levels of nodes tell apart.
_TWO_LEVELS: Final = image.NODE_REFS**2
#: Entries of a table for each range, at least: the more, the fewer entries need another search. The
#: second is tried where the first makes a search too deep; what that made stays in the image.
_SPARSE: Final = (8, 128)
_FEWEST: Final = 64

_Items = tuple[list[int], list[int]]


class SearchTooDeepError(Exception):
    """A search would take more steps than a program makes."""


def build_searches(
    lines: image.Lines, search: Search, starts: Sequence[int], refs: Sequence[int]
) -> list[bytes]:
    """Append what a field is searched by; return a table for each of its families, then for others.

    Arguments and errors are those of build_search.
    """
    tables: list[bytes] = []
    others = list(starts), list(refs)
    for first, last in search.families:
        tables.append(build_search(lines, search, *_part(starts, refs, first, last)))
        others = _without(*others, first, last)
    return [*tables, build_search(lines, search, *others)]


def _part(starts: Sequence[int], refs: Sequence[int], first: int, last: int) -> _Items:
    """Return ranges of which those from `first` to `last` are right, to search for no others."""
    begin, end = bisect_right(starts, first), bisect_right(starts, last)
    return [0, *starts[begin:end]], list(refs[begin - 1 : end])


def _without(starts: list[int], refs: list[int], first: int, last: int) -> _Items:
    """Return ranges that are right but from `first` to `last`, to search for none of those."""
    begin, end = bisect_left(starts, first), bisect_right(starts, last + 1)
    return [*starts[:begin], last + 1, *starts[end:]], [*refs[:begin], *refs[end - 1 :]]


def build_search(
    lines: image.Lines, search: Search, starts: Sequence[int], refs: Sequence[int]
) -> bytes:
    """Append the lines of a search to an image and return the table that it begins with.

    `starts` are the first values of ranges that cover all values of the search's field, from 0 on
    and ascending, `refs` the class of each. Raises SearchTooDeepError when finding one would take
    more steps than the search has.
    """
    ranges = _joined(list(starts), list(refs))
    for sparse in _SPARSE:
        builder = _Builder(lines, sparse)
        items = ranges
        if search.words > 1:
            items = builder.first_words(*items, search.words - 1)
        root, depth = builder.table(*items)
        if depth <= search.steps:
            return root
    raise SearchTooDeepError


def _joined(starts: list[int], refs: list[int]) -> _Items:
    """Return the ranges with neighbours that lead to the same place made one."""
    keep = [0, *(n for n, (a, b) in enumerate(pairwise(refs), 1) if a != b)]
    if len(keep) == len(refs):
        return starts, refs
    return [starts[n] for n in keep], [refs[n] for n in keep]


class _Builder:
    def __init__(self, lines: image.Lines, sparse: int) -> None:
        self._lines = lines
        self._sparse = sparse
        #: Line -> steps from there to a class.
        self._depths: dict[int, int] = {}

    def depth(self, ref: int) -> int:
        """Return the steps from a reference to a class, at most."""
        return 0 if image.is_class(ref) else self._depths[image.index_of(ref)]

    def first_words(self, starts: list[int], refs: list[int], below: int) -> _Items:
        """Return what the first words of values lead to; `below` words are behind them."""
        shift = below * _WORD
        firsts: list[int] = []
        found: list[int] = []
        before = refs[0]
        position = 0
        while position < len(starts):
            word = starts[position] >> shift
            end = position + 1
            while end < len(starts) and starts[end] >> shift == word:
                end += 1
            if firsts and firsts[-1] == word:  # put there for what is behind the last group
                firsts.pop()
                found.pop()
            firsts.append(word)
            tails = [start - (word << shift) for start in starts[position:end]]
            if tails == [0]:
                found.append(refs[position])
            else:
                found.append(self._group(tails, refs[position:end], before, below))
                if word < _GREATEST:
                    firsts.append(word + 1)
                    found.append(refs[end - 1])
            before = refs[end - 1]
            position = end
        return _joined(firsts, found)

    def _group(self, tails: list[int], refs: list[int], before: int, below: int) -> int:
        """Search the words behind a first word that several ranges share."""
        if tails[0]:
            tails, refs = [0, *tails], [before, *refs]
        tails, refs = _joined(tails, refs)
        if below > 1:
            tails, refs = self.first_words(tails, refs, below - 1)
        ref = self.word(tails, refs)
        return ref if image.is_class(ref) else ref | image.NEXT_WORD

    def word(self, starts: list[int], refs: list[int]) -> int:
        """Search one word."""
        if len(refs) == 1:
            return refs[0]
        if len(refs) <= image.NODE_REFS:
            return self._node(starts[1:], refs)
        if len(refs) <= _TWO_LEVELS:
            return self._nodes(starts, refs)
        table, depth = self.table(starts, refs)
        line = self._lines.append(table)
        self._depths[line] = 1 + depth
        return image.TABLE | line

    def _node(self, keys: list[int], refs: list[int]) -> int:
        line = self._lines.append(image.node(keys, refs))
        self._depths[line] = 1 + max(map(self.depth, refs))
        return image.NODE | line

    def _nodes(self, starts: list[int], refs: list[int]) -> int:
        """Search by a node of nodes."""
        size = -(-len(refs) // image.NODE_REFS)
        parts = range(0, len(refs), size)
        nodes = [self.word([0, *starts[n + 1 : n + size]], refs[n : n + size]) for n in parts]
        return self._node([starts[n] for n in parts[1:]], nodes)

    def table(self, starts: list[int], refs: list[int]) -> tuple[bytes, int]:
        """Return a table over the span that the ranges lie in, and the steps behind it."""
        if len(refs) == 1:
            return image.table(0, 0, 0, refs[0]), 0  # refs[0] is a class: there are no words left
        low, span = starts[1], starts[-1] - starts[1]
        wanted = max(_FEWEST, self._sparse * len(refs))
        shift = max(0, span.bit_length() - (wanted - 1).bit_length())
        entries = [refs[0]]
        position = 1
        while position < len(starts):
            entry = 1 + ((starts[position] - low) >> shift)
            limit = low + (entry << shift)
            end = position + 1
            while end < len(starts) and starts[end] < limit:
                end += 1
            entries += [refs[position - 1]] * (entry - len(entries))
            aligned = starts[position] == limit - (1 << shift)
            if aligned and end == position + 1:
                entries.append(refs[position])
            else:
                first = position if aligned else position - 1
                entries.append(self.word([0, *starts[first + 1 : end]], refs[first:end]))
            position = end
        first_line = self._lines.append(image.references(entries))
        depth = max(map(self.depth, set(entries)))
        return image.table(low, shift, len(entries) - 1, first_line * image.REFS_PER_LINE), depth
