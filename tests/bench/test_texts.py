# SPDX-License-Identifier: Apache-2.0
"""A rule set says the same as data, as a policy file and as nftables rules of both forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import nft
from bench.headers import headers
from bench.lab import VM_MAC
from bench.policy_text import Endpoint, policy_text
from bench.rulesets import SHAPES, generate
from tests.bench.judge import opening, verdict_of_nft, verdict_of_rules
from vgw.policy.evaluate import _first_match
from vgw.policy.model import EffectiveRule
from vgw.policy.parse import parse_sources
from vgw.policy.resolve import effective_policy

ENDPOINT = Endpoint("vm", "veth-vm", VM_MAC, ("10.20.0.11", "2001:db8:20::11"), 65536)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_VERSION = pytest.mark.parametrize("version", [4, 6])


def parsed(rules: tuple[EffectiveRule, ...]) -> tuple[EffectiveRule, ...]:
    document = parse_sources([("policy.yaml", policy_text(rules, ENDPOINT))])
    assert not document.warnings
    (interface,) = document.vms["vm"].interfaces
    assert interface.mac == VM_MAC
    return effective_policy(document, "vm").ingress


@EVERY_SHAPE
@EVERY_VERSION
@pytest.mark.parametrize("size", [10, 1_000])
def test_the_policy_file_means_the_rules(size: int, shape: str, version: int) -> None:
    rules = generate(size, shape, version)
    read = parsed(rules)
    assert tuple(replace(rule, file="", line=0) for rule in read) == rules
    for trace in ("random", "shuffled"):
        for header in headers(trace, rules, version, 100):
            wanted, found = (_first_match(one, opening(header)) for one in (rules, read))
            assert (found and found.key) == (wanted and wanted.key)


@EVERY_SHAPE
@EVERY_VERSION
@pytest.mark.parametrize("form", [nft.linear, nft.ordered_maps])
def test_nftables_gives_the_same_verdicts(form: nft.Form, shape: str, version: int) -> None:
    rules = generate(300, shape, version)
    text = form(rules, version, VM_MAC).text
    seen = set()
    for trace in ("random", "shuffled"):
        for header in headers(trace, rules, version, 60):
            wanted = verdict_of_rules(rules, header)
            assert verdict_of_nft(text, header) == wanted, header
            seen.add(wanted)
    assert seen == {True, False}


def test_without_their_order_rules_need_fewer_maps() -> None:
    rules = generate(1_000, "fw")
    assert 1 < nft.unordered_maps(rules, 4, VM_MAC).maps < nft.ordered_maps(rules, 4, VM_MAC).maps
