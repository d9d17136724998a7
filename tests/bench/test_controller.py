# SPDX-License-Identifier: Apache-2.0
"""Controllers that come and go cost no packet, and what does is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import endurance
from bench.endurance import Ordeal, run_endurance
from bench.many import Extent, run_scale
from bench.report import Row

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def compiled(program_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs need not be compiled for each lab."""
    monkeypatch.setenv("VGW_CACHE_DIR", str(program_cache))


def figures(rows: list[Row]) -> dict[str, float]:
    return {row.what: row.samples[0] for row in rows if row.unit != "KiB"}


def endured(*, kills: int = 0, restarts: int = 0, upgrades: int = 0) -> dict[str, float]:
    """Return what it cost, for the rest is the same whatever ends a controller: no packet."""
    ordeal = Ordeal(5_000, 10_000, kills, restarts, upgrades)
    found = figures(run_endurance(ordeal, lambda _: None))
    for what in ("packets lost", "packets out of order", "of these passed"):
        assert found[what] == 0, what
    assert found["packets sent"] >= ordeal.packets
    assert found["packets that policy denies"] > 0
    assert found["programs replaced by kills and restarts"] == 0
    return found


def test_catalogue_M1_no_packet_is_lost_while_controllers_are_killed() -> None:
    """At any moment of their first seconds."""
    assert endured(kills=2)["kills"] == 2


def test_catalogue_M2_no_packet_is_lost_while_controllers_are_restarted() -> None:
    assert endured(restarts=2)["restarts"] == 2


def test_catalogue_M3_no_packet_is_lost_while_another_build_takes_over() -> None:
    """Both programs of the VM are replaced, by ones that do the same."""
    assert endured(upgrades=1)["programs replaced by upgrades"] == 2


@pytest.mark.parametrize(
    ("default", "lost", "passed"), [("accept", False, True), ("drop", True, False)]
)
def test_packets_that_are_lost_or_passed_are_counted(
    monkeypatch: pytest.MonkeyPatch, default: str, lost: bool, passed: bool
) -> None:
    """The control: a policy that lets everything through, and one that lets nothing."""
    policy = endurance._POLICY
    policy = policy.replace("ingress: drop,", f"ingress: {default},")
    policy = policy.replace("name: in, action: accept", f"name: in, action: {default}")
    monkeypatch.setattr(endurance, "_POLICY", policy)
    found = figures(run_endurance(Ordeal(500, 10_000, 0, 0, 0), lambda _: None))
    assert bool(found["packets lost"]) is lost
    assert bool(found["of these passed"]) is passed


def test_every_figure_of_many_endpoints_is_measured() -> None:
    found = figures(run_scale(Extent(8, 1, 0.2), lambda _: None))
    assert found.keys() >= {"start with adoption", "controller's memory", "idle, of a processor"}
    assert all(value > 0 for what, value in found.items() if not what.startswith("idle"))
