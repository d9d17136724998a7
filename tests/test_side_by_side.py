# SPDX-License-Identifier: Apache-2.0
"""Calls at the same time, with as many threads as the host gives."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.controller import conftest as own_host
from tests.controller.policies import document
from tests.patience import PATIENCE
from vgw.controller.reconcile import Host
from vgw.libbpf import outcomes, side_by_side

#: A host of its own, gone afterwards.
netns, paths, host, tap = own_host.netns, own_host.paths, own_host.host, own_host.tap


@pytest.fixture(params=[0, 1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let the host give no more than so many threads, as a limit of pids does."""
    left: int = request.param
    start = _thread.start_new_thread

    def limited(function: Callable[[], object], arguments: tuple[()]) -> int:
        nonlocal left
        if left == 0:
            raise RuntimeError("can't start new thread")
        left -= 1
        return start(function, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", limited)
    return int(request.param)


def test_all_calls_are_made_in_few_threads(threads: int) -> None:
    used: set[int] = set()

    def call(number: int) -> int:
        used.add(threading.get_ident())
        return number

    found = [made.result() for made in outcomes([partial(call, n) for n in range(50)], 48)]
    assert found == list(range(50))
    assert len(used) <= threads + 1


@pytest.fixture
def stillborn(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let threads end before they do anything, as for want of memory; those that were started."""
    started: list[object] = []

    def start(function: Callable[[], object], _: tuple[()]) -> int:
        started.append(function)
        return 0

    monkeypatch.setattr(_thread, "start_new_thread", start)
    monkeypatch.setattr(threading, "_start_new_thread", start)
    return started


def test_catalogue_M30_threads_that_end_as_they_start_are_not_waited_for(
    stillborn: list[object],
) -> None:
    assert [made.result() for made in outcomes([lambda: 1] * 9, 4)] == [1] * 9
    assert stillborn


def test_they_are_made_at_the_same_time() -> None:
    meeting = threading.Barrier(4, timeout=PATIENCE)
    side_by_side(*[meeting.wait] * 4)


def test_no_more_than_asked_for_at_a_time() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def call() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1

    for made in outcomes([call] * 200, 3):
        made.result()
    assert 1 <= most <= 3


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    made: list[int] = []

    def fail(number: int) -> None:
        made.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        side_by_side(partial(made.append, 0), partial(fail, 1), partial(fail, 2))
    assert sorted(made) == [0, 1, 2]


@pytest.mark.bpf
@pytest.mark.usefixtures("threads")
def test_a_limit_of_threads_does_not_end_a_change_of_many_vms(
    host: Host, tap: Callable[[str], int]
) -> None:
    vms: dict[str, Any] = {}
    for number in range(4):
        tap(f"tap{number}")
        vms[f"vm{number}"] = f"{{interfaces: [{{name: tap{number}}}]}}"

    assert len(host.attach_many(document(vms=vms)).vms) == 4
    other = document("[{name: ssh, action: accept, services: [tcp/22]}]", vms=vms)
    assert all(result.changed for result in host.apply(other).vms)
