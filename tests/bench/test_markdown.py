# SPDX-License-Identifier: Apache-2.0
"""Rows of a run, or of its document, are tables of a README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as cost
from bench.markdown import to_markdown
from bench.report import Fact, Row, from_json, to_json
from vgw.errors import VgwError

ROWS = [
    Row("one", "slow", "ns", (30.0, 10.0, 20.0), {"device": "tap"}, {"nothing": 2.0}),
    Row("one", "large", "ns", (), note="refused"),
    *(
        Row("paths", "packet", "ns", (float(rules),), {"program": "tc", "ip": 4, "rules": rules})
        for rules in (10, 100)
    ),
    Row("paths", "packet", "ns", (7.0,), {"program": "xdp", "ip": 4, "rules": 100}),
]
MARKDOWN = """\
kernel 6, cores 2

`one`

| what | device | unit | median | min | max | / nothing | note |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| slow | tap | ns | 20 | 10 | 30 | 2.00 |  |
| large |  | ns |  |  |  |  | refused |

`paths`

| what | ip | unit | tc, 10 rules | tc, 100 rules | xdp, 100 rules |
| --- | ---: | ---: | ---: | ---: | ---: |
| packet | 4 | ns | 10 | 100 | 7 |"""
FACTS: dict[str, Fact] = {"kernel": "6", "cores": 2}


def test_programs_and_rules_stand_side_by_side() -> None:
    assert to_markdown(ROWS, FACTS) == MARKDOWN


def test_a_document_has_all_that_its_run_had() -> None:
    assert from_json(to_json(ROWS, FACTS)) == (ROWS, FACTS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/v1"}'])
def test_another_document_is_refused(text: str) -> None:
    with pytest.raises(VgwError, match="document"):
        from_json(text)


def test_an_earlier_run_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(to_json(ROWS, FACTS))
    assert cost.main(["--from", str(file), "-o", "markdown"]) == 0
    assert capsys.readouterr().out == MARKDOWN + "\n"
    assert cost.main(["--from", str(file), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == FACTS
    assert cost.main(["--from", str(tmp_path / "none")]) == 1
    assert "cannot read" in capsys.readouterr().err
