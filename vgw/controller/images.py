# SPDX-License-Identifier: Apache-2.0
"""The maps of compiled policies, the same for all endpoints of the host whose policies are equal.

An image lies in one map or in several, which are pinned by their number in a directory with the
image's digest as its name. The directory gets that name once all is written, so there is never half
an image. The endpoints' own maps keep the chunks alive; the pins are how they are found by a
process that may not open maps by id, and go when no endpoint uses the image any more.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from vgw import abi, files, libbpf, loader
from vgw.controller.keyed_locks import KeyedLocks
from vgw.controller.links import opened
from vgw.controller.paths import Paths
from vgw.controller.pins import ASIDE, all_endpoint_dirs, entries, names, quietly, remove_tree
from vgw.errors import KernelError, VgwError
from vgw.loader import Artefact
from vgw.maps import EndpointMaps
from vgw.maps_images import Chunk, ChunkIds, Image, ImagePlace, image_chunks, write_chunk
from vgw.policy.compile import PolicyImage

_ID_BYTES: Final = 4


class PinnedImage:
    """An image that is pinned in a directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    def pins(self) -> list[pathlib.Path]:
        """Return the pins of the chunks in their order; none, if they are not numbered from 0."""
        there = {*names(self.directory)}
        pins = [str(number) for number in range(len(there))]
        return [self.directory / name for name in pins] if there == {*pins} else []

    def ids(self) -> ChunkIds:
        """Return the ids of the chunks in their order. Raises KernelError."""
        return [_map_id(pin) for pin in self.pins()]

    def put(self, place: ImagePlace) -> None:
        """Put the chunks into their places. Raises KernelError."""
        with contextlib.ExitStack() as stack:
            place.put([stack.enter_context(opened(pin)) for pin in self.pins()])


class PrivateImage:
    """An image that no one else finds: its maps are made where they are put."""

    def __init__(self, artefact: Artefact, data: bytes) -> None:
        """Remember the data; `artefact` says what a map is like."""
        self._artefact = artefact
        self._data = data

    def put(self, place: ImagePlace) -> None:
        """Put maps with the data into their places. Raises KernelError."""
        with _chunk_maps(self._artefact, self._data) as fds:
            place.put(fds)


def private_images(
    artefact: Artefact, images: Mapping[abi.Path, PolicyImage]
) -> dict[abi.Path, Image]:
    """Return images that no one else finds."""
    return {path: PrivateImage(artefact, image.data) for path, image in images.items()}


class Images:
    """The images that a change needs; for use from several threads, under the writer lock."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Keep the pins in a directory of bpffs, which is made with the first one."""
        self._directory = directory
        self._locks = KeyedLocks()
        self._checked: set[str] = set()
        #: The ids of what is pinned, for many endpoints share an image; only _ready() changes it.
        self._ids: dict[str, ChunkIds] = {}

    def ready(
        self, artefact: Artefact, images: Mapping[abi.Path, PolicyImage]
    ) -> dict[abi.Path, Image]:
        """Return the maps of images; those that the host lacks are made.

        `artefact` says what such a map is like. Raises VgwError.
        """
        return {path: self._ready(artefact, image) for path, image in images.items()}

    def are_in_force(self, digests: Mapping[abi.Path, str], maps: EndpointMaps) -> bool:
        """Tell whether what is pinned by these names is what an endpoint judges packets by."""
        try:
            return all(
                chunks and self._pinned_ids(digests[path]) == chunks
                for path, chunks in maps.policies(maps.active_slot()).items()
            )
        except KernelError:
            return False

    def in_force(self, maps: EndpointMaps) -> dict[abi.Path, Image]:
        """Return the images that an endpoint judges packets by.

        Raises VgwError when they are not pinned any more.
        """
        digests = _first_chunks(self._directory)
        found: dict[abi.Path, Image] = {}
        for path, chunks in maps.policies(maps.active_slot()).items():
            image = PinnedImage(self._directory / digests.get(next(iter(chunks), 0), ASIDE))
            if not chunks or image.ids() != chunks:
                raise VgwError(
                    "the policy in force is not pinned: apply the policy of the VM, then try again"
                )
            found[path] = image
        return found

    def _pinned_ids(self, digest: str) -> ChunkIds:
        """Return the ids of the chunks that are pinned of an image. Raises KernelError."""
        with self._locks.of(digest):
            if digest not in self._ids:
                self._ids[digest] = PinnedImage(self._directory / digest).ids()
            return self._ids[digest]

    def _ready(self, artefact: Artefact, image: PolicyImage) -> PinnedImage:
        pinned = PinnedImage(self._directory / image.digest)
        with self._locks.of(image.digest):
            if image.digest not in self._checked:
                if not _holds(artefact, pinned, image):
                    self._ids.pop(image.digest, None)
                    _make(artefact, pinned.directory, image)
                self._checked.add(image.digest)
        return pinned


def _make(artefact: Artefact, directory: pathlib.Path, image: PolicyImage) -> None:
    """Write an image into maps and pin them, all or none. Raises VgwError."""
    fresh = directory.with_name(f"{ASIDE}{image.digest}")
    try:
        _remove(fresh)
        files.mkdir(fresh, 0o700)
        with _chunk_maps(artefact, image.data) as fds:
            for number, fd in enumerate(fds):
                libbpf.pin(fd, fresh / str(number))
        _remove(directory)
        files.rename(fresh, directory)
    except OSError as error:
        quietly(_remove, fresh)
        raise VgwError(f"cannot pin the policy: {error.strerror}: {error.filename}") from error
    except BaseException:
        quietly(_remove, fresh)
        raise


@contextlib.contextmanager
def _chunk_maps(artefact: Artefact, data: bytes) -> Iterator[Sequence[int]]:
    """Make the maps of an image; yield their fds, which close then."""
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        for chunk in image_chunks(data):
            fds.append(loader.new_inner(artefact, chunk.outer, 1))
            stack.callback(os.close, fds[-1])
            write_chunk(fds[-1], chunk.data)
        yield fds


def _remove(place: pathlib.Path) -> None:
    """Remove an image, or whatever is in its place."""
    if place.is_dir():
        remove_tree(place)
    else:
        files.unlink(place)


def _holds(artefact: Artefact, pinned: PinnedImage, image: PolicyImage) -> bool:
    """Tell whether an image is pinned, whole."""
    wanted = list(image_chunks(image.data))
    pins = pinned.pins()
    try:
        return len(pins) == len(wanted) and all(
            _is_chunk(artefact, pin, chunk) for pin, chunk in zip(pins, wanted, strict=True)
        )
    except KernelError:
        return False


def _is_chunk(artefact: Artefact, pin: pathlib.Path, chunk: Chunk) -> bool:
    """Tell whether a pin is a map as one of an image is, and has its data."""
    spec = artefact.maps[artefact.maps[chunk.outer].inner or ""]
    wanted = (spec.map_type, spec.key_size, spec.value_size, spec.max_entries, spec.flags)
    with opened(pin) as fd:
        info = libbpf.map_info(fd)
        kind = (info.map_type, info.key_size, info.value_size, info.max_entries, info.flags)
        return kind == wanted and libbpf.map_lookup(fd, bytes(4), spec.value_size) == chunk.data


def _map_id(pin: pathlib.Path) -> int:
    with opened(pin) as fd:
        return libbpf.map_info(fd).id


def pinned_images(paths: Paths) -> dict[int, str]:
    """Return the digest of each image that is pinned, by the id of its first map."""
    return _first_chunks(paths.images)


def _first_chunks(directory: pathlib.Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for image in entries(directory):
        if not image.name.startswith(ASIDE):
            with contextlib.suppress(KernelError):
                found[_map_id(image / "0")] = image.name
    return found


def remove_unused_images(paths: Paths) -> None:
    """Unpin the images that no endpoint has in either slot, and what is no image."""
    unused = {*names(paths.images)}
    digests = pinned_images(paths) if unused else {}
    for directory in all_endpoint_dirs(paths.pins):
        if not unused:
            break
        for map_id in _inner_ids(directory / "policies"):
            unused.discard(digests.get(map_id, ""))
    for digest in unused:
        _remove(paths.images / digest)
    with contextlib.suppress(OSError):
        files.rmdir(paths.images)


def _inner_ids(pin: pathlib.Path) -> Iterator[int]:
    """Yield what tells the policies in both slots of an endpoint, whole or broken, from others."""
    with contextlib.suppress(KernelError), opened(pin) as fd:
        for slot in range(abi.CONFIG_SLOTS):
            for path in abi.Path:
                index = abi.policy_place(slot, path).to_bytes(4, sys.byteorder)
                with contextlib.suppress(KernelError):
                    value = libbpf.map_lookup(fd, index, _ID_BYTES)
                    if value is not None:
                        yield int.from_bytes(value, sys.byteorder)
