# SPDX-License-Identifier: Apache-2.0
"""The history of applied policies on disk: what is kept, for how long, and what damage does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vgw.controller import documents, history
from vgw.controller.actor import Actor, Peer, one_line, peer_process, this_process
from vgw.controller.batch import AttachResult
from vgw.controller.history import ARMED, KEPT, Entry, History, outcome_of
from vgw.controller.paths import Paths
from vgw.controller.state_file import write_state
from vgw.controller.window import Window, load_window, save_window
from vgw.errors import VgwError
from vgw.policy.parse import digest_of

WHO = Actor(0, "root", "cli", "host1", 7, "vgw apply", login="alice")


@pytest.fixture
def known(tmp_path: Path) -> History:
    return History(Paths.from_environment({}, state_dir=tmp_path / "state"))


def add(known: History, text: str, **fields: object) -> Entry:
    """Apply a text, as far as the history can tell."""
    sources = [("policy.yaml", text)]
    draft = Entry("apply", digest_of(sources), ("policy.yaml",), WHO, digest_of(sources))
    return known.begin(dataclasses.replace(draft, **fields), sources)  # type: ignore[arg-type]


def entry_file(known: History, number: int) -> Path:
    return known._file(number)


def texts_file(known: History, entry: Entry) -> Path:
    return known.documents._file(entry.digest)


def test_entries_are_numbered_and_come_back_whole(known: History) -> None:
    first = add(known, "a: 1\n")
    second = add(known, "a: 2\n", vms=("web01",), revision=4, back=1, window="w", confirm=ARMED)
    results = [AttachResult("web01", ["tap0"], 1, True, False, 0.1)]
    done = dataclasses.replace(second, outcome=outcome_of(results, {"db01": "no\nroom"}))
    known.save(done)

    assert [entry.number for entry in known.entries()] == [1, 2]
    assert known.get(2) == done
    assert done.outcome is not None
    assert done.outcome.failures == {"db01": "no\\nroom"}
    assert known.sources(known.get(1)) == [("policy.yaml", "a: 1\n")]
    assert known.current() == first, "the second is only one VM's"


def test_the_last_twenty_are_kept_and_equal_texts_once(known: History) -> None:
    for number in range(KEPT + 5):
        add(known, f"a: {number % 3}\n")

    assert known.numbers() == list(range(6, KEPT + 6))
    assert len(known.documents.sizes()) == 3
    add(known, "new\n")
    assert known.numbers()[-1] == KEPT + 6


def test_the_current_one_and_the_one_to_go_back_to_are_kept_longer(known: History) -> None:
    back = add(known, "a: 1\n")
    waiting = add(known, "a: 2\n", confirm=ARMED, back=back.number, window="w")
    for number in range(KEPT + 5):
        add(known, f"b: {number}\n", vms=("web01",))

    assert {back.number, waiting.number} <= set(known.numbers())
    assert known.current() == waiting
    assert known.sources(back)


def test_texts_have_a_bound(known: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 100)
    with pytest.raises(VgwError, match="is larger than"):
        add(known, "a" * 101)
    assert known.numbers() == []
    monkeypatch.setattr(history, "KEPT_BYTES", 900)
    for number in range(6):
        add(known, f"a: {number}\n")
    sizes = known.documents.sizes()
    assert 0 < len(sizes) < 6
    assert known.numbers()[-1] == 6, "the newest is kept whatever it takes"


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "schema", "host", "renamed"])
def test_catalogue_M32_a_damaged_entry_is_no_entry(
    known: History, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(known, "a: 1\n")
    add(known, "a: 2\n")
    file = entry_file(known, 2)
    data = file.read_bytes()
    if harm == "truncated":
        file.write_bytes(data[:-20])
    elif harm == "flipped":
        file.write_bytes(data.replace(b"policy.yaml", b"policx.yaml"))
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "schema":
        file.write_bytes(data.replace(b"vgw/history/v1", b"vgw/history/v0"))
    elif harm == "renamed":
        file.write_bytes(entry_file(known, 1).read_bytes())
    else:
        monkeypatch.setattr(history, "machine_id", lambda: "another")

    assert [entry.number for entry in known.entries()] == ([] if harm == "host" else [1])
    assert known.current() is None, "an older policy is not taken for the current one"
    with pytest.raises(VgwError, match="policy 2 is damaged"):
        known.get(2)
    monkeypatch.undo()
    assert add(known, "a: 3\n").number == 3, "a number is not given twice"


@pytest.mark.parametrize("harm", ["truncated", "flipped", "other", "host", "gone"])
def test_catalogue_M32_damaged_texts_are_none(
    known: History, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, other = add(known, "a: 1\n"), add(known, "a: 2\n")
    file = texts_file(known, entry)
    data = file.read_bytes()
    if harm == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        file.write_bytes(data.replace(b'"lengths":[5]', b'"lengths":[4]'))
    elif harm == "other":
        file.write_bytes(texts_file(known, other).read_bytes())
    elif harm == "gone":
        file.unlink()
    else:
        monkeypatch.setattr(documents, "machine_id", lambda: "another")

    with pytest.raises(VgwError, match="texts of policy 1 are lost or damaged"):
        known.sources(entry)
    monkeypatch.undo()
    add(known, "a: 1\n")
    assert known.sources(entry) == [("policy.yaml", "a: 1\n")], "written anew"


def test_catalogue_M32_texts_that_unpack_to_too_much_are_none(known: History) -> None:
    entry = add(known, "a" * 100_000)
    file = texts_file(known, entry)
    body = json.loads(file.read_text())["body"] | {"lengths": [10]}
    write_state(file, "vgw/policy-texts/v1", body)
    assert known.documents.texts(entry.digest) is None


def test_catalogue_M32_a_damaged_window_has_no_deadline(known: History, tmp_path: Path) -> None:
    paths = Paths.from_environment({}, state_dir=tmp_path / "state")
    save_window(paths, Window("w", 2, 1, 60.0).beginning_now())
    assert load_window(paths) is not None
    file = tmp_path / "state" / "confirm.json"
    file.write_bytes(file.read_bytes().replace(b'"number":2', b'"number":3'))
    assert load_window(paths) is None
    assert known.numbers() == []


def test_the_one_before_is_another_policy_that_was_not_undone(known: History) -> None:
    with pytest.raises(VgwError, match="not known"):
        known.before()
    add(known, "a: 1\n")
    with pytest.raises(VgwError, match="no other policy before 1"):
        known.before()
    add(known, "a: 2\n", confirm="rolled_back")
    add(known, "a: 3\n", vms=("web01",))
    add(known, "a: 4\n")
    add(known, "a: 4\n")
    assert known.before().number == 1
    with pytest.raises(VgwError, match="policy 9 is not kept, 1 to 5 are"):
        known.get(9)


def test_who_did_it_is_what_the_kernel_says_in_one_line() -> None:
    me = this_process("cli")
    assert me == peer_process(Peer(me.pid, me.uid), "cli")
    assert (me.uid, me.via) == (0, "cli")
    asks = "input('ready')"  # by then it is that program, and no copy of this one
    with subprocess.Popen(
        [sys.executable, "-uc", asks, "two\nlines"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.read(5) == b"ready"
        command = peer_process(Peer(other.pid, 0), "cli").command
        other.communicate(b"\n")
    assert command == one_line(f"{sys.executable} -uc {asks} two\nlines")
    gone = peer_process(Peer(2**22 + 1, 0), "controller")
    assert (gone.user, gone.command, gone.login) == ("root", "", None)
    assert WHO.text() == "root (alice)"
    assert one_line("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    assert len(one_line("x" * 10_000)) == 200
