# SPDX-License-Identifier: Apache-2.0
"""Attachments: bpf_links, pins in bpffs, and what is attached to an interface."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
from collections.abc import Iterator, Sequence
from ctypes import c_int, c_size_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw.libbpf.entry_reads import addresses
from vgw.libbpf.library import change, check, failure, library

XDP_GENERIC: Final = 1 << 1
XDP_NATIVE: Final = 1 << 2
_BEFORE: Final = 1 << 3
_MAX_PROGRAMS: Final = 64
_ProgramIds: Final = c_uint32 * _MAX_PROGRAMS


class AttachType(enum.IntEnum):
    """Attach types vgw uses, as numbered by the kernel."""

    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class LinkType(enum.IntEnum):
    """Link types vgw uses, as numbered by the kernel."""

    XDP = 6
    TCX = 11


_TCX: Final = (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS)


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says about a link; ifindex is 0 once the interface is gone."""

    type: int
    id: int
    prog_id: int
    ifindex: int
    attach_type: int


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("flags", c_uint32),
        ("iter_info_len", c_uint32),
    ]


class _LinkInfo(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("pad", c_uint32),
        ("ifindex", c_uint32),
        ("attach_type", c_uint32),
        ("rest", c_uint8 * 104),
    ]


def link_create(prog_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program to an interface by a link and return the link's fd.

    A TCX program is put before those already there, so that it runs first. For XDP `flags` is
    XDP_NATIVE or XDP_GENERIC. Raises KernelError: EINVAL or EOPNOTSUPP where the kernel or the
    driver lacks the hook, EBUSY where an XDP program is attached already.
    """
    if attach_type in _TCX:
        flags |= _BEFORE
    opts = _LinkCreateOpts(ctypes.sizeof(_LinkCreateOpts), flags=flags)
    call = library().bpf_link_create
    created = change(
        "link create", prog_fd, call, prog_fd, ifindex, attach_type, ctypes.byref(opts)
    )
    return check(created, f"attach a program to the interface with index {ifindex}")


def link_detach(fd: int) -> None:
    """Detach the program of a link, whoever else holds the link; raises KernelError."""
    check(change("link detach", fd, library().bpf_link_detach, fd), "detach a program")


def link_update(fd: int, prog_fd: int) -> None:
    """Make a link run another program from the next packet on; raises KernelError."""
    updated = change("link update", prog_fd, library().bpf_link_update, fd, prog_fd, None)
    check(updated, "replace the program of a link")


def xdp_link(ifindex: int, prog_id: int) -> int | None:
    """Return an fd of the link by which an XDP program is on an interface, None without a link.

    Looks through all links of the host; needs CAP_SYS_ADMIN; raises KernelError.
    """
    link_id = c_uint32(0)
    while library().bpf_link_get_next_id(link_id.value, ctypes.byref(link_id)) == 0:
        fd: int = library().bpf_link_get_fd_by_id(link_id.value)
        if fd == -errno.ENOENT:  # gone since it was listed
            continue
        check(fd, f"open the link with id {link_id.value}")
        info = link_info(fd)
        if (info.type, info.ifindex, info.prog_id) == (LinkType.XDP, ifindex, prog_id):
            return fd
        os.close(fd)
    return None


def link_info(fd: int) -> LinkInfo:
    """Return what the kernel says about the XDP or TCX link; raises KernelError."""
    info = _LinkInfo()
    size = c_uint32(ctypes.sizeof(info))
    result = library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    check(result, "describe a link")
    attach_type = AttachType.XDP if info.type == LinkType.XDP else info.attach_type
    return LinkInfo(info.type, info.id, info.prog_id, info.ifindex, attach_type)


def tcx_programs(ifindex: int, attach_type: int) -> list[int]:
    """Return the ids of the programs at a TCX hook, first to run first; raises KernelError.

    The list is empty on a kernel without TCX.
    """
    ids = _ProgramIds()
    count = c_uint32(_MAX_PROGRAMS)
    result = library().bpf_prog_query(
        ifindex, attach_type, 0, ctypes.byref(c_uint32()), ids, ctypes.byref(count)
    )
    if result in (-errno.EINVAL, -errno.ENOENT):
        return []
    check(result, f"list the programs of the interface with index {ifindex}")
    return list(ids[: count.value])


class TcxLists:
    """Reads the lists of programs of many interfaces, over and over.

    What the questions need is made once, and the loop over them stays in the interpreter's C.
    """

    def __init__(self) -> None:
        self._ifindexes: list[int] = []
        self._query = ctypes.CFUNCTYPE(c_int, c_int, c_int, c_uint32, c_void_p, c_void_p, c_void_p)(
            ("bpf_prog_query", library())
        )
        self._flags = c_uint32()

    def read(self, ifindexes: Sequence[int]) -> list[tuple[bytes, bytes]]:
        """Return what is at the ingress and at the egress hook of each interface, in their order.

        These are the ids that tcx_programs returns, as numbers of 32 bits one behind the other;
        none where that raises an error.
        """
        if not ifindexes:
            return []
        if list(ifindexes) != self._ifindexes:
            self._prepare(ifindexes)
        ctypes.memmove(self._counts, self._room, ctypes.sizeof(self._room))
        results = list(map(self._query, *self._arguments))
        lists = self._ids_of(results)
        return list(zip(lists, lists, strict=True))

    def _ids_of(self, results: Sequence[int]) -> Iterator[bytes]:
        """Yield what the kernel wrote, by the results of the questions."""
        ids, size, place = memoryview(self._ids).cast("B"), ctypes.sizeof(_ProgramIds), 0
        for result, count in zip(results, self._counts, strict=True):
            yield b"" if result < 0 else bytes(ids[place : place + 4 * count])
            place += size

    def _prepare(self, ifindexes: Sequence[int]) -> None:
        self._ifindexes = list(ifindexes)
        questions = len(_TCX) * len(ifindexes)
        self._ids = (_ProgramIds * questions)()
        self._counts = (c_uint32 * questions)()
        self._room = (c_uint32 * questions)(*[_MAX_PROGRAMS] * questions)
        self._arguments = (
            [index for index in ifindexes for _ in _TCX],
            [int(each) for each in _TCX] * len(ifindexes),
            [0] * questions,
            [ctypes.addressof(self._flags)] * questions,
            addresses(self._ids),
            addresses(self._counts),
        )


def pin(fd: int, path: str | os.PathLike[str]) -> None:
    """Keep a map, program or link alive under `path` in a bpffs; raises KernelError."""
    result = change("pin", path, library().bpf_obj_pin, fd, os.fsencode(path))
    if result < 0:
        where = Path(path).parent
        refused = -result in {errno.EPERM, errno.EINVAL}
        hint = f"{where} must be in a bpffs: `mount -t bpf bpf {where}`" if refused else None
        raise failure(f"pin to {os.fspath(path)}", -result, hint)


def get_pinned(path: str | os.PathLike[str]) -> int:
    """Open what is pinned at `path` and return its fd; raises KernelError (ENOENT: no such pin)."""
    fd: int = library().bpf_obj_get(os.fsencode(path))
    if fd < 0:
        raise failure(f"open the pin {os.fspath(path)}", -fd)
    return fd
