# SPDX-License-Identifier: Apache-2.0
"""Reads compiled policies by the description in bpf/image.h: a second reader beside the programs.

It shares no code with what builds images, and takes the plain way where the programs take a quick
one: every block that all records name is looked into, and every rule in it. `effort` counts what
the programs' way costs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from vgw.abi import Action

NARROW: Final = 0x76670301
WIDE: Final = 0x76670302
LARGE: Final = 0x76670303
MEDIUM: Final = 0x76670304
LINE: Final = 64
BLOCK: Final = 1024
GROUP: Final = 32
#: Bytes of a map of a large image, in one of which each record and each vector is.
PART: Final = 1 << 22
SMALL: Final = 1 << 16
MEDIUM_MOST: Final = 1 << 19
#: Format -> an image of it has more bytes than that, and that many at most.
SIZES: Final = {
    NARROW: (0, SMALL),
    WIDE: (0, SMALL),
    MEDIUM: (SMALL, MEDIUM_MOST),
    LARGE: (MEDIUM_MOST, 20 * PART),
}


class MalformedImageError(Exception):
    """An image is not what bpf/image.h says."""


@dataclass
class Answer:
    """What a lookup found; `lines` of searches were read, and `blocks` are the candidates."""

    word: int
    is_default: bool
    lines: list[int] = field(default_factory=list)
    blocks: int = 0

    @property
    def action(self) -> Action:
        """What the rule, or the default, does."""
        return Action(self.word & 0xFF)

    @property
    def rule(self) -> int:
        """The number of the rule."""
        return self.word >> 32


@dataclass(frozen=True, slots=True)
class Effort:
    """What a lookup costs in a wide image.

    `lines` are read by the search of each field behind its first table, and `blocks` looked into;
    in `dense` of them all fields have several groups in common, so that whole lines are compared,
    and in `matches` there is a rule.
    """

    lines: tuple[int, ...]
    blocks: int
    dense: int
    matches: int


class ImageReader:
    """An image as bytes, asked about values of the fields."""

    def __init__(self, data: bytes) -> None:
        _require(len(data) % LINE == 0)
        self.data = data
        fields: tuple[int, ...] = struct.unpack_from("=3I20x2Q", data)
        self.format, self.rules, self.firsts, self.used, self.by_default = fields
        self.searches = [struct.unpack_from("=4I", data, LINE + 16 * n) for n in range(10)]
        _require(self.format in SIZES)
        fewer, most = SIZES[self.format]
        _require(fewer < len(data) <= most)

    def u32(self, number: int) -> int:
        """Return one of the u32s of the image."""
        return int(struct.unpack_from("=I", self.data, 4 * number)[0])

    def word(self, number: int) -> int:
        """Return a word of the image."""
        return int(struct.unpack_from("=Q", self.data, 8 * number)[0])

    def judge(self, version: int, remote: int, local: int, service: int, source: int) -> Answer:
        """Look a query up; addresses are numbers of their family."""
        classes, lines = self.classes(version, remote, local, service, source)
        answer = self.match(classes)
        answer.lines = lines
        return answer

    def classes(
        self, version: int, remote: int, local: int, service: int, source: int
    ) -> tuple[list[int], list[int]]:
        """Return the classes of a query, and the lines read to find each field's."""
        family = 0 if version == 4 else 2
        bits = 32 if version == 4 else 128
        kind = {6: 0, 17: 1}.get(service >> 16, 2)
        found = [
            self.search(self.searches[family], words(remote, bits)),
            self.search(self.searches[family + 1], words(local, bits)),
            self.search(self.searches[4 + kind], [service]),
            self.search(self.searches[7 + kind], [source]),
        ]
        return [each for each, _ in found], [steps for _, steps in found]

    def search(self, table: tuple[int, ...], value: list[int]) -> tuple[int, int]:
        """Return the class of a value and how many lines behind the first table lead to it."""
        word, steps = 0, 0
        ref = self.entry(table, value[0])
        while ref >> 30:
            if ref >> 29 & 1:
                word += 1
            line, steps = ref & 0x1FFFFFFF, steps + 1
            if ref >> 31:
                ref = self.entry(tuple(self.u32(16 * line + n) for n in range(4)), value[word])
            else:
                keys = [self.u32(16 * line + n) for n in range(7)]
                _require(keys == sorted(keys))
                ref = self.u32(16 * line + 8 + sum(key <= value[word] for key in keys))
        return ref & 0x1FFFFFFF, steps

    def entry(self, table: tuple[int, ...], value: int) -> int:
        """Return the reference that a table has for a value."""
        low, shift, last, entries = table
        if last == 0:
            return entries
        return self.u32(entries + (0 if value < low else min(last, 1 + ((value - low) >> shift))))

    def match(self, classes: list[int]) -> Answer:
        """Return the first match of all classes that is not PASS."""
        places, blocks = self.places(classes)
        beyond = 0
        for word, place in sorted((self.word(self.rules + place), place) for place in places):
            if (place if self.format == NARROW else place // BLOCK) < beyond:
                continue
            if word & 0xFF != Action.PASS:
                return Answer(word, False, blocks=blocks)
            beyond = word >> 16 & 0xFFFF
        return Answer(self.by_default, True, blocks=blocks)

    def effort(self, version: int, remote: int, local: int, service: int, source: int) -> Effort:
        """Return what a lookup in a wide image costs, which ends where no block can be better."""
        _require(self.format != NARROW)
        classes, lines = self.classes(version, remote, local, service, source)
        left = set_bits(self.candidates(classes))
        best: int | None = None
        looked = dense = matches = 0
        while left:
            if best is not None and self.u32(self.firsts + left[0]) >= best >> 32:
                if best & 0xFF != Action.PASS:
                    break
                left = [block for block in left if block >= best >> 16 & 0xFFFF]
                best = None
                continue
            block = left.pop(0)
            rules, groups = self.common(classes, block)
            looked, dense = looked + 1, dense + (groups.bit_count() > 1)
            if rules:
                matches += 1
                word = self.word(self.rules + block * BLOCK + set_bits(rules)[0])
                best = word if best is None else min(best, word)
        return Effort(tuple(lines), looked, dense, matches)

    def places(self, classes: list[int]) -> tuple[list[int], int]:
        """Return the places of the rules that all classes have, and the candidate blocks."""
        if self.format == NARROW:
            bits = self.used
            for each in classes:
                bits &= self.word(each)
            return set_bits(bits), 1
        blocks = self.candidates(classes)
        found = []
        for block in set_bits(blocks):
            rules, _ = self.common(classes, block)
            found += [block * BLOCK + bit for bit in set_bits(rules)]
        return found, blocks.bit_count()

    def candidates(self, classes: list[int]) -> int:
        """Return, as bits, the blocks in which all classes have rules."""
        blocks = self.used
        for each in classes:
            blocks &= self.blocks_of(each)
        return blocks

    def common(self, classes: list[int], block: int) -> tuple[int, int]:
        """Return, as bits, the rules of a block that all classes have, and the groups."""
        rules, groups = (1 << BLOCK) - 1, (1 << BLOCK // GROUP) - 1
        for each in classes:
            vector = self.vector(each, block)
            rules &= vector
            groups &= groups_of(vector)
        return rules, groups

    def blocks_of(self, each: int) -> int:
        """Return, as bits, the blocks in which a class has rules."""
        return self.word(each)

    def vector(self, each: int, block: int) -> int:
        """Return the rules of a block that admit a class."""
        number = each + 1 + (self.blocks_of(each) & (1 << block) - 1).bit_count()
        _require(8 * each // PART == 8 * number // PART)
        word = self.word(number)
        summary, line = word >> 32, word & 0xFFFFFFFF
        if summary & (summary - 1) == 0:
            return line << GROUP * (summary.bit_length() - 1)
        _require(line % 2 == 0)
        bits = int.from_bytes(self.data[line * LINE : (line + 2) * LINE], "little")
        _require(groups_of(bits) == summary)
        return bits


def words(value: int, bits: int) -> list[int]:
    """Return a number of so many bits as words of 32, the high ones first."""
    return [value >> shift & 0xFFFFFFFF for shift in range(bits - 32, -1, -32)]


def set_bits(bits: int) -> list[int]:
    """Return the numbers of the bits that are set."""
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


def groups_of(vector: int) -> int:
    """Return, as bits, the groups of places in which a vector has rules."""
    return sum(1 << n for n in range(BLOCK // GROUP) if vector >> GROUP * n & 0xFFFFFFFF)


def _require(condition: bool) -> None:
    if not condition:
        raise MalformedImageError
