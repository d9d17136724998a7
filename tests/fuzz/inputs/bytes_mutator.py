# SPDX-License-Identifier: Apache-2.0
"""Changes of inputs: at the level of bytes and words for all, within JSON for what has a body."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

#: Changes of one input at most, most often few.
_MOST_CHANGES: Final = 8
_LONGEST: Final = 1 << 16
_NUMBERS: Final = (0, 1, -1, 255, 256, 65535, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63))
_ODD_VALUES: Final[Sequence[Any]] = (
    None, True, False, "", "x", "\ud800", "\0", "a" * 300, [], {}, [[]], 1.5, float("inf"),
    float("nan"), 10**400, *_NUMBERS, *map(str, _NUMBERS),
)  # fmt: skip

_TOKEN: Final = re.compile(rb"[\w./:-]+")


class Mutator:
    """Makes inputs out of others: of a corpus that grows, and words that the target knows."""

    def __init__(self, chance: random.Random, words: Sequence[bytes]) -> None:
        self._chance = chance
        self._words = words or [b"\0"]
        self._changes: tuple[Callable[[bytes], bytes], ...] = (
            self._flip,
            self._cut,
            self._repeat,
            self._insert_word,
            self._replace_token,
            self._replace_token,
            self._replace_token,
            self._insert_bytes,
            self._swap_lines,
            self._double_line,
        )

    def mutate(self, data: bytes, other: bytes) -> bytes:
        """Return a changed input; `other` is one of which parts may be taken."""
        chance = self._chance
        for _ in range(min(1 + int(chance.expovariate(0.6)), _MOST_CHANGES)):
            if chance.random() < 0.1:
                data = self._splice(data, other)
            else:
                data = chance.choice(self._changes)(data)
        return data[:_LONGEST]

    def _place(self, data: bytes) -> tuple[int, int]:
        """Return a range of an input, mostly a short one."""
        start = self._chance.randint(0, len(data))
        return start, min(len(data), start + int(self._chance.expovariate(0.08)))

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return b"\0"
        changed = bytearray(data)
        changed[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)

    def _cut(self, data: bytes) -> bytes:
        start, end = self._place(data)
        return data[:start] if self._chance.random() < 0.1 else data[:start] + data[end:]

    def _repeat(self, data: bytes) -> bytes:
        start, end = self._place(data)
        times = self._chance.choice((1, 2, 30, 1000))
        return data[:end] + data[start:end] * times + data[end:]

    def _insert_word(self, data: bytes) -> bytes:
        start, _ = self._place(data)
        return data[:start] + self._chance.choice(self._words) + data[start:]

    def _replace_token(self, data: bytes) -> bytes:
        return replace_token(self._chance, data, self._words)

    def _insert_bytes(self, data: bytes) -> bytes:
        start, end = self._place(data)
        return data[:start] + self._chance.randbytes(self._chance.choice((1, 2, 4, 8))) + data[end:]

    def _swap_lines(self, data: bytes) -> bytes:
        lines = data.split(b"\n")
        one, other = (self._chance.randrange(len(lines)) for _ in range(2))
        lines[one], lines[other] = lines[other], lines[one]
        return b"\n".join(lines)

    def _double_line(self, data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines.insert(self._chance.randrange(len(lines)), self._chance.choice(lines))
        return b"\n".join(lines)

    def _splice(self, data: bytes, other: bytes) -> bytes:
        (_, end), (start, stop) = self._place(data), self._place(other)
        return data[:end] + (other[start:] if self._chance.random() < 0.5 else other[start:stop])


def replace_token(chance: random.Random, data: bytes, words: Sequence[bytes]) -> bytes:
    """Return a text in which a token, such as a key or a value, is a word or another token."""
    old = _TOKEN.search(data, chance.randint(0, len(data)))
    if old is None:
        return data + chance.choice(words)
    new = chance.choice(words)
    other = _TOKEN.search(data, chance.randint(0, len(data)))
    if other is not None and chance.random() < 0.5:
        new = other[0]
    return data[: old.start()] + new + data[old.end() :]


def mutate_json(chance: random.Random, value: Any) -> Any:
    """Return a JSON value with one place in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        changed = dict(value)
        kind = chance.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.15:
            changed[f"{key}x"] = changed.pop(key)
        elif kind < 0.2:
            changed[key] = changed[chance.choice(list(value))]
        else:
            changed[key] = mutate_json(chance, value[key])
        return changed
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        kind = chance.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return value[:place] + [value[place]] * 2 + value[place:]
        return [*value[:place], mutate_json(chance, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.4:
        return chance.choice((value + 1, value - 1, -value, value << 32))
    return chance.choice(_ODD_VALUES)


def dumped(value: Any) -> bytes:
    """Return a JSON value as text."""
    return json.dumps(value, separators=(",", ":")).encode()
