# SPDX-License-Identifier: Apache-2.0
"""How long rule lookup takes, what compiling costs, and what the worst rules and headers do to it.

The lookup runs alone in the kernel; what the program around it takes is measured beside it and
taken off. Rule sets of one size are looked up in turn, round after round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Final

from bench.headers import TRACES, Header, headers
from bench.hostile import FEWEST, hostile_headers, hostile_rules
from bench.image_reader import Effort, ImageReader
from bench.options import Options, Progress
from bench.policy_probe import PolicyProbe, Queries
from bench.queries import queries, service_of, source_of
from bench.report import Fact, Row
from bench.rulesets import SHAPES, SIZES, generate
from vgw import abi, loader
from vgw.maps_images import image_chunks
from vgw.policy.compile import MAX_RULES, compile_policy
from vgw.policy.model import EffectivePolicy, EffectiveRule

PART: Final = "lookup"
#: Different headers of a trace, a power of two. `hot` has as few as it has flows.
HEADERS: Final = 4096
_HOT: Final = 16
#: Lookups of one sample.
_LOOKUPS: Final = 1 << 15
_QUICK_LOOKUPS: Final = 1 << 12
_QUICK_SIZES: Final = SIZES[:3]
_VERSIONS: Final = (4, 6)
#: Name of a worst case -> whether its rules match.
WORST: Final = {"worst case, no match": False, "worst case, matches": True}
#: Headers of a worst case -> values that each of their fields has, as a power of two. Searches are
#: longest with few, and with many the tables that headers lead to are more than caches hold.
_WORST_BITS: Final = {1: 5, HEADERS: 11}
#: Headers among which the one with the longest searches is chosen.
_TRIED: Final = 64


@dataclass(slots=True)
class _Series:
    """One figure to measure: the queries of one trace, and the ns of each sample."""

    what: str
    facts: dict[str, Fact]
    probe: PolicyProbe
    queries: Queries
    note: str = ""
    net_ns: list[float] = field(default_factory=list)

    def row(self) -> Row:
        return Row(PART, self.what, "ns", tuple(self.net_ns), self.facts, note=self.note)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A rule set in the kernel, and what it took to get there."""

    probe: PolicyProbe
    image: bytes
    compile_s: float
    load_s: float

    def rows(self, facts: dict[str, Fact]) -> Iterator[Row]:
        """Yield what building it cost."""
        size = float(sum(len(chunk.data) for chunk in image_chunks(self.image)))
        yield Row(PART, "build: compile", "s", (self.compile_s,), facts)
        yield Row(PART, "build: into maps", "s", (self.load_s,), facts)
        yield Row(PART, "build: image", "bytes", (size,), facts)


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure lookups and builds for all sizes, then the worst cases."""
    sizes = options.rules or (_QUICK_SIZES if options.quick else SIZES)
    harness: list[float] = []
    lookups: list[Row] = []
    builds: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        artefact = loader.load_artefact(Path(cache), progress, programs=["policy_probe"])
        _import_numpy()
        for size in sizes:
            with ExitStack() as stack:
                series: list[_Series] = []
                for facts, rules in _rule_sets(size, options):
                    progress(f"building {', '.join(map(str, facts.values()))}")
                    loaded = _load(artefact, rules, stack)
                    builds += loaded.rows(facts)
                    series += _traces(loaded, facts, rules)
                harness += _measure(series, options, progress, f"{size} rules")
                lookups += [one.row() for one in series]
        with ExitStack() as stack:
            worst = list(_worst(artefact, options, stack))
            harness += _measure(worst, options, progress, "worst cases")
    empty = Row(PART, "empty program", "ns", tuple(harness))
    return [empty, *lookups, *builds, *(one.row() for one in worst)]


def _import_numpy() -> None:
    """Compile a few rules, so that no time of a rule set has the imports of the first one in it."""
    compile_policy(EffectivePolicy("vm", generate(100, "acl")))


def _rule_sets(
    size: int, options: Options
) -> Iterator[tuple[dict[str, Fact], tuple[EffectiveRule, ...]]]:
    """Yield the rule sets of one size with what tells them apart."""
    shapes = [options.shape] if options.quick else list(SHAPES)
    for shape, version in product(shapes, _VERSIONS):
        yield _facts(size, shape, version, "many sites"), generate(size, shape, version)
    for version in _VERSIONS:
        place = "one /16" if version == 4 else "one /48"
        rules = generate(size, options.shape, version, one_site=True)
        yield _facts(size, options.shape, version, place), rules


def _facts(size: int, shape: str, version: int, addresses: str) -> dict[str, Fact]:
    return {"rules": size, "shape": shape, "ip": version, "addresses": addresses}


def _load(artefact: loader.Artefact, rules: tuple[EffectiveRule, ...], stack: ExitStack) -> _Loaded:
    """Compile rules and put them into a probe of their own, which the stack closes."""
    policy = EffectivePolicy("vm", rules)
    probe = stack.enter_context(PolicyProbe(artefact, HEADERS))
    begin = time.perf_counter()
    image = compile_policy(policy)[abi.Path.TO_VM].data
    compiled = time.perf_counter()
    probe.set_image(abi.Path.TO_VM, image)
    return _Loaded(probe, image, compiled - begin, time.perf_counter() - compiled)


def _traces(
    loaded: _Loaded, facts: dict[str, Fact], rules: Sequence[EffectiveRule]
) -> Iterator[_Series]:
    version = int(facts["ip"])
    for trace in TRACES:
        count = _HOT if trace == "hot" else HEADERS
        made = queries(headers(trace, rules, version, count))
        yield _Series("lookup", {**facts, "trace": trace}, loaded.probe, made)


def _measure(
    series: Sequence[_Series], options: Options, progress: Progress, what: str
) -> list[float]:
    """Take a sample of all series in each round; return those of the empty program."""
    lookups = _QUICK_LOOKUPS if options.quick else _LOOKUPS
    harness: list[float] = []
    for number in range(options.rounds):
        progress(f"{what}: round {number + 1} of {options.rounds}")
        for one in series:
            times = one.probe.measure(one.queries, 1, lookups)
            one.net_ns += times.net_ns
            harness += times.harness_ns
    return harness


# --- the worst cases ------------------------------------------------------------------------------


def _worst(artefact: loader.Artefact, options: Options, stack: ExitStack) -> Iterator[_Series]:
    size = FEWEST if options.quick else MAX_RULES
    for (what, matching), (count, bits), version in product(
        WORST.items(), _WORST_BITS.items(), _VERSIONS
    ):
        rules = hostile_rules(size, version, bits, matching=matching)
        loaded = _load(artefact, rules, stack)
        made, effort = _longest(loaded.image, hostile_headers(version, bits, HEADERS), count)
        trace = "one header" if count == 1 else f"{count} headers"
        facts: dict[str, Fact] = {"rules": size, "ip": version, "trace": trace}
        yield _Series(what, facts, loaded.probe, queries(made), _describe(effort))


def effort_of(reader: ImageReader, header: Header) -> Effort:
    """Return what the lookup of a header costs in an image."""
    version, remote, local = header.version, header.remote, header.local
    return reader.effort(version, remote, local, service_of(header), source_of(header))


def _longest(image: bytes, choice: Sequence[Header], count: int) -> tuple[list[Header], Effort]:
    """Return so many headers and the effort of the first, whose searches are the longest found."""
    reader = ImageReader(image)
    efforts = [effort_of(reader, each) for each in choice[:_TRIED]]
    longest = max(range(_TRIED), key=lambda n: sum(efforts[n].lines))
    chosen = [choice[longest], *choice[:longest], *choice[longest + 1 :]]
    return chosen[:count], efforts[longest]


def _describe(effort: Effort) -> str:
    lines = "+".join(map(str, effort.lines))
    return (
        f"{effort.blocks} blocks, {effort.dense} compared in whole lines, {effort.matches} with a "
        f"match; searches of {lines} lines"
    )
