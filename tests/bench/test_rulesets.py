# SPDX-License-Identifier: Apache-2.0
"""The generated rule sets are repeatable and as large in every field as real ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.headers import TRACES, Header, headers
from bench.rulesets import SHAPES, SIZES, counts, generate
from tests.bench.judge import matches, opening
from vgw.abi import Action
from vgw.policy.evaluate import _first_match
from vgw.policy.model import ANYWHERE, Direction, EffectiveRule, Tier

EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_VERSION = pytest.mark.parametrize("version", [4, 6])

#: Size -> how many different sources, destinations and services ClassBench's sets have.
REAL_COUNTS = {
    1_000: ((70, 780), (170, 470), (25, 130)),
    10_000: ((870, 5_800), (700, 8_900), (10, 1_000)),
    50_000: ((18_000, 50_000), (34_000, 48_000), (200, 400)),
}
DIGEST = """
import hashlib
from bench.headers import headers
from bench.rulesets import generate
rules = generate(300, "ipc", 6)
print(hashlib.sha256(repr((rules, headers("random", rules, 6, 50))).encode()).hexdigest())
"""


def test_the_same_on_every_run() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert generate(100, "acl", seed=1) != generate(100, "acl", seed=2)


@EVERY_SHAPE
@EVERY_VERSION
@pytest.mark.parametrize("one_site", [False, True])
@pytest.mark.parametrize("size", [1_000, 10_000])
def test_counts_are_real(size: int, shape: str, version: int, one_site: bool) -> None:
    check_counts(size, generate(size, shape, version, one_site=one_site))


@EVERY_SHAPE
def test_counts_of_the_largest_are_real(shape: str) -> None:
    check_counts(50_000, generate(50_000, shape, 4))


def test_counts_of_the_largest_are_real_inside_one_site() -> None:
    check_counts(50_000, generate(50_000, "acl", 4, one_site=True))


def check_counts(size: int, rules: tuple[EffectiveRule, ...]) -> None:
    found = counts(rules)
    for number, (low, high) in zip(
        (found.sources, found.destinations, found.services), REAL_COUNTS[size], strict=True
    ):
        assert low <= number <= high, found


@EVERY_SHAPE
@EVERY_VERSION
@pytest.mark.parametrize("size", [*SIZES[:3], 64, 1_792])
def test_rules_are_what_they_are_said_to_be(size: int, shape: str, version: int) -> None:
    rules = generate(size, shape, version)
    assert len(rules) == size
    assert len({rule.key for rule in rules}) == size
    assert len({(r.peers, r.local, r.services, r.source_ports) for r in rules}) == size
    for rule in rules:
        assert rule.direction is Direction.INGRESS
        assert rule.tier is Tier.GROUP
        assert rule.action in {Action.ACCEPT, Action.DROP}
        assert not rule.peers == rule.local == ANYWHERE
        for networks in (rule.peers, rule.local):
            assert networks == ANYWHERE or [network.version for network in networks] == [version]


@EVERY_VERSION
def test_prefixes_nest(version: int) -> None:
    sources = {rule.peers[0] for rule in generate(1_000, "acl", version) if len(rule.peers) == 1}
    lengths = {network.prefixlen for network in sources}
    assert len(lengths) >= 6
    parents = {
        network.supernet(new_prefix=n)
        for network in sources
        for n in lengths
        if n < network.prefixlen
    }
    assert len(parents & sources) >= 50


def test_a_site_is_one_network() -> None:
    for version, length in ((4, 16), (6, 48)):
        rules = generate(1_000, "fw", version, one_site=True)
        networks = {r.peers[0] for r in rules} | {r.local[0] for r in rules}
        assert len({n.supernet(new_prefix=length) for n in networks if n.prefixlen}) == 1


def test_fw_has_more_wildcards_and_ranges_than_acl() -> None:
    def share(shape: str) -> tuple[int, int]:
        rules = generate(1_000, shape)
        services = {rule.services[0] for rule in rules}
        ranges = [s for s in services if s.ports is not None and s.ports[0] != s.ports[1]]
        return sum(rule.peers == ANYWHERE for rule in rules), len(ranges)

    assert share("fw")[0] > 5 * share("acl")[0]
    assert share("fw")[1] > 2 * share("acl")[1]


@EVERY_SHAPE
@EVERY_VERSION
def test_traces_hit_what_they_are_to_hit(shape: str, version: int) -> None:
    rules = generate(1_000, shape, version)
    share = {}
    for trace in TRACES:
        found = headers(trace, rules, version, 200)
        assert len(found) == 200
        hits = [_first_match(rules, opening(header)) for header in found]
        share[trace] = sum(hit is not None for hit in hits) / len(hits)
    assert share["shuffled"] == share["hot"] == 1
    assert share["random"] < 0.6


def test_random_headers_are_inside_some_rule_by_each_field() -> None:
    rules = generate(100, "acl")
    for header in headers("random", rules, 4, 50):
        assert any(matches(rule, header, "peers") for rule in rules)
        assert any(matches(rule, header, "local") for rule in rules)


def test_hot_headers_are_few_flows() -> None:
    found = headers("hot", generate(100, "acl"), 4, 64)
    assert len(set(found)) <= 16
    assert found[:16] == found[16:32]
    assert isinstance(found[0], Header)
