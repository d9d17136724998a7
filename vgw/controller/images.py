# SPDX-License-Identifier: Apache-2.0
"""The maps of compiled policies, the same for all endpoints of the host whose policies are equal.

An image lies in maps of one chunk each, and a map of maps, pinned under the image's digest, has
them in their order. It is pinned once all is written, so a pin is never half an image. The
endpoints' own maps keep the chunks alive; the pin is only how others find them, and goes when no
endpoint uses the image any more.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from vgw import abi, files, libbpf, loader
from vgw.controller.keyed_locks import KeyedLocks
from vgw.controller.paths import Paths
from vgw.controller.pins import entries
from vgw.errors import KernelError, VgwError
from vgw.loader import Artefact
from vgw.maps import ChunkIds, image_chunks, put_fds, read_chunks, write_chunk
from vgw.policy.compile import PolicyImage

_ID_BYTES: Final = 4
#: Maps of an image that are open at a time: a process may have 1,024 files.
_AT_ONCE: Final = 64


class Images:
    """The images that a change needs; for use from several threads, under the writer lock."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Keep the pins in a directory of bpffs, which is made with the first one."""
        self._directory = directory
        self._locks = KeyedLocks()
        self._checked: set[str] = set()

    @contextlib.contextmanager
    def opened(
        self, artefact: Artefact, images: Mapping[abi.Path, PolicyImage]
    ) -> Iterator[dict[abi.Path, ChunkIds]]:
        """Give the maps of images for a `with` block; those that the host lacks are made.

        `artefact` says what such a map is like. Raises VgwError.
        """
        with contextlib.ExitStack() as stack:
            found: dict[abi.Path, ChunkIds] = {}
            for path, image in images.items():
                fd = self._open(artefact, image)
                stack.callback(os.close, fd)
                found[path] = _chunks(fd)
            yield found

    def _open(self, artefact: Artefact, image: PolicyImage) -> int:
        with self._locks.of(image.digest):
            fd = self._adopt(artefact, image)
            return self._make(artefact, image) if fd is None else fd

    def _adopt(self, artefact: Artefact, image: PolicyImage) -> int | None:
        """Open what is pinned; None when there is nothing, or it is not this image."""
        try:
            fd = libbpf.get_pinned(self._directory / image.digest)
        except KernelError:
            return None
        if image.digest not in self._checked and not _holds(artefact, fd, image):
            os.close(fd)
            return None
        self._checked.add(image.digest)
        return fd

    def _make(self, artefact: Artefact, image: PolicyImage) -> int:
        fd = make_image(artefact, image.data)
        try:
            pin = self._directory / image.digest
            files.mkdir(self._directory, 0o700, exist_ok=True)
            files.unlink(pin)
            libbpf.pin(fd, pin)
        except OSError as error:
            os.close(fd)
            raise files.failure(error) from error
        except BaseException:
            os.close(fd)
            raise
        self._checked.add(image.digest)
        return fd


def make_image(artefact: Artefact, data: bytes) -> int:
    """Write an image into maps of its own, and return the fd of a map of maps that has them.

    Raises KernelError.
    """
    chunks = list(image_chunks(data))
    fds: list[int] = []
    image = None
    try:
        for number, chunk in enumerate(chunks):
            fds.append(loader.new_inner(artefact, "policies", 1))
            write_chunk(fds[-1], chunk)
            if image is None:
                kind = libbpf.MapType.ARRAY_OF_MAPS
                image = libbpf.map_create(kind, "image", 4, 4, len(chunks), inner_fd=fds[0])
            if len(fds) == _AT_ONCE or number == len(chunks) - 1:
                put_fds(image, number + 1 - len(fds), fds)
                while fds:
                    os.close(fds.pop())
    except BaseException:
        for fd in (*fds, *(() if image is None else (image,))):
            os.close(fd)
        raise
    if image is None:
        raise VgwError("a policy without a header is none; please report this")
    return image


@contextlib.contextmanager
def private_image(artefact: Artefact, data: bytes) -> Iterator[ChunkIds]:
    """Give maps of an image that no one else finds, for a `with` block. Raises KernelError."""
    fd = make_image(artefact, data)
    try:
        yield _chunks(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def private_images(
    artefact: Artefact, images: Mapping[abi.Path, PolicyImage]
) -> Iterator[dict[abi.Path, ChunkIds]]:
    """Give maps of images as private_image() does."""
    with contextlib.ExitStack() as stack:
        yield {
            path: stack.enter_context(private_image(artefact, image.data))
            for path, image in images.items()
        }


def _chunks(fd: int) -> ChunkIds:
    """Return the maps of an image in their order."""
    return [chunk for _, chunk in sorted(read_chunks(fd).items())]


def _holds(artefact: Artefact, fd: int, image: PolicyImage) -> bool:
    """Tell whether a map of maps holds an image, whole."""
    wanted = list(image_chunks(image.data))
    try:
        info = libbpf.map_info(fd)
        if (info.map_type, info.max_entries) != (libbpf.MapType.ARRAY_OF_MAPS, len(wanted)):
            return False
        found = _chunks(fd)
        return len(found) == len(wanted) and all(
            _is_chunk(artefact, chunk, data) for chunk, data in zip(found, wanted, strict=True)
        )
    except KernelError:
        return False


def _is_chunk(artefact: Artefact, map_id: int, data: bytes) -> bool:
    """Tell whether a map is of the right kind and has this part of an image."""
    spec = artefact.maps[artefact.maps["policies"].inner or ""]
    wanted = (spec.map_type, spec.key_size, spec.value_size, spec.max_entries, spec.flags)
    fd = libbpf.map_fd_by_id(map_id)
    try:
        info = libbpf.map_info(fd)
        kind = (info.map_type, info.key_size, info.value_size, info.max_entries, info.flags)
        return kind == wanted and libbpf.map_lookup(fd, bytes(4), spec.value_size) == data
    finally:
        os.close(fd)


def pinned_images(paths: Paths) -> dict[int, str]:
    """Return the digest of each image that is pinned, by the id of its first map."""
    found: dict[int, str] = {}
    for pin in entries(paths.images):
        with contextlib.suppress(KernelError, VgwError):
            found[_first_chunk(pin, 0)] = pin.name
    return found


def remove_unused_images(paths: Paths) -> None:
    """Unpin the images that no endpoint has in either slot, and what is no image."""
    unused = {pin.name for pin in entries(paths.images)}
    digests = pinned_images(paths) if unused else {}
    for policies in paths.pins.glob("*/*/policies"):
        if not unused:
            break
        for map_id in _inner_ids(policies):
            unused.discard(digests.get(map_id, ""))
    for name in unused:
        files.unlink(paths.images / name)
    with contextlib.suppress(OSError):
        files.rmdir(paths.images)


def _inner_ids(pin: pathlib.Path) -> Iterator[int]:
    """Yield what tells the policies in both slots of an endpoint, whole or broken, from others."""
    for slot in range(abi.CONFIG_SLOTS):
        for path in abi.Path:
            with contextlib.suppress(KernelError, VgwError):
                yield _first_chunk(pin, abi.first_chunk(slot, path))


def _first_chunk(pin: pathlib.Path, index: int) -> int:
    """Return the id of a map in a pinned map of maps. Raises VgwError when there is none."""
    fd = libbpf.get_pinned(pin)
    try:
        value = libbpf.map_lookup(fd, index.to_bytes(4, sys.byteorder), _ID_BYTES)
    finally:
        os.close(fd)
    if value is None:
        raise VgwError(f"{pin} has no policy")
    return int.from_bytes(value, sys.byteorder)
