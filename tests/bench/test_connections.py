# SPDX-License-Identifier: Apache-2.0
"""The measurement of new connections runs, and measures what the rules say."""

from __future__ import annotations

import json
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from bench import lookup
from bench.connections import DROPPED_PORT, FIGURES, NFT_FORMS, late_rules
from bench.headers import Header
from bench.lab import CLIENT_ADDRESSES, PREFIX, VM_ADDRESSES, VM_MAC, lab
from bench.nft import unordered_maps
from bench.rulesets import SHAPES
from bench.traffic import FIRST_PORT, PORTS, burst, server
from tests.bench.judge import opening
from vgw.policy.evaluate import _first_match

EVERY_VERSION = pytest.mark.parametrize("version", [4, 6])


@EVERY_VERSION
@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_rule_accepts(shape: str, version: int) -> None:
    rules = late_rules(200, shape, version)
    assert len(rules) == 200
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        client, vm = (
            int(ip_address(addresses[version])) for addresses in (CLIENT_ADDRESSES, VM_ADDRESSES)
        )
        found = _first_match(rules, opening(Header(version, client, vm, 6, 40000, port)))
        assert found is (rules[-2] if port == DROPPED_PORT else rules[-1])


def traces_of_labs() -> list[Path]:
    return [*Path("/run").glob(f"{PREFIX}*"), *Path("/run/netns").glob(f"{PREFIX}*")]


@pytest.mark.lab
def test_every_system_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--only", "connections", "--quick", "--seconds", "0.1", "--rules", "10,40"]
    assert lookup.main([*words, "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["what"], row.get("rules")) for row in rows} == {
        ("nothing", None),
        *((what, size) for what in ("vgw", *NFT_FORMS) for size in (10, 40)),
    }
    assert {row["unit"] for row in rows} == set(FIGURES)
    for row in rows:
        assert row["median"] > 0, row
    assert traces_of_labs() == []


@pytest.mark.lab
@EVERY_VERSION
def test_only_the_dropped_port_is_closed(version: int) -> None:
    """The measurement's own check of verdicts sees a difference."""
    with lab() as built, server(built, version):
        open_four = partial(burst, built, version, 0.2, ports=1, in_flight=2, limit=4)
        assert open_four(first_port=DROPPED_PORT).completed == 4
        built.filter_bridged(on=True)
        built.nft(unordered_maps(late_rules(40, "fw", version), version, VM_MAC).text)
        assert open_four(first_port=DROPPED_PORT).completed == 0
        assert open_four(first_port=DROPPED_PORT + 1).completed == 4


@pytest.mark.lab
def test_a_failed_run_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup.main(["--only", "connections", "--quick", "--vgw", "/bin/false"]) == 1
    assert "bench:" in capsys.readouterr().err
    assert traces_of_labs() == []


@pytest.mark.parametrize("words", [["--rules", "9"], ["--seconds", "0"], ["--only", "nothing"]])
def test_wrong_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        lookup.main(words)
    assert caught.value.code == 2
