# SPDX-License-Identifier: Apache-2.0
"""Every figure of the floods is measured, and those that have to be zero are."""

from __future__ import annotations

import json

import pytest

from bench import exhaustion

pytestmark = pytest.mark.lab

#: Part -> rows whose figure must be zero, whatever the scale.
ZERO = {
    "flood": ("open connections lost or stalled", "dropped as CT_FULL"),
    "full": ("open connections lost or stalled", "new connections to the VM"),
    "log": ("packets difference",),
    "expiry": ("live connections cut",),
    "leftovers": ("left: programs", "left: maps", "left: pins", "left: files of state",
        "left: descriptors"),
}  # fmt: skip
#: Part -> rows whose figure must not be.
SOME = {
    "flood": ("other VM", "SYNs sent", "half-open flows that gave way", "exchanges"),
    "full": ("flows", "dropped as CT_FULL meanwhile", "new connections to the other VM"),
    "log": ("no log", "log", "packets received: in the log", "packets suppressed: over the budget"),
    "expiry": ("connections opened", "exchanges of each live connection"),
    "leftovers": ("cycles", "a cycle"),
}


@pytest.mark.parametrize("part", exhaustion.PARTS)
def test_every_figure_is_measured(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exhaustion.main(["--only", part, "--quick", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]

    assert all(row["samples"] for row in rows)
    for what in ZERO[part]:
        assert [row["median"] for row in rows if row["what"] == what] == [0], what
    for what in SOME[part]:
        assert all(row["median"] > 0 for row in rows if row["what"] == what), what
        assert any(row["what"] == what for row in rows), what


def test_parts_are_what_is_said_of_them() -> None:
    assert ZERO.keys() == SOME.keys() == exhaustion.PARTS.keys()
