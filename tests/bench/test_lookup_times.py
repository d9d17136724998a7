# SPDX-License-Identifier: Apache-2.0
"""Times of lookups are of the lookups that they say, and the worst cases are as bad as they say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from bench import lookup
from bench.headers import TRACES, Header, headers
from bench.hostile import FEWEST, hostile_headers, hostile_rules
from bench.image_reader import ImageReader
from bench.lookup_times import PART, WORST, effort_of
from bench.policy_probe import PolicyProbe
from bench.queries import queries
from bench.rulesets import SHAPES, generate
from tests.bench.judge import opening
from vgw import abi, loader
from vgw.abi import Action, Reason, Verdict
from vgw.policy.compile import MAX_RULES, compile_policy
from vgw.policy.evaluate import _first_match
from vgw.policy.model import TIERS, EffectivePolicy, EffectiveRule

pytestmark = pytest.mark.bpf

EVERY_VERSION = pytest.mark.parametrize("version", [4, 6])
#: Blocks of 1,024 rules that MAX_RULES rules fill when each of four tiers has an unfilled one.
MOST_BLOCKS = 52
BITS = 5


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyProbe]:
    cache = tmp_path_factory.mktemp("cache")
    artefact = loader.load_artefact(cache, programs=["policy_probe"])
    with PolicyProbe(artefact, 4096) as made:
        yield made


def image_of(rules: tuple[EffectiveRule, ...]) -> bytes:
    return compile_policy(EffectivePolicy("vm", rules))[abi.Path.TO_VM].data


def assert_agreement(
    probe: PolicyProbe, rules: tuple[EffectiveRule, ...], sample: Sequence[Header]
) -> int:
    """Check that the kernel decides as the evaluator does; return how many rules decided."""
    probe.set_image(abi.Path.TO_VM, image_of(rules))
    number_of = {id(rule): number for number, rule in enumerate(rules)}
    hits = 0
    for header, answer in zip(sample, probe.ask(queries(sample)), strict=True):
        rule = _first_match(rules, opening(header))
        number = abi.NO_RULE if rule is None else number_of[id(rule)]
        accepts = rule is not None and rule.action is Action.ACCEPT
        assert answer["rule"] == number, header
        assert answer["verdict"] == (Verdict.ACCEPT if accepts else Verdict.DROP), header
        assert answer["reason"] == (Reason.DEFAULT if rule is None else Reason.RULE), header
        hits += rule is not None
    return hits


@EVERY_VERSION
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_are_judged_as_their_headers(
    probe: PolicyProbe, shape: str, trace: str, version: int
) -> None:
    for size in (10, 1_000):
        rules = generate(size, shape, version)
        hits = assert_agreement(probe, rules, headers(trace, rules, version, 150))
        assert hits == 150 or trace == "random"


@EVERY_VERSION
@pytest.mark.parametrize("matching", [False, True])
def test_hostile_headers_are_judged_as_any(
    probe: PolicyProbe, version: int, matching: bool
) -> None:
    rules = hostile_rules(FEWEST, version, BITS, matching=matching)
    hits = assert_agreement(probe, rules, hostile_headers(version, BITS, 20))
    assert hits == (20 if matching else 0)


@EVERY_VERSION
@pytest.mark.parametrize("bits", [BITS, 11])
@pytest.mark.parametrize("matching", [False, True])
def test_catalogue_L8_the_worst_case_looks_into_every_block(
    version: int, bits: int, matching: bool
) -> None:
    rules = hostile_rules(MAX_RULES, version, bits, matching=matching)
    assert len(rules) == MAX_RULES
    assert [rule.tier for rule in rules] == sorted((r.tier for r in rules), key=TIERS.index)
    reader = ImageReader(image_of(rules))
    assert reader.used == (1 << MOST_BLOCKS) - 1
    for header in hostile_headers(version, bits, 10):
        effort = effort_of(reader, header)
        assert effort.blocks == effort.dense == MOST_BLOCKS
        assert effort.matches == (MOST_BLOCKS if matching else 0)


@EVERY_VERSION
def test_catalogue_L8_few_values_have_the_longest_searches(version: int) -> None:
    reader = ImageReader(image_of(hostile_rules(FEWEST, version, BITS, matching=False)))
    efforts = [effort_of(reader, header) for header in hostile_headers(version, BITS, 64)]
    longest = max((effort.lines for effort in efforts), key=sum)
    assert longest == ((3, 3, 2, 2) if version == 4 else (8, 8, 2, 2))


@EVERY_VERSION
def test_catalogue_L8_an_ordinary_header_looks_into_few_blocks(version: int) -> None:
    """Negative control: the same count of other headers and of other rules is small."""
    rules = generate(10_000, "acl", version)
    reader = ImageReader(image_of(rules))
    efforts = [effort_of(reader, header) for header in headers("shuffled", rules, version, 50)]
    assert reader.used.bit_count() == 10
    assert max(effort.blocks for effort in efforts) <= 8
    assert all(effort.matches for effort in efforts)
    hostile = hostile_rules(FEWEST, version, BITS, matching=True)
    stranger = hostile_headers(version, BITS, 1)[0]._replace(remote=1)
    assert effort_of(ImageReader(image_of(hostile)), stranger).blocks == 0


def test_every_figure_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup.main(["--only", PART, "--quick", "--rules", "10,70", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    sets = [
        (size, version, where)
        for size in (10, 70)
        for version in (4, 6)
        for where in ("many sites", "one /16" if version == 4 else "one /48")
    ]
    found = [(row["what"], row.get("rules"), row.get("ip"), row.get("addresses"), row.get("trace"))
             for row in rows]  # fmt: skip
    builds = ("build: compile", "build: into maps", "build: image")
    assert sorted(map(str, found)) == sorted(
        map(
            str,
            [
                ("empty program", None, None, None, None),
                *(("lookup", *one, trace) for one in sets for trace in TRACES),
                *((build, *one, None) for one in sets for build in builds),
                *(
                    (what, FEWEST, version, None, trace)
                    for what in WORST
                    for version in (4, 6)
                    for trace in ("one header", "4096 headers")
                ),
            ],
        )
    )
    for row in rows:
        assert row["samples"], row
        assert ("9 blocks, 9 compared" in row["note"]) is row["what"].startswith("worst"), row
