# SPDX-License-Identifier: Apache-2.0
"""The part `established` measures packets of open connections, and of nothing else."""

from __future__ import annotations

import pytest

from bench import established
from bench.options import Options
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf

#: The programs leave the larger one to their stages.
OPTIONS = Options(quick=True, rules=(10, 4000), shape="acl", version=4, seconds=0.1, rounds=2)


def test_both_paths_are_measured_under_each_rule_set() -> None:
    rows = established.run(OPTIONS, lambda _: None)
    assert [(row.what, row.facts["rules"]) for row in rows] == [
        ("to_vm", 10),
        ("to_vm", 4000),
        ("from_vm", 10),
        ("from_vm", 4000),
    ]
    assert all(len(row.samples) == 2 and min(row.samples) > 0 for row in rows)
    assert [row.ratios["fewest rules"] for row in rows[::2]] == [1, 1]


def test_a_connection_that_is_not_open_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: packets that no rule accepts would be measured as something else."""
    monkeypatch.setitem(established.TO_VM, "dport", 54)
    with pytest.raises(VgwError, match="did not open"):
        established.run(OPTIONS, lambda _: None)
