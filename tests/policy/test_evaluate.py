# SPDX-License-Identifier: Apache-2.0
"""The reference evaluator gives every packet of the verdict tables what the tables say."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cases import TABLES
from tests.cases.table import Send
from tests.catalogue.rows import OTHER_ROWS
from tests.engines import EvaluatorEngine, play, report
from vgw.abi import Reason


@pytest.mark.parametrize("table", OTHER_ROWS)
def test_evaluator_agrees_with_table(table: str) -> None:
    """The rows without an id of the catalogue; those with one are tests/catalogue's."""
    differences = []
    for case in OTHER_ROWS[table]:
        engine = EvaluatorEngine(case.fixture.facts, case.fixture.policy, case.conntrack_max)
        differences += play(engine, case)
    assert not differences, report(differences)


def test_names_are_unique() -> None:
    names = Counter((case.fixture.name, case.name) for cases in TABLES.values() for case in cases)
    assert [name for name, count in names.items() if count > 1] == []


def test_tables_cover_every_reason_the_evaluator_can_give() -> None:
    expected = {
        step.expected.reason.name
        for cases in TABLES.values()
        for case in cases
        for step in case.steps
        if isinstance(step, Send)
    }
    # NONE is no reason, and CT_BUSY needs two CPUs at the same entry.
    # CT_RATE counts real seconds, so a table cannot: tests/bpf/test_flow_limits.py does.
    assert {reason.name for reason in Reason} - expected == {"NONE", "CT_BUSY", "CT_RATE"}
