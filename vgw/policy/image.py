# SPDX-License-Identifier: Apache-2.0
"""The format of a compiled policy as it is written: the mirror of bpf/image.h, line by line.

Words are in native byte order. bpf/image.h says what each line means; only the modules of this
package that build images know it too, the rest of vgw moves images as bytes.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Sequence
from typing import Final

from vgw import abi

NARROW: Final = 0x76670301
WIDE: Final = 0x76670302
LARGE: Final = 0x76670303
MEDIUM: Final = 0x76670304

LINE_BYTES: Final = abi.IMAGE_LINE_WORDS * 8
WORDS_PER_LINE: Final = abi.IMAGE_LINE_WORDS
REFS_PER_LINE: Final = LINE_BYTES // 4
#: Places of a block that a bit of a summary speaks of.
SUMMARY_PLACES: Final = 32
#: Rules of a narrow image, and of a block of a wide one.
NARROW_RULES: Final = 64
VECTOR_LINES: Final = 2
BLOCK_RULES: Final = VECTOR_LINES * LINE_BYTES * 8
MAX_BLOCKS: Final = 64
#: Keys of a node, and where it leads to.
NODE_KEYS: Final = 7
NODE_REFS: Final = 8

#: Steps of bpf/search.h and bpf/wide.h that a lookup may take.
ADDRESS_STEPS: Final = 10
VALUE_STEPS: Final = 4
PROGRAM_STEPS: Final = 4

NODE: Final = 1 << 30
TABLE: Final = 1 << 31
NEXT_WORD: Final = 1 << 29
_KIND: Final = NODE | TABLE
_INDEX: Final = NEXT_WORD - 1

_HEADER: Final = struct.Struct("=3I20x2Q16x")
_TABLE_LINES: Final = 3
HEADER_LINES: Final = 5
DE_BRUIJN_SEQUENCE: Final = 0x03F79D71B4CB0A89
_NODE: Final = struct.Struct(f"={NODE_KEYS}I4x{NODE_REFS}I")
_TABLE: Final = struct.Struct("=4I")


def is_class(ref: int) -> bool:
    """Tell whether a reference is to a class and not to a line."""
    return not ref & _KIND


def index_of(ref: int) -> int:
    """Return the number of the class or line that a reference is to."""
    return ref & _INDEX


def rule_word(number: int, action: abi.Action, log: bool, next_tier: int) -> int:
    """Return what a lookup finds for a rule; the default has the number abi.NO_RULE."""
    return number << 32 | next_tier << 16 | (abi.RULE_LOG if log else 0) << 8 | action


def node(keys: Sequence[int], refs: Sequence[int]) -> bytes:
    """Return a line of at most NODE_KEYS ascending keys and one reference more.

    Missing keys are the greatest value: one that is not below them goes where the last one goes.
    """
    fill = NODE_KEYS - len(keys)
    return _NODE.pack(*keys, *[0xFFFFFFFF] * fill, *refs, *[refs[-1]] * fill)


def references(refs: Sequence[int]) -> bytes:
    """Return references as the u32s of lines."""
    return array.array("I", refs).tobytes()


def table(low: int, shift: int, last: int, entries: int) -> bytes:
    """Return a search that leads to entry 0 below `low` and else by steps of 1 << `shift`.

    `entries` is the number of the first reference, or the class that all values have if `last` is
    0.
    """
    return _TABLE.pack(low, shift, last, entries)


def _bit_places() -> bytes:
    """Return the place of the one bit in a word by the product of bpf/image.h's lowest_bit."""
    places = bytearray(64)
    for place in range(64):
        places[(DE_BRUIJN_SEQUENCE << place & (1 << 64) - 1) >> 58] = place
    return bytes(places)


class Lines:
    """An image under construction; the header's lines are written at the end."""

    def __init__(self) -> None:
        self._data = bytearray(HEADER_LINES * LINE_BYTES)

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._data) // LINE_BYTES

    def append(self, data: bytes) -> int:
        """Append data, filled up to a whole line, and return its first line."""
        first = len(self)
        self._data += data
        self._data += bytes(-len(self._data) % LINE_BYTES)
        return first

    def are_small(self) -> bool:
        """Tell whether there is room for all of them in the one map of a small image."""
        return len(self) <= abi.CHUNK_LINES

    def are_medium(self) -> bool:
        """Tell whether there is room for all of them in the one map of a medium image."""
        return len(self) <= abi.MEDIUM_LINES

    def finish(  # noqa: PLR0913 (the fields of the header)
        self,
        form: int,
        *,
        rules: int,
        firsts: int,
        searches: Sequence[bytes],
        used: int,
        by_default: int,
    ) -> bytes:
        """Write the header and return the image.

        `rules` and `firsts` are lines, `searches` the tables that fields are looked up by first,
        `used` the bits of all rules or blocks.
        """
        fields = form, rules * WORDS_PER_LINE, firsts * REFS_PER_LINE
        tables = b"".join(searches).ljust(_TABLE_LINES * LINE_BYTES, b"\0")
        header = _HEADER.pack(*fields, used, by_default) + tables + _bit_places()
        self._data[: len(header)] = header
        if form == LARGE and self.are_medium():  # the map that an image is in is known by its size
            self._data += bytes((abi.MEDIUM_LINES + 1 - len(self)) * LINE_BYTES)
        return bytes(self._data)
