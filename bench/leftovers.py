# SPDX-License-Identifier: Apache-2.0
"""Interfaces that come and go under protection, and what of them stays behind."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw import libbpf
from vgw.controller.allocator import give_back, share_one_pool
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.libbpf.library import library
from vgw.policy.model import PolicyDocument

#: Cycles after which caches and the like are as large as they get.
WARM_UP: Final = 10
#: The kernel frees programs and maps when no packet can be in them any more.
_PATIENCE: Final = 20.0


@dataclass(frozen=True, slots=True)
class Traces:
    """What there is of a host: in the kernel only what these cycles made."""

    programs: int
    maps: int
    descriptors: int
    pins: int
    files: int
    objects: int
    blocks: int
    malloc_kib: int
    resident_kib: int


class Cycles:
    """Makes interfaces, protects them and removes them again, as often as asked."""

    def __init__(self, host: Host, document: PolicyDocument) -> None:
        """Prepare for a policy: all interfaces of its VMs come and go at the same time.

        This process has its memory as the controller has: one pool, and given back in the end.
        """
        share_one_pool()
        self._host = host
        self._document = document
        self._interfaces = [each.name for vm in document.vms.values() for each in vm.interfaces]
        self._programs: set[int] = set()
        self._maps: set[int] = set()

    def run(self, cycles: int, progress: Callable[[int], None] = lambda _: None) -> None:
        """Run at least so many cycles of an interface, some at the same time.

        In every other round the interfaces go first and their endpoints after them.
        """
        add = [
            f"link add {name} type veth peer name left-{number}"
            for number, name in enumerate(self._interfaces)
        ]
        remove = [f"link del {name}" for name in self._interfaces]
        for number, done in enumerate(range(0, cycles, len(self._interfaces))):
            progress(done)
            self._forget_freed()
            self._ip(add)
            self._host.attach_many(self._document)
            self._note()
            if number % 2:
                self._ip(remove)
                self._host.sweep()
            else:
                self._host.detach_all()
                self._ip(remove)

    def traces(self) -> Traces:
        """Return what there is, after the kernel had time to free what is to go."""
        deadline = time.monotonic() + _PATIENCE
        while (alive := self._alive()) != (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        gc.collect()
        paths = self._host.paths
        give_back()
        return Traces(
            programs=alive[0],
            maps=alive[1],
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            pins=len([pin for pin in _files(paths.bpffs) if pin.suffix != ".debug"]),
            files=len(_files(paths.state_dir)),
            objects=len(gc.get_objects()),
            blocks=sys.getallocatedblocks(),
            malloc_kib=_in_use() >> 10,
            resident_kib=_resident_kib(),
        )

    def _note(self) -> None:
        """Remember the numbers of what protects the interfaces now."""
        opened = self._host.endpoints()
        if len(opened) != len(self._interfaces):
            raise VgwError(f"{len(opened)} of {len(self._interfaces)} interfaces are protected")
        for endpoint in opened:
            with endpoint:
                self._programs.update(endpoint.programs.values())
                self._maps.update(libbpf.map_info(fd).id for fd in endpoint.fds.values())

    def _alive(self) -> tuple[int, int]:
        """Return how many programs and maps of all cycles are there."""
        self._forget_freed()
        return len(self._programs), len(self._maps)

    def _forget_freed(self) -> None:
        """Forget the numbers of what is gone: of all cycles they would be most of what stays."""
        self._programs.intersection_update(_ids("bpf_prog_get_next_id"))
        self._maps.intersection_update(_ids("bpf_map_get_next_id"))

    def _ip(self, commands: Sequence[str]) -> None:
        text = "".join(f"{command}\n" for command in commands)
        done = subprocess.run(
            ["ip", "-batch", "-"], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise VgwError(f"ip {commands[0]}: {done.stderr.strip()}")


def _files(directory: Path) -> list[Path]:
    return [entry for entry in directory.rglob("*") if not entry.is_dir()]


class _MallocInfo(ctypes.Structure):
    """Sums over all arenas, in bytes: struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _in_use() -> int:
    """Return how many bytes the C library has allocated, in its pools and by mmap."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallocInfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _resident_kib() -> int:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def _ids(next_id: str) -> Iterator[int]:
    """Yield all ids of a kind on this machine. Nothing is opened, for that would keep it."""
    number = ctypes.c_uint32(0)
    while getattr(library(), next_id)(number, ctypes.byref(number)) == 0:
        yield number.value
