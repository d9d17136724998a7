# SPDX-License-Identifier: Apache-2.0
"""The verbs about applied policies: what they print, and how they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.cli_fakes import FakeTarget
from vgw import cli_options
from vgw.cli import cli
from vgw.cli_options import Duration
from vgw.cli_target import ApplyOptions
from vgw.controller.actor import Actor
from vgw.controller.history import Entry, History, Outcome
from vgw.controller.paths import Paths
from vgw.policy.parse import digest_of

WHO = Actor(0, "root", "cli", "host1", 7, "vgw apply new.yaml", login="alice")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    fake = FakeTarget()
    monkeypatch.setattr(cli_options, "connect", lambda *_: fake)
    return fake


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """A history of two policies, of which the second was rolled back."""
    monkeypatch.setenv("VGW_STATE_DIR", str(tmp_path / "state"))
    known = History(Paths.from_environment())
    for number, text in enumerate(("a: 1\nb: 2\n", "a: 1\nb: 3\n"), 1):
        sources = [("policy.yaml", text)]
        draft = Entry("apply", digest_of(sources), ("policy.yaml",), WHO, revision=number)
        entry = known.begin(draft, sources)
        done = Outcome(changed=2, failed=1, vms=("a", "b"), failures={"c": "no room"})
        known.save(dataclasses.replace(entry, outcome=done))
    return known


def vgw(arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments.split())


def test_the_list_says_who_when_and_what_became_of_it(known: History) -> None:
    header, first, second = vgw("history").stdout.splitlines()
    assert header.split() == ["N", "TIME", "EVENT", "WHO", "FROM", "VMS", "NOTE"]
    assert first.split()[0] == "1"
    assert second.split()[:2] == ["*", "2"]
    assert "root (alice) (cli)  policy.yaml  2 changed, 1 FAILED  revision 2" in second
    found = json.loads(vgw("history -o json").stdout)
    assert (found["schema"], found["current"], found["damaged"]) == ("vgw/v1", 2, [])
    row = found["policies"][0]
    assert (row["number"], row["event"], row["who"]["login"]) == (1, "apply", "alice")
    assert row["outcome"]["failures"] == {"c": "no room"}
    lines = vgw("history -o jsonl").stdout.splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2]
    file = known._file(1)
    file.write_text("x")
    assert vgw("history").stdout.endswith("damaged, and cannot be used: 1\n")


@pytest.mark.usefixtures("known")
def test_the_texts_and_how_they_differ() -> None:
    assert vgw("history show 1").stdout == "# policy.yaml\na: 1\nb: 2\n"
    found = json.loads(vgw("history show 1 -o json").stdout)
    assert found["files"] == [{"name": "policy.yaml", "text": "a: 1\nb: 2\n"}]
    assert vgw("history --diff 1 2").stdout.splitlines() == [
        *("--- policy.yaml (1)", "+++ policy.yaml (2)", "@@ -1,2 +1,2 @@", " a: 1", "-b: 2"),
        "+b: 3",
    ]
    assert vgw("history --diff 1 1").stdout == "the texts are the same\n"
    outcome = vgw("history show 9")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "policy 9 is not kept, 1 to 2 are" in outcome.stderr


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("arguments", ["show", "show 1 --diff 1 2", "shown 1", "show one"])
def test_usage(arguments: str) -> None:
    assert vgw(f"history {arguments}").exit_code == 2


def test_rollback_and_confirm_say_which_policy(target: FakeTarget) -> None:
    assert vgw("rollback 7").stdout.endswith("policy 7 is in force again, as number 9\n")
    assert json.loads(vgw("rollback -o json").stdout)["back"] == 7
    assert vgw("confirm").stdout == "policy 8 is confirmed\n"
    assert json.loads(vgw("confirm -o json").stdout)["policy"] == 8
    assert target.asked[0] == ("rollback", 7)


def test_options_of_apply(target: FakeTarget, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("schema: vgw/v1\n")
    outcome = vgw(f"apply {policy} --confirm-within 1m30s --supersede --force")
    assert target.asked == [("apply", ApplyOptions(True, 90.0, True))]
    assert "`vgw confirm` within 90 s, or the policy before comes back" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("60s", 60), ("5m", 300), ("2h", 7200), ("1h30m", 5400), ("6d", 518400)],
)
def test_times(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize(
    "text", ["", "60", "0s", "-5s", "1.5s", "7d", "5 m", "m", "5x", "99999999999s"]
)
def test_what_is_no_time(text: str) -> None:
    outcome = CliRunner().invoke(cli, ["apply", "p", "--confirm-within", text])
    assert outcome.exit_code == 2
    assert "is not a time of at most 6d, such as 60s or 5m" in outcome.stderr
