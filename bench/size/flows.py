# SPDX-License-Identifier: Apache-2.0
"""What a packet costs and how much memory a VM takes by how many open connections it has.

Packets are of all connections in turn, so what the lookup reads comes from the cache that the
table fits into, or from memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from bench.endpoints import PROGRAMS, Endpoint, make_endpoint
from bench.options import Options, Progress
from bench.paths import packets
from bench.paths.checked import CONNTRACK_MAX, ESTABLISHED, Checked, Trial, interface
from bench.paths.policy import policy
from bench.report import Row
from bench.size.figures import FLOWS, KIB, NS, row
from vgw import loader
from vgw.abi import Path

#: How many connections are asked for; a VM has CONNTRACK_MAX at most.
_WANTED: Final = (1_000, 10_000, 100_000, 1_000_000)
_QUICK_WANTED: Final = (100, 1_000)
_RUNS: Final = 1 << 17
_QUICK_RUNS: Final = 1 << 12
_RULES: Final = 10


def measure_flows(
    options: Options, progress: Progress, checked: Checked, artefact: loader.Artefact
) -> list[Row]:
    """Return ns of a packet of each program and the memory of the tables. Raises VgwError."""
    rows: list[Row] = []
    for wanted in _QUICK_WANTED if options.quick else _WANTED:
        flows = min(wanted, CONNTRACK_MAX)
        note = "" if flows == wanted else f"the most that a VM can have; {wanted} are more"
        progress(f"{flows} flows")
        with ExitStack() as stack:
            effective = policy(4, _RULES, options.shape)
            programs = tuple(PROGRAMS)
            endpoint = make_endpoint(artefact, programs, effective, interface(4), stack)
            checked.open(endpoint, 4, "udp", flows)
            for program in programs:
                samples = _samples(options, checked, endpoint, program, flows)
                rows.append(row("established packet", NS, FLOWS, flows, samples, program, note))
            memory = endpoint.maps.memory() / 1024
            rows.append(row("maps of a VM", KIB, FLOWS, flows, (memory,), note=note))
    return rows


def _samples(
    options: Options, checked: Checked, endpoint: Endpoint, program: str, flows: int
) -> list[float]:
    frame = packets.packet(PROGRAMS[program], 4, "udp", Path.FROM_VM)
    runs = _QUICK_RUNS if options.quick else _RUNS
    trial = Trial(endpoint, program, frame, ESTABLISHED)
    return [checked.sample(trial, flows, runs).net for _ in range(options.rounds)]
