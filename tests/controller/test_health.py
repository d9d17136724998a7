# SPDX-License-Identifier: Apache-2.0
"""A controller that is alive but stuck is noticed: by its health, an alarm and the watchdog."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.conftest import run
from tests.controller.observe import program_ids
from tests.controller.process import Controller, eventually
from tests.controller.test_daemon import policy
from vgw.controller import health as health_module
from vgw.controller.alarms import Alarms
from vgw.controller.doctor import examine
from vgw.controller.events import LogWriter
from vgw.controller.health import MAIN, Health, Watchdog, extending_start, watchdog_seconds
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

#: A controller with short limits whose main thread sleeps for good at SIGUSR1, and which makes no
#: way with the next change after SIGUSR2, as on a disk that does not answer.
HANGING = """
import signal, threading
from vgw.controller import change, daemon, health
health.STUCK_SECONDS, health.CHANGE_SECONDS, daemon.IDLE_SECONDS = 4.0, 4.0, 0.5
hang = lambda *_: threading.Event().wait()
signal.signal(signal.SIGUSR1, hang)
signal.signal(signal.SIGUSR2, lambda *_: setattr(change.Change, "prepare", hang))
"""


class Clock:
    """Stands for the clock of health.py; the test lets its time pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(health_module, "time", made)
    return made


def test_a_part_without_progress_is_stuck_until_it_goes_on(clock: Clock) -> None:
    health = Health(stuck_seconds=5.0)
    alive = health.part("links")
    other = health.part("events")
    assert health.report() == {"ok": True, "stuck": {}}

    clock.now += 4.0
    other()
    assert health.report()["ok"]
    clock.now += 2.0
    assert health.report() == {"ok": False, "stuck": {"links": 6.0}}
    alive()
    assert health.report()["ok"]


def test_who_waits_for_a_change_is_not_stuck_but_the_change_may_be(clock: Clock) -> None:
    health = Health(stuck_seconds=5.0, change_seconds=30.0)
    health.part(MAIN)
    with health.changing():
        health.change_goes_on()
        clock.now += 29.0
        assert health.stuck() == {}
        clock.now += 2.0
        assert list(health.stuck()) == ["change"]
        health.change_goes_on()
        assert health.stuck() == {}
    assert health.stuck() == {}
    clock.now += 6.0
    assert list(health.stuck()) == [MAIN]


def test_the_start_asks_for_more_time_but_not_all_the_time() -> None:
    said: list[str] = []
    called: list[None] = []
    alive = extending_start(said.append, lambda: called.append(None))
    for _ in range(10):
        alive()
    assert said == ["EXTEND_TIMEOUT_USEC=300000000"]
    assert len(called) == 10


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "much"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_whether_the_service_manager_wants_to_hear(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_seconds(environ) == seconds


def test_catalogue_M39_the_watchdog_is_fed_only_while_all_is_well(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "log")
    alarms = Alarms(log)
    health = Health(stuck_seconds=0.3)
    alive = health.part("links")
    fed = threading.Semaphore(0)
    watchdog = Watchdog(health, alarms, lambda _: fed.release(), {"WATCHDOG_USEC": "150000"})
    watchdog.start()
    try:

        def is_fed() -> bool:
            alive()
            return fed.acquire(timeout=0.05)

        for _ in range(5):
            eventually("fed", is_fed)
        eventually("stuck", health.stuck)
        (alarm,) = eventually("an alarm", alarms.current)
        assert "make no progress: links" in alarm.text
        while fed.acquire(blocking=False):
            pass
        assert not fed.acquire(timeout=0.3), "fed although a part is stuck"
        eventually("fed", is_fed)
        eventually("the alarm ends", lambda: is_fed() and not alarms.current())
    finally:
        watchdog.stop()
        log.close()


@pytest.fixture
def hanging(
    paths: Paths,
    tap: Callable[[str], int],
    artefact: object,  # noqa: ARG001 - compiled already, which may take longer than a start may
) -> Iterator[Controller]:
    """A controller that can be made to hang, with a VM."""
    run("ip", "link", "set", "lo", "up")
    tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = Controller(paths, 9477, HANGING)
    yield controller
    controller.end(signal.SIGKILL)
    Host(paths).detach_all()


@pytest.mark.bpf
def test_catalogue_M39_a_main_thread_that_hangs_is_noticed_and_packets_do_not_notice(
    hanging: Controller, paths: Paths
) -> None:
    before = program_ids(Host(paths))
    status, text = hanging.page("healthz")
    assert (status, json.loads(text)) == (200, {"ok": True, "stuck": {}})
    assert doctor_row(paths)["ok"]

    hanging.process.send_signal(signal.SIGUSR1)

    eventually("unhealthy", lambda: hanging.page("healthz")[0] == 503)
    assert list(json.loads(hanging.page("healthz")[1])["stuck"]) == ["main"]
    said = eventually("an alarm", lambda: hanging.client.status()["alarms"])
    assert said[0]["alarm"] == "stuck"
    assert hanging.client.status()["health"]["ok"] is False
    assert hanging.metric('vgw_alarm{alarm="stuck"') == 1
    row = doctor_row(paths)
    assert (row["ok"], row["detail"]) == (False, "no progress in: main")
    assert "restart it" in str(row["fix"])
    assert program_ids(Host(paths)) == before


@pytest.mark.bpf
def test_catalogue_M39_a_change_that_comes_to_no_end_is_what_is_stuck(
    hanging: Controller, paths: Paths
) -> None:
    hanging.process.send_signal(signal.SIGUSR2)
    paths.policy.write_text(policy(("web01", "tap0"), rules=""))
    hanging.process.send_signal(signal.SIGHUP)
    eventually("unhealthy", lambda: hanging.page("healthz")[0] == 503)
    assert "change" in json.loads(hanging.page("healthz")[1])["stuck"]
    assert hanging.attached() == {"web01": 1}


def doctor_row(paths: Paths) -> dict[str, object]:
    return next(row for row in examine(paths) if row["check"] == "controller")


@pytest.mark.bpf
def test_the_doctor_says_when_no_controller_runs(paths: Paths) -> None:
    assert doctor_row(paths)["ok"]
    assert str(doctor_row(paths)["detail"]).startswith("none runs")
    paths.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(paths.socket))
    assert doctor_row(paths)["ok"]
    with socket.socket(socket.AF_UNIX) as deaf:
        paths.socket.unlink()
        deaf.bind(str(paths.socket))
        deaf.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vgw.controller.doctor._ANSWER_SECONDS", 0.2)
            assert not doctor_row(paths)["ok"]
