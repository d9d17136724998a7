# SPDX-License-Identifier: Apache-2.0
"""Compiled policies in maps: how an image is divided among them, and how they get to an endpoint.

Policies are shared: the endpoints that have the same one hold the same maps in their maps of maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from vgw import abi, libbpf
from vgw.abi_maps import MAP_SIZES, number, packed

_CHUNK_BYTES: Final = ctypes.sizeof(abi.ImageChunk)
_PARTS: Final = "policy_parts"
#: Bytes of a map that an image or a part of it is in -> the map of maps for it, in their order.
_OUTER_OF: Final = {
    MAP_SIZES[f"{name}_inner"][1]: name for name in ("policies", "policies_medium", _PARTS)
}
IMAGE_MAPS: Final = tuple(_OUTER_OF.values())
_FIRST: Final = bytes(4)
_ID_BYTES: Final = 4

#: The ids of the maps that hold an image of a policy, in their order.
ChunkIds = Sequence[int]


class ImagePlace(NamedTuple):
    """Where an image is put: fds by name of IMAGE_MAPS, and which place of them."""

    outer: Mapping[str, int]
    place: int

    def put(self, fds: Sequence[int]) -> None:
        """Put the maps of an image there, in their order. Raises KernelError."""
        put_fds(self.outer["policies"], self.place, fds[:1])
        if fds[1:]:
            outer = _OUTER_OF[libbpf.map_info(fds[1]).value_size]
            put_fds(self.outer[outer], image_places(outer, self.place).start, fds[1:])


def image_places(outer: str, place: int) -> range:
    """Return the places of an image in one of IMAGE_MAPS."""
    if outer == _PARTS:
        return range(abi.first_part(place), abi.first_part(place + 1))
    return range(place, place + 1)


class Chunk(NamedTuple):
    """What a map of an image holds, and the map of maps that it is for."""

    outer: str
    data: bytes


class Image(Protocol):
    """A compiled policy in maps of the kernel."""

    def put(self, place: ImagePlace) -> None:
        """Put its maps into their places. Raises KernelError."""


def image_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the maps of a policy's image.

    The first is for `policies`: a small image, or the beginning of a longer one. That is in one map
    for `policies_medium` where it fits, else in those for `policy_parts`.
    """
    if data:
        yield Chunk("policies", data[:_CHUNK_BYTES].ljust(_CHUNK_BYTES, b"\0"))
    if len(data) > _CHUNK_BYTES:
        size = next((each for each in _OUTER_OF if len(data) <= each), max(_OUTER_OF))
        for start in range(0, len(data), size):
            yield Chunk(_OUTER_OF[size], data[start : start + size].ljust(size, b"\0"))


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
