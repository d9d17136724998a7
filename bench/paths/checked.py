# SPDX-License-Identifier: Apache-2.0
"""Samples that are what their name says: an endpoint's counters say how its packets were judged."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from bench.endpoints import PROGRAMS, Endpoint
from bench.lab import BenchError
from bench.paths import packets
from bench.paths.vary import Frame, Sample, Varier, compile_entries
from vgw import abi
from vgw.abi import FlowState, Reason, Verdict
from vgw.libbpf import ProgType
from vgw.policy.model import Interface, Tracking

#: The most flows that an endpoint may have.
CONNTRACK_MAX: Final = 131_072
_FOREVER_NS: Final = 3600 * 10**9
_TYPES: Final = {name: ProgType.XDP if name.startswith("xdp") else ProgType.SCHED_CLS
                 for name in PROGRAMS}  # fmt: skip
#: The first packets of a connection after which it is open, by protocol: flags, whether the
#: opener sends it.
_OPENING: Final = {
    "tcp": (("S", True), ("SA", False), ("A", True)),
    "udp": (("", True), ("", False)),
}


class Judgement(NamedTuple):
    """What packets have to get."""

    verdict: Verdict
    reason: Reason


ESTABLISHED: Final = Judgement(Verdict.ACCEPT, Reason.CT_ESTABLISHED)
BY_RULE: Final = Judgement(Verdict.ACCEPT, Reason.RULE)


def interface(version: int, *, brief: bool = False) -> Interface:
    """Return an interface whose table holds as much as it may, and flows for as long as it takes.

    With `brief` TCP connections that nobody answers are over with the next tick of the clock.
    """
    timeouts = {state: _FOREVER_NS for state in FlowState if state is not FlowState.DEAD}
    if brief:
        timeouts[FlowState.TCP_SYN] = 1
    return Interface(
        "bench",
        packets.MAC,
        (packets.ADDRESSES[version],),
        conntrack_max=CONNTRACK_MAX,
        tracking=Tracking(tuple(timeouts.items()), half_open_max=CONNTRACK_MAX),
    )


class Trial(NamedTuple):
    """A program of an endpoint, a frame to run it on, and what each run has to come to."""

    endpoint: Endpoint
    program: str
    frame: Frame
    wanted: Judgement


@dataclass(frozen=True, slots=True)
class Checked:
    """What runs programs of endpoints, and looks after each run how packets were judged."""

    variers: Mapping[ProgType, Varier]

    @classmethod
    def load(cls, directory: Path, stack: ExitStack) -> Checked:
        """Compile and load what it takes, until `stack` ends. Raises VgwError."""
        entries = compile_entries(directory)
        return cls({kind: Varier(entries, kind, stack) for kind in set(_TYPES.values())})

    def run(self, trial: Trial, runs: int) -> None:
        """Run a program on as many different frames; raises BenchError if one is judged else."""
        self._checked(trial, runs, runs, measured=False)

    def sample(self, trial: Trial, values: int, runs: int) -> Sample:
        """Measure a program on `values` frames in turn, warmed up by half as many runs before.

        Raises BenchError where a packet was judged otherwise, or was an event.
        """
        self._checked(trial, values, runs // 2, measured=False)
        return self._checked(trial, values, runs, measured=True)

    def open(self, endpoint: Endpoint, version: int, protocol: str, flows: int) -> None:
        """Open connections from the VM. Raises BenchError when they are not all open then."""
        before = endpoint.maps.meta().entries
        for number, (flags, forward) in enumerate(_OPENING[protocol]):
            path = abi.Path.FROM_VM if forward else abi.Path.TO_VM
            program = "tc_from_vm" if forward else "tc_to_vm"
            frame = packets.packet(path, version, protocol, abi.Path.FROM_VM, flags)
            wanted = ESTABLISHED if number else BY_RULE
            self.run(Trial(endpoint, program, frame, wanted), flows)
        opened = endpoint.maps.meta().entries - before
        if opened != flows:
            raise BenchError(f"{opened} of {flows} connections came about")

    def _checked(self, trial: Trial, values: int, runs: int, *, measured: bool) -> Sample:
        endpoint, program, frame, wanted = trial
        varier = self.variers[_TYPES[program]]
        varier.choose([endpoint.programs[program]])
        before = endpoint.maps.stats()
        if measured:
            sample = varier.sample(frame, values, runs)
        else:
            sample = Sample(float(varier.run(frame, values, runs)), 0.0)
        found = {
            (path.name, verdict.name, reason.name): counter.packets
            - (before[path, verdict, reason].packets if (path, verdict, reason) in before else 0)
            for (path, verdict, reason), counter in endpoint.maps.stats().items()
        }
        found = {key: packets for key, packets in found.items() if packets}
        expected = (PROGRAMS[program].name, wanted.verdict.name, wanted.reason.name)
        if found != {expected: runs}:
            raise BenchError(f"{program}: {runs} packets were to be {expected}, but were {found}")
        meter = endpoint.maps.event_meter()
        if meter.sent or meter.lost:
            raise BenchError(f"{program}: events were sent, which are no part of the figure")
        return sample
