# SPDX-License-Identifier: Apache-2.0
"""The dashboard for Grafana: every query of it is asked of a Prometheus that scrapes traffic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.test_prometheus import answer, prometheus
from tests.lab.topology import Lab, eventually, policy

pytestmark = pytest.mark.lab

DASHBOARD = Path(__file__).parents[2] / "contrib/grafana/vgw.json"
#: What Grafana would put in.
VARIABLES = {
    "$__rate_interval": "10s", "$__range": "60s", "$instance": ".*", "$vm": ".*",
}  # fmt: skip
POLICY = policy(
    {
        "ingress": [
            "{name: web, action: accept, services: [tcp/8080]}",
            "{name: no, action: reject, services: [tcp/81], log: true}",
        ],
    }
)


def panels() -> list[dict[str, Any]]:
    """Return what asks for something."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Yield title and query of every panel, and the series that variables are made of."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], filled_in(target["expr"])
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            series = re.fullmatch(r"label_values\((.*), \w+\)", variable["definition"])
            assert series is not None
            yield variable["name"], filled_in(series[1])


def filled_in(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def test_panels_have_an_identity_and_do_not_overlap() -> None:
    everything = json.loads(DASHBOARD.read_text())["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in everything]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_query_has_an_answer_with_data(lab: Lab, tmp_path: Path) -> None:
    lab.write_policy(POLICY)
    lab.attach("web01", "db01")
    lab.vgw("mode", "--vm", "db01", "monitor")
    with lab.controller("--rule-metrics"), prometheus(lab, tmp_path):
        lab.apply(POLICY + "# changed\n")
        missing = dict.fromkeys(queries())

        def traffic() -> bool:
            lab.assert_reaches("tcp", "client", "web01", 8080)
            lab.assert_blocked("tcp", "client", "web01", 22)
            lab.assert_blocked("tcp", "client", "web01", 81)
            lab.assert_reaches("udp", "client", "db01", 53)
            for title, query in list(missing):
                reply = answer(lab, query)
                if reply is None:
                    return False
                assert reply["status"] == "success", (title, query, reply)
                if reply["data"]["result"]:
                    del missing[title, query]
            return not missing or {title for title, _ in missing} == {"Forgeries from VMs"}

        eventually("every query has data", traffic, timeout=40)
        wrong = answer(lab, "sum(vgw_packets_total")  # the control
        assert wrong is None or wrong["status"] != "success"
        nothing = answer(lab, "vgw_no_such_metric")
        assert nothing is not None
        assert nothing["data"]["result"] == []
