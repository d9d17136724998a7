# SPDX-License-Identifier: Apache-2.0
"""Results are a table for people and a document for programs, with what they depend on."""

from __future__ import annotations

import json

from bench.report import Row, machine, ratio, to_json, to_table

ROWS = [
    Row("one", "slow", "ns", (30.0, 10.0, 20.0), {"rules": 10}, {"nothing": 2.0}),
    Row("one", "large", "ns", (), {"rules": 20}, note="refused: too large"),
    Row("two", "fast", "us", (1234.5,)),
]


def test_the_document_has_samples_and_their_spread() -> None:
    document = json.loads(to_json(ROWS, {"kernel": "6"}))
    assert document["schema"] == "vgw-bench/v1"
    assert document["machine"] == {"kernel": "6"}
    slow, large, _ = document["rows"]
    assert (slow["rules"], slow["median"], slow["min"], slow["max"]) == (10, 20.0, 10.0, 30.0)
    assert slow["samples"] == [30.0, 10.0, 20.0]
    assert slow["ratios"] == {"nothing": 2.0}
    assert (large["median"], large["note"]) == (None, "refused: too large")


def test_each_part_has_its_own_table() -> None:
    assert to_table(ROWS, {"kernel": "6"}).splitlines() == [
        "kernel: 6",
        "",
        "one",
        "WHAT   RULES  MEDIAN  MIN  MAX  SAMPLES  UNIT  / NOTHING  NOTE",
        "slow      10      20   10   30        3  ns        2.000",
        "large     20       -    -    -        0  ns            -  refused: too large",
        "",
        "two",
        "WHAT  MEDIAN   MIN   MAX  SAMPLES  UNIT",
        "fast    1234  1234  1234        1  us",
    ]


def test_ratios_are_of_samples_of_one_round() -> None:
    assert ratio((10, 40, 30), (5, 10, 10)) == 3
    assert ratio((), (5,)) is None


def test_the_machine_is_described() -> None:
    facts = machine()
    assert {"kernel", "cpu", "cores", "vgw", "bcc", "nft"} <= facts.keys()
    assert all(facts.values())
