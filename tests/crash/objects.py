# SPDX-License-Identifier: Apache-2.0
"""What vgw has in the kernel: maps and programs that were made and live, and those in use."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from vgw import libbpf
from vgw.controller.links import opened
from vgw.controller.paths import Paths
from vgw.libbpf.library import library
from vgw.maps_images import read_chunks

_MADE: Final = struct.Struct("=cI")
_KINDS: Final = {
    b"m": ("bpf_map_create", libbpf.map_info),
    b"p": ("bpf_prog_load", libbpf.prog_info),
}


class InKernel(NamedTuple):
    """Ids of maps and programs."""

    maps: frozenset[int]
    programs: frozenset[int]


class Made:
    """The maps and programs that this process and its children make, while recorded."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reading, False)
        self._ids: dict[bytes, set[int]] = {kind: set() for kind in _KINDS}
        self._process = os.getpid()

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what is made in a `with` block, by this process or those forked in it."""
        calls = {name: getattr(library(), name) for name, _ in _KINDS.values()}
        for kind, (name, info) in _KINDS.items():
            setattr(library(), name, self._recording(kind, calls[name], info))
        try:
            yield
        finally:
            for name, call in calls.items():
                setattr(library(), name, call)

    def _recording(
        self, kind: bytes, call: Callable[..., int], info: Callable[[int], Any]
    ) -> Callable[..., int]:
        def recording(*arguments: Any) -> int:
            fd = call(*arguments)
            if fd >= 0 and os.getpid() == self._process:
                self._ids[kind].add(info(fd).id)
            elif fd >= 0:
                os.write(self._writing, _MADE.pack(kind, info(fd).id))
            return fd

        return recording

    def alive(self) -> InKernel:
        """Return those that are still there."""
        while True:
            try:
                data = os.read(self._reading, _MADE.size * 512)
            except BlockingIOError:
                break
            for kind, number in _MADE.iter_unpack(data):
                self._ids[kind].add(number)
        for kind, name in ((b"m", "bpf_map_get_next_id"), (b"p", "bpf_prog_get_next_id")):
            self._ids[kind] = {number for number in self._ids[kind] if _exists(name, number)}
        return InKernel(frozenset(self._ids[b"m"]), frozenset(self._ids[b"p"]))


def _exists(next_id: str, number: int) -> bool:
    """Tell whether there is an object of an id, without opening it.

    Opening would disturb: Linux queues the emptying of a map of programs at the last close, and a
    second one while it waits is never finished, so that the map stays for ever.
    """
    found = ctypes.c_uint32(0)
    return (
        getattr(library(), next_id)(number - 1, ctypes.byref(found)) == 0 and found.value == number
    )


def in_use(paths: Paths) -> InKernel:
    """Return the maps and programs that pins lead to, directly or through a map."""
    maps: set[int] = set()
    programs: set[int] = set()
    for pin in paths.bpffs.rglob("*"):
        if pin.is_dir() or pin.name.startswith("link_"):
            continue
        with opened(pin) as fd:
            if pin.name.startswith("prog_"):
                programs.add(libbpf.prog_info(fd).id)
                continue
            info = libbpf.map_info(fd)
            maps.add(info.id)
            if info.map_type in libbpf.MAPS_OF_MAPS:
                maps.update(read_chunks(fd).values())
            elif info.map_type == libbpf.MapType.PROG_ARRAY:
                programs.update(read_chunks(fd).values())
    return InKernel(frozenset(maps), frozenset(programs))


def used_by_programs(paths: Paths) -> frozenset[int]:
    """Return the maps that pinned programs use, whether they are pinned or not."""
    maps: set[int] = set()
    for pin in paths.bpffs.rglob("prog_*"):
        with opened(pin) as fd:
            maps.update(libbpf.prog_info(fd).map_ids)
    return frozenset(maps)
