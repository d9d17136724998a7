# SPDX-License-Identifier: Apache-2.0
"""No id of the catalogue is silently missing, and no row or test names one that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.catalogue import coverage
from tests.catalogue.ids import CATALOGUE
from tests.catalogue.rows import ROWS

README = (coverage.ROOT / "README.md").read_text()
GROUP_SIZES = dict(
    zip("ABCDEFGHIJKLMN", (16, 14, 12, 14, 23, 25, 23, 14, 16, 5, 12, 17, 39, 18), strict=True)
)


def uncovered() -> set[str]:
    """Return the ids that neither rows nor test functions nor the README's table account for."""
    covered = {*coverage.functions_by_id(), *coverage.not_runnable(README)}
    return {
        identity
        for identity in CATALOGUE
        if identity not in covered and not coverage.has_rows_for_programs(identity)
    }


def test_the_list_is_whole() -> None:
    expected = [
        f"{group}{number}" for group, size in GROUP_SIZES.items() for number in range(1, size + 1)
    ]
    assert list(CATALOGUE) == expected
    for entry in CATALOGUE.values():
        assert re.fullmatch("[rncfz]+", entry.layers)
        assert entry.title


def test_every_id_is_covered() -> None:
    excused = coverage.not_runnable(README)
    for identity, reason in excused.items():
        print(f"not run: {identity} {CATALOGUE[identity].title}: {reason}")
    missing = [f"{identity} {CATALOGUE[identity].title}" for identity in sorted(uncovered())]
    assert not missing, "\n".join(missing)


def test_an_id_without_tests_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = dict(coverage.functions_by_id())
    before = uncovered()
    del functions["K7"]
    monkeypatch.setattr(coverage, "functions_by_id", lambda: functions)
    monkeypatch.setattr(coverage, "ROWS", {**ROWS, "C1": ()})
    assert uncovered() - before == {"K7", "C1"}


def test_every_named_id_is_known() -> None:
    named = {*ROWS, *coverage.functions_by_id(), *coverage.not_runnable(README)}
    assert [identity for identity in sorted(named) if identity not in CATALOGUE] == []


def test_functions_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "def test_catalogue_K7_queues_agree() -> None: ...\n"
        "class Test:\n    async def test_catalogue_L99_nothing(self) -> None: ...\n"
        "def test_catalogue_K8() -> None: ...\n"
        "def test_catalogue_M1_M2_both_hold() -> None: ...\n"
    )
    assert coverage.functions_by_id(tmp_path) == {
        "K7": ["tests/test_some.py::test_catalogue_K7_queues_agree"],
        "L99": ["tests/test_some.py::test_catalogue_L99_nothing"],
        "M1": ["tests/test_some.py::test_catalogue_M1_M2_both_hold"],
        "M2": ["tests/test_some.py::test_catalogue_M1_M2_both_hold"],
    }
    assert "L99" not in CATALOGUE
    assert "N19" not in CATALOGUE


def test_reasons_are_read_from_the_readme() -> None:
    head = "\n## Packet catalogue\n| id | what | why |\n|---|---|---|\n"
    text = f"{head}| A1, K1 | all of it | no vhost |\n| E22 | other kernels | only this one |\n"
    assert coverage.not_runnable(text) == {"A1": "no vhost", "K1": "no vhost"}
    assert coverage.not_runnable(text.replace("Packet catalogue", "Other")) == {}
