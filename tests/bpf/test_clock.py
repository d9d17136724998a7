# SPDX-License-Identifier: Apache-2.0
"""The clock of the packet programs is the one that user space reads as theirs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.cases.fixtures import ALL_ACCEPTED, GUARDED
from tests.frames import OUT, TCP, tcp
from tests.program_engine import ProgramEngine
from vgw import loader
from vgw.abi import Mode, Path, Reason, be16
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

#: What user space sees of the clock, and a tick of the slowest kernels.
UNIT_NS = 10_000_000
DAY_SECONDS = 86400


@pytest.fixture
def engine(artefact: loader.Artefact) -> Iterator[ProgramEngine]:
    made = ProgramEngine(
        artefact, Hook.TC, endpoint_facts(GUARDED, Mode.ENFORCE), ALL_ACCEPTED, 2048
    )
    yield made
    made.close()


def created_ns(engine: ProgramEngine, port: int) -> int:
    """Let a program open a flow, and return when that was."""
    assert engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port), TCP)).reason is Reason.DEFAULT
    (when,) = (flow.created_ns for key, flow in engine.maps.flows() if key.local_port == be16(port))
    return int(when)


def test_a_program_and_user_space_read_the_same_clock(engine: ProgramEngine) -> None:
    for port in range(1, 21):
        before = coarse_now_ns()
        program = created_ns(engine, port)
        after = coarse_now_ns()
        assert before <= program < after + UNIT_NS


def test_it_goes_as_fast_as_time_does() -> None:
    begun, begun_ns = time.monotonic_ns(), coarse_now_ns()
    while coarse_now_ns() - begun_ns < SECOND_NS // 4:
        pass
    passed = time.monotonic_ns() - begun
    assert abs(passed - (coarse_now_ns() - begun_ns)) <= 2 * UNIT_NS


@pytest.mark.parametrize("clock", ["coarse_now_ns()", "monotonic_ns()"])
def test_catalogue_M33_another_monotonic_clock_does_not_move_it(clock: str) -> None:
    """In a time namespace CLOCK_MONOTONIC is another one than that of the kernel's programs."""
    code = f"from vgw.controller.clock import *; from time import *; print({clock})"
    elsewhere = ["unshare", "--time", "--fork", "--monotonic", str(DAY_SECONDS)]
    shown = subprocess.run(
        [*elsewhere, sys.executable, "-P", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    here = coarse_now_ns() if clock.startswith("coarse") else time.monotonic_ns()
    moved = abs(int(shown.stdout) - here) > DAY_SECONDS * SECOND_NS // 2
    assert moved is (clock == "monotonic_ns()"), "the control: the namespace has another clock"
