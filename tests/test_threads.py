# SPDX-License-Identifier: Apache-2.0
"""Threads that the host does not give, or that find no memory to begin, are errors."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from vgw import threads
from vgw.controller.own_namespace import in_own_namespace
from vgw.controller.policy_source import SourceHangsError, SourceReader
from vgw.errors import VgwError
from vgw.threads import NoThreadError, begin_call, start_thread


def test_a_call_is_begun_and_its_end_can_be_waited_for() -> None:
    ended, caller = threading.Event(), threading.get_ident()

    def number() -> int:
        assert ended.wait(PATIENCE)
        return threading.get_ident()

    call = begin_call(number)
    assert (call.wait(0), call.is_made, call.withdraw()) == (False, False, False)
    ended.set()
    assert (call.wait(PATIENCE), call.is_made) == (True, True)
    assert call.result() != caller


def test_what_a_call_raises_is_raised_where_its_result_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no number"):
        begin_call(lambda: int("no number")).result()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_host_that_gives_no_more_threads(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    with pytest.raises(NoThreadError, match="gives no more threads"):
        start_thread(print)


@pytest.fixture
def unborn(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let threads end before they do anything, as for want of memory, until it is undone."""

    def start(_function: Callable[..., object], *_: object) -> int:
        return _thread.get_ident()

    monkeypatch.setattr(threads, "BEGIN_SECONDS", 0.1)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    monkeypatch.setattr(threading, "_start_new_thread", start)
    return monkeypatch


def test_catalogue_M30_a_call_whose_thread_never_begins(unborn: pytest.MonkeyPatch) -> None:
    del unborn
    called: list[object] = []
    with pytest.raises(VgwError, match="out of memory"):
        begin_call(lambda: called.append(1))
    assert called == []


def test_a_thread_that_begins_late_finds_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Callable[[], object]] = []
    monkeypatch.setattr(threads, "BEGIN_SECONDS", 0.01)
    monkeypatch.setattr(_thread, "start_new_thread", lambda function, _: late.append(function))
    called: list[object] = []
    with pytest.raises(VgwError, match="out of memory"):
        begin_call(lambda: called.append(1))
    late[0]()
    assert called == []


def test_catalogue_M30_a_policy_is_read_again_when_there_is_memory(
    unborn: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("schema: vgw/v1\n")
    reader = SourceReader(file)
    with pytest.raises(VgwError, match="out of memory") as caught:
        reader.read()
    assert not isinstance(caught.value, SourceHangsError)
    assert not reader.hangs
    unborn.undo()
    assert reader.read() == [(str(file), "schema: vgw/v1\n")]


def test_catalogue_M30_an_attempt_in_a_namespace_says_why_it_was_not_made(
    unborn: pytest.MonkeyPatch,
) -> None:
    del unborn
    assert "out of memory" in str(in_own_namespace(lambda: None))
