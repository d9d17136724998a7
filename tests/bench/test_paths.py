# SPDX-License-Identifier: Apache-2.0
"""Packets of the part `paths` are judged as their rows say, and what is judged else is no row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bench.endpoints import PROGRAMS, Endpoint, compile_endpoint, make_endpoint
from bench.lab import BenchError
from bench.paths import packets
from bench.paths.cases import NEW_VALUES, cases, check_opened
from bench.paths.checked import BY_RULE, ESTABLISHED, Checked, Judgement, Trial, interface
from bench.paths.policy import policy
from bench.paths.stats import require_off, run_time, run_times_on
from vgw import abi, libbpf
from vgw.abi import Reason, Verdict
from vgw.libbpf import ProgType

pytestmark = pytest.mark.bpf

FLOWS = 300
RUNS = 900
#: `mov r0, 0; exit`
NOTHING = bytes.fromhex("b700000000000000 9500000000000000")


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def checked(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked.load(tmp_path_factory.mktemp("vary"), stack)


@pytest.fixture(scope="module")
def endpoint(stack: ExitStack, checked: Checked, program_cache: Path) -> Endpoint:
    """An endpoint with FLOWS open UDP connections."""
    artefact = compile_endpoint(program_cache, tuple(PROGRAMS), stages=False)
    wanted = interface(4, brief=True)
    made = make_endpoint(artefact, tuple(PROGRAMS), policy(4, 10, "acl"), wanted, stack)
    checked.open(made, 4, "udp", FLOWS)
    return made


def test_each_value_is_a_connection_of_its_own(checked: Checked, endpoint: Endpoint) -> None:
    frame = packets.packet(abi.Path.TO_VM, 4, "udp", abi.Path.FROM_VM)
    before = sum(flow.packets[abi.Path.TO_VM] for _, flow in endpoint.maps.flows())
    checked.sample(Trial(endpoint, "tc_to_vm", frame, ESTABLISHED), FLOWS, 2 * FLOWS)
    flows = [flow for _, flow in endpoint.maps.flows() if flow.state == abi.FlowState.UDP_REPLIED]
    assert len(flows) == FLOWS
    assert {flow.packets[abi.Path.TO_VM] for flow in flows} == {before // FLOWS + 3}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_new_connection_is_new_each_time(
    checked: Checked, endpoint: Endpoint, program: str
) -> None:
    frame = packets.packet(PROGRAMS[program], 4, "tcp", PROGRAMS[program], "S")
    before = sum(endpoint.maps.meta().created)
    checked.sample(Trial(endpoint, program, frame, BY_RULE), NEW_VALUES, RUNS)
    assert sum(endpoint.maps.meta().created) - before == RUNS + RUNS // 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_packets_that_are_judged_else_are_no_sample(
    checked: Checked, endpoint: Endpoint, program: str
) -> None:
    """Negative control: the name of a row is what the endpoint's counters say, or it fails."""
    path = PROGRAMS[program]
    frame = packets.denied(4, path)
    denied = Judgement(Verdict.DROP, Reason.RULE)
    checked.sample(Trial(endpoint, program, frame, denied), FLOWS, RUNS)
    with pytest.raises(BenchError, match=r"DROP.*RULE"):
        checked.sample(Trial(endpoint, program, frame, ESTABLISHED), FLOWS, RUNS)
    short = replace(frame, data=frame.data[:40], word=None, half=None)
    with pytest.raises(BenchError, match="BAD_LENGTH"):
        checked.sample(Trial(endpoint, program, short, denied), 1, RUNS)


def test_a_place_outside_of_the_frame_is_no_sample(checked: Checked, endpoint: Endpoint) -> None:
    """Negative control: a frame that never comes to the program would cost next to nothing."""
    frame = replace(packets.denied(4, abi.Path.TO_VM), number=200)
    denied = Judgement(Verdict.DROP, Reason.RULE)
    with pytest.raises(BenchError, match=r"but were \{\}"):
        checked.run(Trial(endpoint, "tc_to_vm", frame, denied), FLOWS)


def test_connections_that_were_open_are_not_new() -> None:
    """Negative control for the row `new connection`."""
    case = next(case for case in cases() if case.opens)
    check_opened(case, RUNS, RUNS)
    with pytest.raises(BenchError, match="899 connections"):
        check_opened(case, RUNS - 1, RUNS)


def test_the_kernel_counts_runs_in_the_block_alone() -> None:
    require_off()
    program = libbpf.prog_load(ProgType.SCHED_CLS, "counted", NOTHING)
    with ExitStack() as stack:
        stack.callback(os.close, program)
        before = run_time(program)
        with run_times_on():
            libbpf.prog_test_run(program, bytes(64), repeat=RUNS)
            with pytest.raises(BenchError, match="bpf_stats_enabled"):
                require_off()
        libbpf.prog_test_run(program, bytes(64), repeat=RUNS)
        found = run_time(program).since(before)
    assert found.runs == RUNS
    assert found.ns > 0
    require_off()
