# SPDX-License-Identifier: Apache-2.0
"""Test runs of programs on frames that differ from run to run, and what the runs alone cost.

A test run of the kernel gives a program the same frame again and again. So what runs is a small
program (vary_xdp.c, vary_tc.c) that writes other numbers into the frame and hands it to the
measured one by a tail call. What that costs is measured beside each sample: the same runs, handed
to a program that does nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw import libbpf, loader
from vgw.libbpf import ProgType

#: VARY_TARGETS of vary.h: programs that do nothing are in the upper half.
_TARGETS: Final = 1024
MOST_PROGRAMS: Final = _TARGETS // 2
#: Type of a program -> the program that stands in front of it, and its map of programs.
_ENTRIES: Final = {
    ProgType.XDP: ("vary_xdp", "xdp_targets"),
    ProgType.SCHED_CLS: ("vary_tc", "tc_targets"),
}
#: `mov r0, 1; exit`: XDP_ABORTED and TC_ACT_UNSPEC are neither.
_NOTHING: Final = bytes.fromhex("b700000001000000 9500000000000000")
#: Members of struct variation in vary.h.
_STATE: Final = struct.Struct("=13Q")
#: Behind each frame, where numbers go that a frame has no place for.
_SPARE: Final = bytes(8)
#: From one value to the next it is this part of all of them, about: an order that no prefetcher
#: sees through, in which each comes once before one comes again.
_STRIDE: Final = 0.618
_ALL: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, and where in it numbers are that may differ from run to run.

    `word` is the place of four bytes, mostly of an address, `half` and `number` of two bytes, as of
    a port. The frame of value n has n >> `shift` more in the word, the bits `half_mask` of n in the
    half, and n in the number.
    """

    data: bytes
    word: int | None = None
    half: int | None = None
    number: int | None = None
    shift: int = 8
    half_mask: int = 0xFF


@dataclass(frozen=True, slots=True)
class Sample:
    """Mean ns of a run on a packet: all of it, and what is left without the runs' own cost."""

    total: float
    net: float


def compile_entries(directory: Path) -> loader.Artefact:
    """Compile the programs in front of the measured ones, in a directory. Raises VgwError."""
    sources = directory / "vary"
    shutil.copytree(loader.bpf_dir(), sources)
    for source in Path(__file__).parent.glob("vary*.[ch]"):
        shutil.copy(source, sources)
    programs = {name: kind for kind, (name, _) in _ENTRIES.items()}
    tree = loader.SourceTree(sources, programs)
    return loader.load_artefact(directory / "cache", source=tree)


class Varier:
    """What measures programs of one type."""

    def __init__(self, entries: loader.Artefact, kind: ProgType, stack: ExitStack) -> None:
        """Load it, until `stack` ends. Raises KernelError."""
        name, targets = _ENTRIES[kind]
        instance = stack.enter_context(loader.instantiate(entries, (name,)))
        self._entry = instance.programs[name]
        self._state = instance.maps["variations"]
        self._targets = instance.maps[targets]
        self._nothing = libbpf.prog_load(kind, "vgw_nothing", _NOTHING)
        stack.callback(os.close, self._nothing)
        for place in range(MOST_PROGRAMS, _TARGETS):
            self._put(place, self._nothing)
        self._chosen: Sequence[int] = ()
        #: By the number of values: the one to go on with, so that none comes again too soon.
        self._next: dict[int, int] = {}

    def choose(self, programs: Sequence[int]) -> None:
        """Run these from now on, that of a value being the one with its number."""
        self._chosen = programs
        for place, program in enumerate(programs):
            self._put(place, program)

    def run(self, frame: Frame, values: int, runs: int, *, many: bool = False) -> int:
        """Run the program on `values` different frames in turn; return ns of a run.

        With `many` programs are chosen, and each value has its own.
        """
        return self._run(frame, values, runs, 0, many=many)

    def sample(self, frame: Frame, values: int, runs: int, *, many: bool = False) -> Sample:
        """Measure the same, just behind as many runs that lead nowhere.

        A single frame needs no program in front of the measured one, so there is none.
        """
        if values == 1 and not many:
            harness, total = (
                libbpf.prog_test_run(program, frame.data, repeat=runs).duration_ns
                for program in (self._nothing, self._chosen[0])
            )
        else:
            began = self._next.get(values, 0)
            harness = self._run(frame, values, runs, MOST_PROGRAMS, many=many)
            self._next[values] = began
            total = self._run(frame, values, runs, 0, many=many)
        return Sample(float(total), float(total - harness))

    def _run(self, frame: Frame, values: int, runs: int, target: int, *, many: bool) -> int:
        data = frame.data + _SPARE
        step = 1 % values if many else _step(values)
        began = self._next.get(values, 0)
        packed = _STATE.pack(
            *(began, step, values, target, _ALL if many else 0),
            *(*_place(data, frame.word, 4), frame.shift),
            *(*_place(data, frame.half, 2), frame.half_mask),
            *_place(data, frame.number, 2),
        )
        libbpf.map_update(self._state, bytes(4), packed)
        self._next[values] = (began + runs * step) % values
        return libbpf.prog_test_run(self._entry, data, repeat=runs).duration_ns

    def _put(self, place: int, program: int) -> None:
        index, fd = (number.to_bytes(4, sys.byteorder) for number in (place, program))
        libbpf.map_update(self._targets, index, fd)


def _step(values: int) -> int:
    """Return a step that comes by all of so many values."""
    step = int(values * _STRIDE)
    while math.gcd(step, values) != 1:
        step += 1
    return step % values


def _place(data: bytes, place: int | None, size: int) -> tuple[int, int]:
    """Return a place in a frame and the number there; without one, of the bytes to spare."""
    if place is None:
        place = len(data) - len(_SPARE)
    return place, int.from_bytes(data[place : place + size], "big")
