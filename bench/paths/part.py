# SPDX-License-Identifier: Apache-2.0
"""The part `paths`: ns of a packet by program and by what becomes of it, and of runs under load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.endpoints import PROGRAMS, Endpoint, compile_endpoint, make_endpoint
from bench.options import Options, Progress
from bench.paths import run_time
from bench.paths.cases import NEW_VALUES, Case, Table, cases, check_opened
from bench.paths.checked import Checked, Trial, interface
from bench.paths.policy import policy
from bench.paths.stats import require_off
from bench.paths.vary import Sample
from bench.report import Row

PART: Final = "paths"
_RULES: Final = (10, 10_000)
_QUICK_RULES: Final = (10, 100)
_RUNS: Final = 1 << 17
_FLOWS: Final = 1 << 16
_QUICK_RUNS, _QUICK_FLOWS = 1 << 12, 1 << 11
#: Unit -> the figure of a sample.
_FIGURES: Final = {"ns net": lambda one: one.net, "ns total": lambda one: one.total}


@dataclass(frozen=True, slots=True)
class _Series:
    """A case for one program under one set of rules, and its samples so far."""

    case: Case
    program: str
    rules: int
    endpoint: Endpoint
    samples: list[Sample] = field(default_factory=list)


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure all cases in rounds, then the run times under load."""
    require_off()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checked = Checked.load(directory, stack)
        series = list(_series(options, progress, checked, directory, stack))
        for number in range(options.rounds):
            for one in series:
                progress(
                    f"round {number + 1} of {options.rounds}: {one.case.what}, {one.program}, "
                    f"{one.rules} rules"
                )
                _sample(checked, one, quick=options.quick)
    rows = [_row(unit, one, quick=options.quick) for unit in _FIGURES for one in series]
    return rows + run_time.run(options, progress)


def _series(
    options: Options, progress: Progress, checked: Checked, directory: Path, stack: ExitStack
) -> Iterator[_Series]:
    artefact = compile_endpoint(directory, tuple(PROGRAMS))
    for size in options.rules or (_QUICK_RULES if options.quick else _RULES):
        tables: dict[Table, Endpoint] = {}
        for case in cases():
            table = case.table
            if table not in tables:
                progress(f"opening connections under {size} rules")
                effective = policy(table.version, size, options.shape)
                wanted = interface(table.version, brief=table.brief)
                endpoint = make_endpoint(artefact, tuple(PROGRAMS), effective, wanted, stack)
                flows = int(_flows(quick=options.quick) * table.share)
                if flows:
                    checked.open(endpoint, table.version, table.protocol, flows)
                tables[table] = endpoint
            for program in PROGRAMS:
                yield _Series(case, program, size, tables[table])


def _sample(checked: Checked, one: _Series, *, quick: bool) -> None:
    case, path = one.case, PROGRAMS[one.program]
    wanted = case.wanted(path)
    if case.first is not None:
        checked.run(Trial(one.endpoint, one.program, case.first(path), wanted), 1)
    runs = _QUICK_RUNS if quick else _RUNS
    values = NEW_VALUES if case.opens else _flows(quick=quick) if case.varies else 1
    before = sum(one.endpoint.maps.meta().created)
    trial = Trial(one.endpoint, one.program, case.frame(path), wanted)
    one.samples.append(checked.sample(trial, values, runs))
    opened = sum(one.endpoint.maps.meta().created) - before
    check_opened(case, opened, runs + runs // 2)


def _flows(*, quick: bool) -> int:
    return _QUICK_FLOWS if quick else _FLOWS


def _row(unit: str, one: _Series, *, quick: bool) -> Row:
    case = one.case
    flows = _flows(quick=quick)
    facts: Mapping[str, str | int] = {
        "program": one.program,
        "ip": case.table.version,
        "flows": (flows if case.table.share else 0) if case.opens else flows if case.varies else 1,
        "rules": one.rules,
    }
    samples = tuple(map(_FIGURES[unit], one.samples))
    return Row(
        PART, case.what, unit, samples, facts, note=case.wanted(PROGRAMS[one.program]).reason.name
    )
