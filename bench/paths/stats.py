# SPDX-License-Identifier: Apache-2.0
"""The kernel's own statistics of programs: how often they ran, and for how long."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench.lab import BenchError
from vgw import libbpf
from vgw.libbpf import ProgType
from vgw.libbpf.library import check

_RUN_TIME: Final = 0  # BPF_STATS_RUN_TIME
#: `mov r0, 0; exit`
_NOTHING: Final = bytes.fromhex("b700000000000000 9500000000000000")


class RunTime(NamedTuple):
    """What the kernel counted of a program while statistics were on."""

    ns: int
    runs: int

    def since(self, before: RunTime) -> RunTime:
        """Return what came to it."""
        return RunTime(self.ns - before.ns, self.runs - before.runs)


@contextmanager
def run_times_on() -> Iterator[None]:
    """Have the kernel measure every run of a program for a block, and no longer.

    That takes each run 20 to 30 ns. Raises KernelError.
    """
    call = libbpf.library().bpf_enable_stats
    call.argtypes, call.restype = (ctypes.c_int,), ctypes.c_int
    fd = check(call(_RUN_TIME), "measure the run times of programs")
    try:
        yield
    finally:
        os.close(fd)


def run_time(program: int) -> RunTime:
    """Return what the kernel has counted of a program, by its fd."""
    lines = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return RunTime(int(found["run_time_ns"]), int(found["run_cnt"]))


def require_off() -> None:
    """Raise BenchError where somebody has these statistics on: they would be in all figures."""
    program = libbpf.prog_load(ProgType.SCHED_CLS, "vgw_nothing", _NOTHING)
    try:
        libbpf.prog_test_run(program, bytes(64))
        if run_time(program).runs:
            raise BenchError(
                "the kernel measures run times of programs, which is in every figure: run "
                "`sysctl kernel.bpf_stats_enabled=0`, and end what else asks for them"
            )
    finally:
        os.close(program)
