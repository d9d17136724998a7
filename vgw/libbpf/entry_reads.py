# SPDX-License-Identifier: Apache-2.0
"""Reading arrays of many maps over and over: what the calls need is made once.

A call of the kernel takes a microsecond; what Python does to make it takes as long or longer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_int, c_uint32, c_void_p
from itertools import repeat
from typing import Any, Generic, TypeVar

from vgw.libbpf.library import failure, library
from vgw.libbpf.maps import ArrayPart

_Structure = TypeVar("_Structure", bound=ctypes.Structure)


def addresses(values: ctypes.Array[Any]) -> list[int]:
    """Return where each of the values is in memory."""
    first, size = ctypes.addressof(values), ctypes.sizeof(values._type_)
    return list(range(first, first + size * len(values), size))


class EntryReads(Generic[_Structure]):
    """Reads one element of each of many arrays into structures that stay where they are.

    The loop over them stays in the interpreter's C. For one thread at a time.
    """

    def __init__(self, fds: Sequence[int], structure: type[_Structure], indexes: int = 1) -> None:
        """Read these arrays, of which elements below `indexes` may be asked for."""
        self._fds = list(fds)
        self.values = (structure * len(self._fds))()
        self._addresses = addresses(self.values)
        self._indexes = (c_uint32 * indexes)(*range(indexes))
        self._keys = addresses(self._indexes)
        prototype = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)
        self._lookup = prototype(("bpf_map_lookup_elem", library()))

    def read(self, indexes: Iterable[int] | None = None) -> ctypes.Array[_Structure]:
        """Read the elements with these indexes, one of each array, by default the first ones.

        What is returned is written again by the next call. Raises KernelError.
        """
        keys = repeat(self._keys[0]) if indexes is None else map(self._keys.__getitem__, indexes)
        failed = next(filter(None, map(self._lookup, self._fds, keys, self._addresses)), 0)
        if failed:
            raise failure("read from a map", -failed)
        return self.values


class PartReads:
    """Reads the same parts of one array after the other into memory that stays where it is.

    For one thread at a time.
    """

    def __init__(self, value_size: int, parts: Iterable[tuple[int, int]]) -> None:
        """Read parts, each given by first index and count; `value_size` is as for map_lookup()."""
        self._parts = [ArrayPart(value_size, first, count) for first, count in parts]

    def read(self, fd: int) -> Iterator[tuple[int, bytes]]:
        """Yield first index and values of each part, the values one behind the other.

        Raises KernelError.
        """
        for part in self._parts:
            yield part.first, part.read(fd)
