# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes the exporter, and promtool finds nothing to say about it."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.lab import wire
from tests.lab.topology import METRICS_PORT, Lab, eventually, policy

pytestmark = pytest.mark.lab

PORT = 8080
PROMETHEUS_PORT = 9090
WEB = policy({"ingress": [f"{{name: web, action: accept, services: [tcp/{PORT}]}}"]})


@contextmanager
def prometheus(lab: Lab, directory: Path) -> Iterator[None]:
    """Run Prometheus on the lab's host with the exporter as its target."""
    config = directory / "prometheus.yml"
    target = f"127.0.0.1:{METRICS_PORT}"
    config.write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs: [{{job_name: vgw, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    options = {
        "config.file": config,
        "storage.tsdb.path": directory / "data",
        "web.listen-address": f"127.0.0.1:{PROMETHEUS_PORT}",
    }
    with directory.joinpath("prometheus.log").open("w") as output:
        process = subprocess.Popen(
            lab.host.command("prometheus", *(f"--{name}={v}" for name, v in options.items())),
            stdout=output,
            stderr=output,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=2 * wire.PATIENCE)


def answer(lab: Lab, expression: str) -> Any:
    """Ask Prometheus; returns its answer, None while it is starting or to what is no query."""
    path = f"api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        return json.loads(lab.get(PROMETHEUS_PORT, path))
    except urllib.error.URLError:
        return None


def query(lab: Lab, expression: str) -> list[float]:
    """Ask Prometheus; returns the values, none while it is still starting."""
    found = answer(lab, expression)
    return [] if found is None else [float(row["value"][1]) for row in found["data"]["result"]]


def test_prometheus_scrapes_the_exporter(lab: Lab, tmp_path: Path) -> None:
    lab.write_policy(WEB)
    lab.attach("web01", "db01")
    dropped = 'vgw_dropped_packets_total{vm="web01",direction="ingress",reason="DEFAULT"}'
    with lab.controller(), prometheus(lab, tmp_path):
        eventually("the target is up", lambda: query(lab, "up") == [1], timeout=30)
        assert len(query(lab, "vgw_attached == 1")) == 2
        before = sum(query(lab, dropped))
        lab.assert_blocked("tcp", "client", "web01", 22)
        eventually("the drop is counted", lambda: sum(query(lab, dropped)) == before + 1)


@pytest.mark.parametrize("options", [(), ("--rule-metrics",)])
def test_promtool_is_content(lab: Lab, options: tuple[str, ...]) -> None:
    lab.write_policy(WEB)
    lab.attach("web01", "db01")
    with lab.controller(*options):
        lab.assert_reaches("tcp", "client", "web01", PORT)
        lab.assert_blocked("udp", "client", "db01", 53)
        text = lab.get(METRICS_PORT, "metrics")
    assert ("vgw_rule_packets_total" in text) == bool(options)
    check = check_metrics(text)
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def test_promtool_would_complain() -> None:
    """The control: promtool does look."""
    check = check_metrics("# TYPE vgw_events counter\nvgw_events 1\n")
    assert check.returncode != 0
    assert "vgw_events" in check.stderr


def check_metrics(text: str) -> subprocess.CompletedProcess[str]:
    """Let promtool judge an exporter's output."""
    command = ["promtool", "check", "metrics"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)
