# SPDX-License-Identifier: Apache-2.0
"""Alarms: raised once, taken back once, and shown by records, metrics and status."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vgw.controller.alarms import Alarms
from vgw.controller.events import LogWriter, read_log


class Bench:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.log = LogWriter(file)
        self.alarms = Alarms(self.log)

    def records(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.items() if key != "ts"}
            for record in read_log(self.file)
        ]

    def names(self) -> list[tuple[str, str | None, str | None]]:
        return [(each.alarm, each.vm, each.interface) for each in self.alarms.current()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "events.jsonl")
    yield bench
    bench.log.close()


RAISED = {"event": "alarm", "alarm": "renamed", "vm": "web01", "interface": "tap0", "text": "why"}
CLEARED = {"event": "alarm_cleared", "alarm": "renamed", "vm": "web01", "interface": "tap0"}


def test_an_alarm_is_recorded_when_it_comes_and_when_it_goes(bench: Bench) -> None:
    for _ in range(2):
        bench.alarms.set("renamed", "why", vm="web01", interface="tap0")
    assert bench.names() == [("renamed", "web01", "tap0")]
    for _ in range(2):
        bench.alarms.clear("renamed", vm="web01", interface="tap0")

    assert bench.names() == []
    assert bench.records() == [RAISED, CLEARED]


def test_another_text_is_recorded_and_the_alarm_is_as_old_as_before(bench: Bench) -> None:
    bench.alarms.set("renamed", "why", vm="web01", interface="tap0")
    (first,) = bench.alarms.current()
    while time.monotonic_ns() < first.since_ns + 20_000_000:
        time.sleep(0.005)
    bench.alarms.set("renamed", "otherwise", vm="web01", interface="tap0")
    (second,) = bench.alarms.current()

    assert (second.text, second.since_ns) == ("otherwise", first.since_ns)
    assert second.report()["seconds"] > 0
    assert bench.records() == [RAISED, RAISED | {"text": "otherwise"}]


def test_alarms_of_others_stay(bench: Bench) -> None:
    for vm in ("web01", "db01", None):
        bench.alarms.set("renamed", "why", vm=vm, interface=None if vm is None else "tap0")
    bench.alarms.set("detached", "why", vm="web01")

    bench.alarms.clear("renamed", vm="web01")
    assert len(bench.names()) == 4, "it has no such alarm without an interface"
    bench.alarms.forget("web01")
    assert bench.names() == [("renamed", None, None), ("renamed", "db01", "tap0")]
