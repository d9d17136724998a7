# SPDX-License-Identifier: Apache-2.0
"""Building wide images: rules in blocks, classes with a record of the blocks they have rules in.

The method is the aggregated bit vector (Baboescu and Varghese, SIGCOMM 2001) with the rules
arranged so that those which share addresses share blocks, as the same paper proposes: a packet's
candidate blocks are then few, at the price of comparing the numbers of what they hold. numpy does
it by whole columns; memory is bounded by ranges times blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vgw import abi
from vgw.abi import Action
from vgw.policy import image
from vgw.policy.model import TIERS, EffectiveRule, Tier
from vgw.policy.ranges import Search
from vgw.policy.search_tree import build_searches

_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_Index = npt.NDArray[np.int64]

_WORD_BITS: Final = 64
_VECTOR_WORDS: Final = image.BLOCK_RULES // _WORD_BITS
_SUMMARY_SHIFT: Final = np.uint64(32)
#: Words in front of a record that say which blocks it has.
_HEAD_WORDS: Final = 1
#: In _cells, of a block whose rules are never admitted all at once.
_NEVER: Final = (1 << 32) - 1
#: Ranges times blocks of one search, which is what takes memory: 4 bytes each, a few times.
_MAX_CELLS: Final = 1 << 26
#: Weights of the sums by which equal rows are found; what they find is compared.
_SEED: Final = 0x5647_5744


class ImageTooLargeError(Exception):
    """An image would take more memory than it may; `search` is the number of the one at fault."""

    def __init__(self, search: int) -> None:
        super().__init__(search)
        self.search = search


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where rules stand: `order[place]` is the number of a rule, block n has `bounds[n:n+2]`."""

    order: _Index
    bounds: list[int]
    tier_end: dict[Tier, int]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.bounds) - 1

    def masks(self, block: int, of_rule: _Index) -> tuple[_Index, _U64]:
        """Return the sets that the rules of a block admit, and the bits of those rules by set."""
        places = of_rule[self.order[self.bounds[block] : self.bounds[block + 1]]]
        sets, inverse = np.unique(places, return_inverse=True)
        bits = np.arange(len(places), dtype=np.uint64)
        masks = np.zeros((len(sets), _VECTOR_WORDS), np.uint64)
        one = np.left_shift(np.uint64(1), bits % np.uint64(_WORD_BITS))
        np.bitwise_or.at(masks, (inverse, (bits // np.uint64(_WORD_BITS)).astype(np.int64)), one)
        return sets, masks


def arrange(rules: Sequence[EffectiveRule], searches: Sequence[Search]) -> Blocks:
    """Put rules into blocks: each tier for itself, rules of near addresses beside each other.

    Blocks of a tier are in the order of their first rules, rules within a block in theirs.
    """
    keys = _near(len(rules), searches)
    order: list[int] = []
    bounds = [0]
    tier_end: dict[Tier, int] = {}
    for tier in TIERS:
        numbers = sorted((n for n, r in enumerate(rules) if r.tier is tier), key=keys.__getitem__)
        size = image.BLOCK_RULES
        parts = [sorted(numbers[n : n + size]) for n in range(0, len(numbers), size)]
        for part in sorted(parts):
            order += part
            bounds.append(len(order))
        tier_end[tier] = len(bounds) - 1
    return Blocks(np.array(order, np.int64), bounds, tier_end)


def _near(count: int, searches: Sequence[Search]) -> list[tuple[int, ...]]:
    """Return for each rule a key that is near those of rules with near addresses.

    Rules for any remote address stand apart, and so do those for any local one: every class of
    such a field is in their blocks. The rest go by their remote addresses where they have some, by
    their local ones where not, else by their services.
    """
    remote4, local4, remote6, local6, service, _ = searches
    remote, local = _places((remote4, remote6), count), _places((local4, local6), count)
    services = _places((service,), count)
    return [
        (not remote[n], not local[n], *(remote[n] or local[n] or services[n])) for n in range(count)
    ]


def _places(searches: Sequence[Search], count: int) -> list[tuple[int, ...]]:
    """Return where the values begin that each rule admits; nothing where it admits all."""
    starts = [
        [
            () if ranges == search.whole or not ranges else (family, *ranges[0])
            for ranges in search.sets
        ]
        for family, search in enumerate(searches)
    ]
    found: list[tuple[int, ...]] = []
    for rule in range(count):
        parts = [each[search.of_rule[rule]] for each, search in zip(starts, searches, strict=True)]
        found.append(next((part for part in parts if part), ()))
    return found


def wide_image(
    rules: Sequence[EffectiveRule],
    searches: Sequence[Search],
    by_default: int,
    most_bytes: int,
    progress: Callable[[str], None],
) -> tuple[bytes, bool]:
    """Return the image of rules, and whether it is a large one.

    `by_default` is the rule word of the default; `progress` is told what comes next. Raises
    SearchTooDeepError, and ImageTooLargeError rather than take more than `most_bytes`.
    """
    progress("blocks")
    blocks = arrange(rules, searches)
    store = _Store(len(blocks))
    found: list[tuple[list[int], list[int]]] = []
    for number, search in enumerate(searches):
        progress(search.name)
        found.append(_classify(store, search, blocks, number))
        if store.size() > most_bytes:
            raise ImageTooLargeError(number)
    lines = image.Lines()
    lines.append(store.data())
    tables: list[bytes] = []
    for number, (search, (starts, classes)) in enumerate(zip(searches, found, strict=True)):
        tables += build_searches(lines, search, starts, classes)
        if len(lines) * image.LINE_BYTES > most_bytes:
            raise ImageTooLargeError(number)
    firsts = blocks.order[blocks.bounds[:-1]].astype(np.uint32)
    words = lines.append(_rule_words(rules, blocks).tobytes())
    first = lines.append(firsts.tobytes())
    passing = {rule.tier for rule in rules if rule.action is Action.PASS}
    # A step for each block, one behind each tier that is passed, and one that finds the end.
    is_large = len(blocks) + len(passing) + 1 > image.PROGRAM_STEPS or not lines.are_medium()
    data = lines.finish(
        image.LARGE if is_large else image.WIDE if lines.are_small() else image.MEDIUM,
        rules=words,
        firsts=first,
        searches=tables,
        used=(1 << len(blocks)) - 1,
        by_default=by_default,
    )
    return data, is_large


def _rule_words(rules: Sequence[EffectiveRule], blocks: Blocks) -> _U64:
    """Return the rule words, block by block."""
    words = np.zeros(len(blocks) * image.BLOCK_RULES, np.uint64)
    for block in range(len(blocks)):
        part = blocks.order[blocks.bounds[block] : blocks.bounds[block + 1]].tolist()
        first = block * image.BLOCK_RULES
        words[first : first + len(part)] = [
            image.rule_word(n, rules[n].action, rules[n].log, blocks.tier_end[rules[n].tier])
            for n in part
        ]
    return words


def _classify(
    store: _Store, search: Search, blocks: Blocks, number: int
) -> tuple[list[int], list[int]]:
    """Return where ranges of values begin that the same rules admit, and the class of each.

    The records and vectors of the classes go into the store.
    """
    if not search.restricts():
        return [0], [store.every_rule]
    cuts = _Cuts(search)
    if len(cuts.starts) * len(blocks) > _MAX_CELLS:
        raise ImageTooLargeError(number)
    cells, full, vectors = _cells(cuts, blocks, np.array(search.of_rule, np.int64))
    changes = np.ones(len(cells), bool)
    changes[1:] = (cells[1:] != cells[:-1]).any(axis=1)
    kept = np.flatnonzero(changes)
    rows, row_of = _distinct_rows(cells[kept])
    classes = np.full(len(rows), store.every_rule, np.int64)
    some = (rows != full).any(axis=1)
    classes[some] = store.add(rows[some], vectors)
    return [cuts.starts[n] for n in kept.tolist()], classes[row_of].tolist()


class _Cuts:
    """Where the ranges of a search's sets begin and end, as numbers in the order of values."""

    def __init__(self, search: Search) -> None:
        end = search.whole[0][1] + 1
        firsts = [first for ranges in search.sets for first, _ in ranges]
        ends = [last + 1 for ranges in search.sets for _, last in ranges]
        #: First values of the ranges between two cuts.
        self.starts = sorted({0, *firsts, *ends} - {end})
        place = {start: number for number, start in enumerate(self.starts)}
        place[end] = len(self.starts)
        self._first = np.array([place[value] for value in firsts], np.int64)
        self._end = np.array([place[value] for value in ends], np.int64)
        sizes = np.array([len(ranges) for ranges in search.sets], np.int64)
        self._size = sizes
        self._offset = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

    def pieces(self, sets: _Index, masks: _U64) -> tuple[_Index, _U64]:
        """Return where the bits of a block's rules change, and what they are from there on."""
        sizes = self._size[sets]
        owner = np.repeat(np.arange(len(sets)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ranges = self._offset[sets][owner] + within
        places = np.concatenate([[0], self._first[ranges], self._end[ranges]])
        # A set's ranges are disjoint, so a toggle at both ends of each is enough.
        toggles = np.concatenate(
            [np.zeros((1, _VECTOR_WORDS), np.uint64), masks[owner], masks[owner]]
        )
        order = np.argsort(places, kind="stable")
        places = places[order]
        bits = np.bitwise_xor.accumulate(toggles[order], axis=0)
        last = np.ones(len(places), bool)
        last[:-1] = places[1:] != places[:-1]
        last &= places < len(self.starts)
        return places[last], bits[last]


def _cells(cuts: _Cuts, blocks: Blocks, of_rule: _Index) -> tuple[_U32, _U32, _U64]:
    """Return for each range and block the number of its vector, for each block that of all rules.

    Number 0 is that of a vector without rules; number n is row n - 1 of the vectors returned.
    """
    cells = np.zeros((len(cuts.starts), len(blocks)), np.uint32, order="F")
    full = np.zeros(len(blocks), np.uint32)
    vectors: list[_U64] = []
    count = 0
    for block in range(len(blocks)):
        sets, masks = blocks.masks(block, of_rule)
        places, bits = cuts.pieces(sets, masks)
        distinct, inverse = np.unique(_as_rows(bits), return_inverse=True)
        found = distinct.view(np.uint64).reshape(-1, _VECTOR_WORDS)
        rules = np.bitwise_or.reduce(masks, axis=0)
        numbers = count + 1 + np.arange(len(found), dtype=np.uint32)
        empty = ~found.any(axis=1)
        if empty.any():  # sorted first, as it is the least of all
            numbers -= 1
            numbers[empty] = 0
            found = found[~empty]
        whole = np.flatnonzero((found == rules).all(axis=1))
        full[block] = count + 1 + whole[0] if len(whole) else _NEVER
        lengths = np.diff(np.append(places, len(cuts.starts)))
        cells[:, block] = np.repeat(numbers[inverse.ravel()], lengths)
        vectors.append(found)
        count += len(found)
    return cells, full, np.concatenate(vectors)


def _as_rows(bits: _U64) -> npt.NDArray[np.void]:
    """Return an array whose elements are the rows, to compare them as wholes."""
    rows = np.ascontiguousarray(bits)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def _distinct_rows(cells: _U32) -> tuple[_U32, _Index]:
    """Return the distinct rows, and for each row which of them it is."""
    weights = np.random.Generator(np.random.PCG64(_SEED)).integers(
        1, np.iinfo(np.uint64).max, cells.shape[1], np.uint64
    )
    sums = np.zeros(len(cells), np.uint64)
    for column, weight in enumerate(weights):
        sums += cells[:, column] * weight
    _, first, inverse = np.unique(sums, return_index=True, return_inverse=True)
    rows = np.ascontiguousarray(cells[first])
    inverse = inverse.ravel()
    if (rows[inverse] != cells).any():  # two rows with one sum: compare them as wholes
        rows, inverse = np.unique(cells, axis=0, return_inverse=True)
    return rows, inverse.ravel()


class _Store:
    """The records of classes and their vectors, of all searches of an image, as they lie in it.

    A record is followed by its vectors, but for those that a record before it has too: what a
    packet needs of a class is in one place, though the image be large.
    """

    def __init__(self, blocks: int) -> None:
        """Store the class of values that all rules of all blocks admit."""
        self._parts: list[_U64] = []
        self._line = image.HEADER_LINES
        every = np.full((1, _VECTOR_WORDS), (1 << _WORD_BITS) - 1, np.uint64)
        #: The number of that class.
        self.every_rule = int(self.add(np.ones((1, blocks), np.uint32), every)[0])

    def size(self) -> int:
        """Return the bytes of all that is in here."""
        return self._line * image.LINE_BYTES

    def data(self) -> bytes:
        """Return what is in an image from behind its header on."""
        return b"".join(part.tobytes() for part in self._parts)

    def add(self, rows: _U32, vectors: _U64) -> _Index:
        """Add classes, given as rows of numbers of vectors by block; return their numbers."""
        there = rows != 0
        counts = there.sum(axis=1)
        chosen = rows[there].astype(np.int64) - 1
        owner = np.repeat(np.arange(len(rows)), counts)
        summaries, single = _summaries(vectors)
        own, owned = _first_uses(chosen, single)
        per_row = np.bincount(owner[own], minlength=len(rows))
        sizes = -(-(_HEAD_WORDS + counts) // image.WORDS_PER_LINE)
        first = self._line
        places, self._line = _place(sizes, per_row * image.VECTOR_LINES, first)
        words = np.zeros((self._line - first) * image.WORDS_PER_LINE, np.uint64)
        self._parts.append(words)
        within = np.arange(len(own)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        at = (places + sizes)[owner[own]] + within * image.VECTOR_LINES
        values = np.where(single, _one_group(vectors), np.uint64(0))
        values[owned] = at
        spread = (at - first)[:, None] * image.WORDS_PER_LINE + np.arange(_VECTOR_WORDS)
        words[spread] = vectors[owned]
        numbers: _Index = places * image.WORDS_PER_LINE
        records = numbers - first * image.WORDS_PER_LINE
        bits = np.zeros((len(rows), image.MAX_BLOCKS), np.uint8)
        bits[:, : there.shape[1]] = there
        words[records] = np.packbits(bits, axis=1, bitorder="little").view("<u8").ravel()
        rank = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
        refs = values | summaries.astype(np.uint64) << _SUMMARY_SHIFT
        words[records[owner] + _HEAD_WORDS + rank] = refs[chosen]
        return numbers


def _groups(vectors: _U64) -> _U32:
    groups: _U32 = vectors.view(np.uint32).reshape(-1, image.BLOCK_RULES // image.SUMMARY_PLACES)
    return groups


def _summaries(vectors: _U64) -> tuple[_U32, npt.NDArray[np.bool_]]:
    """Return for each vector the groups in which it has rules, as bits, and whether it is one."""
    groups = _groups(vectors) != 0
    summaries = np.packbits(groups, axis=1, bitorder="little").view("<u4").ravel()
    return summaries, groups.sum(axis=1) == 1


def _one_group(vectors: _U64) -> _U64:
    """Return the rules of each vector's one group."""
    found: _U64 = _groups(vectors).max(axis=1, initial=0).astype(np.uint64)
    return found


def _first_uses(chosen: _Index, single: npt.NDArray[np.bool_]) -> tuple[_Index, _Index]:
    """Return where vectors are chosen for the first time that have to be stored, and which."""
    vectors, first = np.unique(chosen, return_index=True)
    stored = ~single[vectors]
    order = np.argsort(first[stored])
    return first[stored][order], vectors[stored][order]


def _place(records: _Index, vectors: _Index, line: int) -> tuple[_Index, int]:
    """Return the lines at which records begin, from `line` on, and the one behind the last.

    `records` and `vectors` are how many lines each record has and how many its vectors behind it.
    Vectors begin at an even line, and a record and its vectors are all in one part of an image.
    """
    places: list[int] = []
    for record, vector in zip(records.tolist(), vectors.tolist(), strict=True):
        if vector:
            line += (line + record) % image.VECTOR_LINES
        if line // abi.PART_LINES != (line + record + vector - 1) // abi.PART_LINES:
            line += -line % abi.PART_LINES
            line += record % image.VECTOR_LINES if vector else 0
        places.append(line)
        line += record + vector
    return np.array(places, np.int64), line
