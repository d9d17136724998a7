# SPDX-License-Identifier: Apache-2.0
"""The rules for Prometheus: right to its own tool, each alert raised when due and not otherwise."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).parents[2] / "contrib/prometheus/vgw.rules.yml"
HOST = 'job="vgw",instance="host1"'
VM = f'{HOST},vm="web01",interface="tap0"'

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)


@dataclass
class Case:
    """Series that raise an alert after a time, and others that must not; labels of the alert."""

    alert: str
    after: str
    raising: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)


def dropped(reason: str, values: str, direction: str = "egress") -> dict[str, str]:
    series = f'vgw_dropped_packets_total{{{VM},direction="{direction}",reason="{reason}"}}'
    return {series: values}


def used(name: str, values: str, limit: str, more: str = "") -> dict[str, str]:
    """Return a gauge and its limit."""
    most = {"vgw_conntrack_entries": "vgw_conntrack_max_entries"}.get(name, f"{name}_max")
    return {f"{name}{{{VM}{more}}}": values, f"{most}{{{VM}}}": limit}


def generations(first: str, second: str) -> dict[str, str]:
    return {
        'vgw_policy_generation{job="vgw",instance="host1",vm="web01"}': first,
        'vgw_policy_generation{job="vgw",instance="host2",vm="web01"}': second,
    }


SCRAPED = {"job": "vgw", "instance": "host1"}
WEB = {**SCRAPED, "vm": "web01"}
TAP = {**WEB, "interface": "tap0"}
FLOOD = ',direction="ingress"'
ATTACHED = f'vgw_attached{{{VM},hook="tc",mode="tcx"}}'
ALARM = f'vgw_alarm{{{VM},alarm="detached"}}'
UP = f"up{{{HOST}}}"
MONITORED = 'vgw_packets_total{%s,direction="egress",verdict="%s"}'
LOST = 'vgw_events_lost_total{%s,cause="%s"}'
CASES = [
    Case(
        "VgwVmUnprotected", "3m", {ATTACHED: "1 0x9"}, {ATTACHED: "1x9"},
        {**TAP, "hook": "tc", "mode": "tcx"},
    ),
    Case("VgwAlarm", "3m", {ALARM: "0 1x9"}, {ALARM: "0x9"}, {**TAP, "alarm": "detached"}),
    Case("VgwControllerDown", "4m", {UP: "1 0x9"}, {UP: "1 0 1x9"}, SCRAPED),
    Case("VgwControllersMissing", "9m", {'up{job="other"}': "1x9"}, {UP: "0x9"}, {"job": "vgw"}),
    Case(
        "VgwApplyErrors", "5m", {f"vgw_policy_apply_errors_total{{{HOST}}}": "0 0 2x9"},
        {f"vgw_policy_apply_errors_total{{{HOST}}}": "7x9"}, SCRAPED,
    ),
    Case(
        "VgwGenerationDiffers", "12m", generations("7x20", "6x20"), generations("7x20", "7x20"),
        {"job": "vgw", "vm": "web01"},
    ),
    Case(
        "VgwSpoofing", "9m", dropped("SPOOF_MAC", "0+60x20"), dropped("DEFAULT", "0+60x20"),
        {**TAP, "reason": "SPOOF_MAC"},
    ),
    Case(
        "VgwConntrackNearlyFull", "9m", used("vgw_conntrack_entries", "60000x20", "65536x20"),
        used("vgw_conntrack_entries", "50000x20", "65536x20"), TAP,
    ),
    Case("VgwConntrackFull", "9m", dropped("CT_FULL", "0+1x20"), dropped("CT_RATE", "0+1x20"), TAP),
    Case(
        "VgwHalfOpenFlood", "4m", used("vgw_conntrack_half_open", "16000x20", "16384x20", FLOOD),
        used("vgw_conntrack_half_open", "100x20", "16384x20", FLOOD),
        {**TAP, "direction": "ingress"},
    ),
    Case(
        "VgwWouldDrop", "80m", {MONITORED % (VM, "would_drop"): "0+1x90"},
        {MONITORED % (VM, "accept"): "0+1x90"}, WEB,
    ),
    Case(
        "VgwEventsLost", "14m", {LOST % (HOST, "buffer"): "0+1x20"},
        {LOST % (HOST, "suppressed"): "0+1x20"},
        {**SCRAPED, "cause": "buffer"},
    ),
    Case(
        "VgwSamplesOmitted", "9m", {f"vgw_omitted_samples{{{HOST}}}": "5x20"},
        {f"vgw_omitted_samples{{{HOST}}}": "0x20"}, SCRAPED,
    ),
]  # fmt: skip


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def expectation(case: Case, series: dict[str, str], labels: list[dict[str, str]]) -> dict[str, Any]:
    """Return one test of promtool's, without what the annotations say."""
    rule = next(rule for rule in rules() if rule.get("alert") == case.alert)
    wanted = [{"exp_labels": {**rule["labels"], **each}} for each in labels]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": case.after, "alertname": case.alert, "exp_alerts": wanted}
        ],
    }


def judged(directory: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Let promtool run tests of the rules, less their annotations, which name every value."""
    bare = yaml.safe_load(RULES.read_text())
    for group in bare["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (directory / "rules.yml").write_text(json.dumps(bare))
    file = directory / "tests.yml"
    file.write_text(json.dumps({"rule_files": ["rules.yml"], "tests": tests}))
    return promtool("test", "rules", file)


def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_every_alert_has_a_case_and_says_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == {case.alert for case in CASES}
    for rule in alerts:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_alerts_are_raised_when_due_and_not_otherwise(tmp_path: Path) -> None:
    tests = [expectation(case, case.raising, [case.labels]) for case in CASES]
    tests += [expectation(case, case.quiet, []) for case in CASES]
    done = judged(tmp_path, tests)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_promtool_would_notice(case: Case, tmp_path: Path) -> None:
    """The control: what is quiet does not raise, and what raises is not quiet."""
    swapped = [expectation(case, case.quiet, [case.labels]), expectation(case, case.raising, [])]
    for number, test in enumerate(swapped):
        assert judged(tmp_path, [test]).returncode != 0, number


def test_annotations_have_values(tmp_path: Path) -> None:
    """Templates are filled in by Prometheus; a wrong one would show as an error in the text."""
    case = next(case for case in CASES if case.alert == "VgwConntrackNearlyFull")
    test = expectation(case, case.raising, [case.labels])
    test["alert_rule_test"][0]["exp_alerts"][0]["exp_annotations"] = {
        "summary": "web01 has 91.55% of its connections",
        "description": "Raise conntrack_max of tap0, or look who opens so many.",
    }
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [test]}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
