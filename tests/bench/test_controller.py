# SPDX-License-Identifier: Apache-2.0
"""Controllers that come and go cost no packet, and what does is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import controller, endurance
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


def test_catalogue_M1_no_packet_is_lost_while_controllers_end_in_every_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed at any moment, restarted, and replaced by another build: the short form."""
    assert controller.main(["--only", endurance.PART, "--quick", "-o", "json"]) == 0
    rows = {row["what"]: row["median"] for row in json.loads(capsys.readouterr().out)["rows"]}
    for what in ("packets lost", "packets out of order", "of these passed"):
        assert rows[what] == 0, what
    assert rows["packets sent"] >= 20_000
    assert rows["packets that policy denies"] > 0
    assert (rows["kills"], rows["restarts"], rows["upgrades"]) == (2, 2, 1)
    assert rows["programs replaced by kills and restarts"] == 0


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
