# SPDX-License-Identifier: Apache-2.0
"""A run of the fuzzer: a process for each CPU, what they count and find, and when to stop."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.fuzz.compare import Counts, Rig, pinned
from tests.fuzz.hunt import Finding, Hunt, describe
from tests.fuzz.sequences import Sequences
from tests.fuzz.work_memory import WorkMemory, read_layout
from vgw import loader
from vgw.policy.model import Hook

#: Processes share nothing with the one that starts them.
_CONTEXT: Final = multiprocessing.get_context("spawn")
_REPORT_SECONDS: Final = 1.0
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to do. A run ends with the first budget that is used up; None is no such budget.

    `least` is how many packets are tried however long that takes on a busy machine.
    """

    seed: int
    seconds: float | None = None
    packets: int | None = None
    least: int = 0
    jobs: int = 1
    hooks: tuple[Hook, ...] = (Hook.XDP, Hook.TC)
    findings: int = 1
    sequence: int | None = None


@dataclass(slots=True)
class Result:
    """What a run counted and found.

    `seconds` is from the first packet to the last, `cpu_seconds` what all workers worked.
    """

    settings: Settings
    counts: Counts = field(default_factory=Counts)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker is told."""

    settings: Settings
    programs: bytes
    memory: WorkMemory
    worker: int
    cpu: int


@dataclass(frozen=True, slots=True)
class _Report:
    """What a worker says now and then, and at its end."""

    worker: int
    counts: Counts
    seconds: float
    cpu_seconds: float
    finding: Finding | None = None
    is_last: bool = False


class WorkerDiedError(Exception):
    """A process ended without a last report; it has written why to stderr."""


def run(
    settings: Settings, artefact: loader.Artefact, say: Callable[[Result], None] | None = None
) -> Result:
    """Run the fuzzer and return what came of it; `say` is given the result so far each second."""
    reports = _CONTEXT.Queue()
    stop = _CONTEXT.Event()
    cpus = sorted(os.sched_getaffinity(0))
    memory, programs = read_layout(), artefact.encode()
    jobs = [
        _Job(settings, programs, memory, number, cpus[number % len(cpus)])
        for number in range(settings.jobs)
    ]
    processes = [
        _CONTEXT.Process(target=_work, args=(job, reports, stop), daemon=True) for job in jobs
    ]
    for process in processes:
        process.start()
    try:
        return _gather(settings, processes, reports, stop, say)
    finally:
        stop.set()
        for process in processes:
            process.join(_PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()


def _gather(
    settings: Settings,
    processes: Sequence[Any],
    reports: Any,
    stop: Any,
    say: Callable[[Result], None] | None,
) -> Result:
    latest: dict[int, _Report] = {}
    findings: dict[str, Finding] = {}
    running = set(range(len(processes)))
    while running:
        for number in running:
            if processes[number].exitcode not in {None, 0}:
                raise WorkerDiedError(f"worker {number} ended; what it wrote last says why")
        try:
            report: _Report = reports.get(timeout=_REPORT_SECONDS)
        except queue.Empty:
            continue
        latest[report.worker] = report
        if report.is_last:
            running.discard(report.worker)
        if report.finding is not None:
            findings.setdefault(report.finding.kind, report.finding)
            if len(findings) >= settings.findings:
                stop.set()
        if say is not None:
            say(_merged(settings, latest, findings))
    return _merged(settings, latest, findings)


def _merged(settings: Settings, latest: dict[int, _Report], findings: dict[str, Finding]) -> Result:
    result = Result(settings, findings=list(findings.values()))
    for report in latest.values():
        result.counts.add(report.counts)
        result.seconds = max(result.seconds, report.seconds)
        result.cpu_seconds += report.cpu_seconds
    return result


def _work(job: _Job, reports: Any, stop: Any) -> None:
    """Be one process of a run."""
    settings = job.settings
    with pinned(job.cpu):
        artefact = loader.Artefact.decode(job.programs)
        rig = Rig(artefact, job.memory, settings.hooks)
        rig.prepare()
        budget = _Budget(settings, rig.counts, stop)

        def report(finding: Finding | None = None, *, is_last: bool = False) -> None:
            times = budget.seconds, budget.cpu_seconds
            reports.put(_Report(job.worker, rig.counts, *times, finding, is_last))

        numbers: Iterable[int] = itertools.count(job.worker, settings.jobs)
        if settings.sequence is not None:
            numbers = (settings.sequence,)
        hunt = Hunt(rig, Sequences(settings.seed), numbers)
        budget.begin(report)
        while (found := hunt.next(budget.is_over)) is not None:
            report(describe(found, artefact, settings.hooks))
        report(is_last=True)
        rig.close()


class _Budget:
    """When a worker has done its share; reports each second on the way."""

    def __init__(self, settings: Settings, counts: Counts, stop: Any) -> None:
        self._settings, self._counts, self._stop = settings, counts, stop
        share = settings.packets
        self._packets = None if share is None else -(-share // settings.jobs)
        self._least = -(-settings.least // settings.jobs)
        self._start = self._next = self._cpu_start = 0.0
        self._report: Callable[[], None] = lambda: None

    def begin(self, report: Callable[[], None]) -> None:
        """Let the time run."""
        self._start, self._cpu_start = time.monotonic(), time.process_time()
        self._next = self._start + _REPORT_SECONDS
        self._report = report

    @property
    def seconds(self) -> float:
        """How long the worker has been at it."""
        return time.monotonic() - self._start

    @property
    def cpu_seconds(self) -> float:
        """How long of that it had a CPU."""
        return time.process_time() - self._cpu_start

    def is_over(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_SECONDS
            self._report()
        if self._packets is not None and self._counts.packets >= self._packets:
            return True
        if self._stop.is_set():
            return True
        limit = self._settings.seconds
        is_late = limit is not None and now - self._start >= limit
        return is_late and self._counts.packets >= self._least
