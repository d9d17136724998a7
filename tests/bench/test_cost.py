# SPDX-License-Identifier: Apache-2.0
"""Every system is measured under every kind of traffic, and what filters proves that it does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import __main__ as cost
from bench.cost.rules import DENIED_PORT, DROPPED_PORT, measured_rules
from bench.cost.systems import SYSTEMS
from bench.cost.vms import VMS
from bench.lab import PREFIX
from vgw.abi import Action

#: Part of the rows -> units of its figures.
UNITS = {
    "bulk": {"Gbit/s", "CPU s/GB"},
    "small": {"packets/s", "CPU s/million"},
    "latency": {"us median", "us p99"},
    "connections": {"connections/s", "us CPU/connection"},
    "denied": {"drops/s"},
    "paths": {"ns net", "ns total"},
    "run time": {"ns/run"},
    "size": {"ns net", "ms/VM", "KiB", "s"},
}
TRAFFIC = ("bulk", "small", "latency", "connections")


@pytest.mark.lab
def test_every_figure_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["--quick", "-o", "json", "--plots", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {part: {row["unit"] for row in rows if row["part"] == part} for part in UNITS} == UNITS
    for row in rows:
        assert row["median"] > 0, row
    traffic = [row for row in rows if row["part"] in TRAFFIC]
    assert {(row["device"], row["what"]) for row in traffic} == {
        (device, system.name) for device in VMS for system in SYSTEMS
    }
    assert all("nothing" in row["ratios"] for row in traffic)
    assert {path.name for path in tmp_path.iterdir()} == {"vms.png", "flows.png", "rules.png"}
    assert not list(Path("/run/netns").glob(f"{PREFIX}{os.getpid()}-*"))


@pytest.mark.parametrize("version", [4, 6])
def test_only_the_last_rules_are_about_the_client(version: int) -> None:
    rules = measured_rules(100, "acl", version, VMS["tap"])
    assert len(rules) == 100
    denied, control, measured = rules[-3:]
    assert [rule.action for rule in (denied, control, measured)] == [
        Action.DROP,
        Action.DROP,
        Action.ACCEPT,
    ]
    assert denied.services[0].ports == (DENIED_PORT, DENIED_PORT)
    assert control.services[0].ports == (DROPPED_PORT, DROPPED_PORT)
    assert all(rule.peers != measured.peers for rule in rules[:-3])
