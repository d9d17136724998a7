# SPDX-License-Identifier: Apache-2.0
"""All systems under all kinds of traffic, in turn, round after round within one run.

A system is put in force once a round for each VM and size of rule set, and all kinds of traffic
are sampled then; so what is divided by `nothing` was taken within the same round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.cost.load import Load
from bench.cost.measures import Measure, Place, measures
from bench.cost.rules import DROPPED_PORT
from bench.cost.systems import NOTHING, SYSTEMS, Setting, System
from bench.cost.vms import VMS, Vm
from bench.lab import BenchError, Lab, lab
from bench.native import build
from bench.options import Options, Progress
from bench.report import Row, ratio
from bench.traffic import burst, server

_RULES: Final = (10, 1_000, 10_000)
_QUICK_RULES: Final = (10, 100)
#: Of other systems than vgw only these sizes are measured, to end in time.
_OTHERS_RULES: Final = (10, 10_000)
_CONTROL_SECONDS: Final = 0.2


@dataclass(slots=True)
class _Series:
    """One system for one VM with one size of rule set, and its samples by measure and unit."""

    system: System
    vm: Vm
    size: int
    note: str = ""
    samples: dict[tuple[int, str], list[float]] = field(default_factory=dict)


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure everything in rounds and return a row for each figure."""
    kinds = list(measures(options.version))
    with lab(options.vgw, guest=True) as built:
        load = Load(built, build("load", built.directory))
        series = list(_series(options))
        for number in range(options.rounds):
            for one in series:
                progress(
                    f"round {number + 1} of {options.rounds}: {one.vm.device}, {one.system.name}, "
                    f"{one.size} rules"
                )
                _sample(built, load, one, kinds, options, control=number == 0)
    return [row for index, kind in enumerate(kinds) for row in _rows(series, index, kind)]


def _series(options: Options) -> Iterator[_Series]:
    sizes = options.rules or (_QUICK_RULES if options.quick else _RULES)
    for vm in VMS.values():
        for system in SYSTEMS:
            if not system.has_rules:
                yield _Series(system, vm, 0)
                continue
            for size in sizes:
                if system.name == "vgw" or size in (*_OTHERS_RULES, *_QUICK_RULES):
                    yield _Series(system, vm, size)


def _sample(  # noqa: PLR0913 - what a sample is made of
    built: Lab,
    load: Load,
    one: _Series,
    kinds: Sequence[Measure],
    options: Options,
    *,
    control: bool,
) -> None:
    """Take one sample of each kind."""
    at = Place(built, load, one.vm, options.seconds)
    setting = Setting(built, one.vm, options.version, one.size, options.shape)
    with one.system.in_force(setting) as note:
        one.note = note
        if control:
            _check_control(at, one, options.version)
        for index, kind in enumerate(kinds):
            try:
                figures = kind.sample(at)
            except BenchError as error:
                raise BenchError(
                    f"{one.system.name}, {one.vm.device}, {one.size} rules, {kind.part}: {error}"
                ) from error
            for unit, figure in figures.items():
                one.samples.setdefault((index, unit), []).append(figure)


def _check_control(at: Place, one: _Series, version: int) -> None:
    """Check that the port that is to be dropped is dropped, and only by a firewall."""
    with server(at.lab, version, at.vm.node, first_port=DROPPED_PORT, ports=1):
        found = burst(
            at.lab,
            version,
            _CONTROL_SECONDS,
            vm=at.vm.node,
            first_port=DROPPED_PORT,
            ports=1,
            limit=4,
        )
    if bool(found.completed) is one.system.filters:
        raise BenchError(
            f"{one.system.name}: {found.completed} connections to a port that the rules drop, so "
            "the measurement is void"
        )


def _rows(series: Sequence[_Series], index: int, kind: Measure) -> Iterator[Row]:
    """Yield the figures of one kind of traffic, beside each how it compares with nothing."""
    units = [unit for number, unit in series[0].samples if number == index]
    for unit in units:
        base: dict[str, tuple[float, ...]] = {}
        for one in series:
            samples = tuple(one.samples[index, unit])
            if one.system.name == NOTHING:
                base[one.vm.device] = samples
            quotient = ratio(samples, base[one.vm.device])
            yield Row(
                kind.part,
                one.system.name,
                unit,
                samples,
                {
                    "device": one.vm.device,
                    "ip": kind.version,
                    **kind.facts,
                    **({"rules": one.size} if one.size else {}),
                },
                {} if quotient is None else {"nothing": quotient},
                one.note,
            )
