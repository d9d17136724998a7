# SPDX-License-Identifier: Apache-2.0
"""What a target of the fuzzer is: where inputs come from, and what is done with one."""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

_DETAIL = re.compile(r"0x[0-9a-fA-F]+|'[^']*'|\"[^\"]*\"|[0-9]+|/[^\s:]+")


class WrongError(Exception):
    """An input came to something that it must not come to."""


@contextmanager
def quick_directory() -> Iterator[Path]:
    """Have a directory for a block, in memory where there is such a place: disks are slow."""
    memory = Path("/dev/shm")  # noqa: S108 - within it the directory is this process's own
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vgw-fuzz-", dir=place) as name:
        yield Path(name)


class Target(Protocol):
    """Something that takes inputs from outside."""

    #: Texts that mean something to it.
    words: Sequence[bytes]
    #: Whether `shape` changes inputs by itself, in ways that leave them readable.
    has_structure: bool

    def seeds(self) -> Sequence[bytes]:
        """Return inputs to begin with, valid and hostile ones."""

    def shape(self, chance: random.Random, data: bytes) -> bytes:
        """Return a mutated input with what would only keep it from being looked into put right."""

    def running(self) -> AbstractContextManager[None]:
        """Be ready for inputs during a block."""

    def give(self, data: bytes) -> Hashable:
        """Give it one input and return what is typical of what came of it.

        Whatever escapes is a finding; WrongError says that more than an exception was wrong.
        """


def outline(text: str) -> str:
    """Return a message without its names and numbers."""
    return _DETAIL.sub("#", text)[:200]
