# SPDX-License-Identifier: Apache-2.0
"""Compiled policies in maps: how an image is divided among them, and how they get to an endpoint.

Policies are shared: the endpoints that have the same one hold the same maps in their maps of maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from vgw import abi, libbpf
from vgw.abi_maps import number, packed

_CHUNK_BYTES: Final = ctypes.sizeof(abi.ImageChunk)
_PART_BYTES: Final = ctypes.sizeof(abi.ImagePart)
_FIRST: Final = bytes(4)
_ID_BYTES: Final = 4

#: The ids of the maps that hold an image of a policy, in their order.
ChunkIds = Sequence[int]


class ImagePlace(NamedTuple):
    """Where an image is put: fds of `policies` and `policy_parts`, and which place of them."""

    policies: int
    parts: int
    place: int

    def put(self, first: int, fds: Sequence[int]) -> None:
        """Put maps of an image there, its number `first` and those behind. Raises KernelError."""
        if first == 0:
            put_fds(self.policies, self.place, fds[:1])
            first, fds = 1, fds[1:]
        put_fds(self.parts, abi.first_part(self.place) + first - 1, fds)


class Image(Protocol):
    """A compiled policy in maps of the kernel."""

    def put(self, place: ImagePlace) -> None:
        """Put its maps into their places. Raises KernelError."""


def image_chunks(data: bytes) -> Iterator[bytes]:
    """Yield what each of the maps of a policy's image holds.

    The first is for `policies`: a small image, or the beginning of a longer one, which is in the
    others, for `policy_parts`.
    """
    if data:
        yield data[:_CHUNK_BYTES].ljust(_CHUNK_BYTES, b"\0")
    if len(data) > _CHUNK_BYTES:
        for start in range(0, len(data), _PART_BYTES):
            yield data[start : start + _PART_BYTES].ljust(_PART_BYTES, b"\0")


def write_chunk(fd: int, chunk: bytes) -> None:
    """Write a part of an image into its map; raises KernelError."""
    libbpf.map_update(fd, _FIRST, chunk)


def put_fds(fd: int, first: int, fds: Sequence[int]) -> None:
    """Put open maps into a map of maps, from index `first` on. Raises KernelError."""
    libbpf.map_update_many(fd, {packed(n): packed(each) for n, each in enumerate(fds, first)})


def read_chunks(fd: int) -> dict[int, int]:
    """Return the ids of the maps in a map of maps, by index. Raises KernelError."""
    return {
        number(key): number(value) for key, value in libbpf.map_entries(fd, _ID_BYTES, _ID_BYTES)
    }
