# SPDX-License-Identifier: Apache-2.0
"""Which series a scrape of real endpoints has: their number and words are bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.controller.observe import send_to_vm
from tests.controller.policies import VM_ADDRESS, VM_MAC, document, interface, to_vm
from tests.controller.test_metrics import READING, FakeController
from vgw import abi
from vgw.controller import metrics
from vgw.controller.metrics import ApplyTimes, HostCollector, RuleReading
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.controller.rule_readings import RuleReadings

LABELS = {
    "vm", "interface", "direction", "verdict", "reason", "hook", "mode", "result", "cause", "le",
    "version", "abi",
}  # fmt: skip
WORDS = {
    "direction": {"ingress", "egress"},
    "verdict": {verdict.name.lower() for verdict in abi.Verdict},
    "reason": {reason.name for reason in abi.Reason},
    "hook": {"xdp", "tc"},
    "mode": {"native", "generic", "tcx", "clsact"},
    "result": {"sent", "suppressed", "failed"},
}
GROUP = """
groups: {secret-partners: {cidrs: [203.0.113.64/26]}}
"""
RULES = "[{name: secret-rule, action: accept, from: [secret-partners], services: [tcp/4711]}]"
Series = set[tuple[str, tuple[tuple[str, str], ...]]]


def series(host: Host, *, rules: bool = False) -> Series:
    """Return name and labels of every sample of a scrape."""
    collector = HostCollector(
        lambda: read_endpoints(host, RuleReadings(host.paths) if rules else None),
        dict,
        ApplyTimes(),
        rules=rules,
    )
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in collector.collect()
        for sample in family.samples
    }


@pytest.mark.bpf
def test_catalogue_N8_packets_make_no_series(host: Host, tap: Callable[[str], int]) -> None:
    tap("tap0")
    host.attach(document(), "web01")
    send_to_vm("tap0", to_vm(dport=1))
    before = series(host)

    for number in range(300):
        send_to_vm("tap0", to_vm(src=f"198.51.{number % 7}.{number % 251}", dport=1000 + number))

    assert series(host) == before
    labels = [pair for _, pairs in before for pair in pairs]
    assert {name for name, _ in labels} <= LABELS
    for name, words in WORDS.items():
        assert {value for label, value in labels if label == name} <= words


@pytest.mark.bpf
def test_catalogue_N8_series_go_with_their_vm(host: Host, tap: Callable[[str], int]) -> None:
    for number in range(2):
        tap(f"tap{number}")
    vms = {f"vm{number}": f"{{interfaces: [{{name: tap{number}}}]}}" for number in range(2)}
    bare = series(host)
    host.attach(document(vms=vms), "vm0")
    alone = series(host)
    host.attach(document(vms=vms), "vm1")
    assert series(host) > alone > bare

    host.detach("vm1")
    assert series(host) == alone
    host.detach("vm0")
    assert series(host) == bare


def test_catalogue_N8_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is counted, and rules are left out first."""
    controller = FakeController()
    many = tuple(RuleReading("ingress", "policy", f"rule{n}", 1) for n in range(500))
    controller.readings = [replace(READING, rules=many)]

    def scrape() -> dict[str, list[Any]]:
        families = list(controller.collector(rules=True).collect())
        return {family.name: list(family.samples) for family in families}

    whole = scrape()
    total = sum(len(samples) for name, samples in whole.items() if name != "vgw_omitted_samples")
    monkeypatch.setattr(metrics, "MAX_SAMPLES", total - 100)
    cut = scrape()

    assert [sample.value for sample in whole["vgw_omitted_samples"]] == [0]
    assert [sample.value for sample in cut["vgw_omitted_samples"]] == [100]
    differing = {name for name in whole if len(whole[name]) != len(cut[name])}
    assert differing == {"vgw_rule_packets"}
    assert len(cut["vgw_rule_packets"]) == 400


@pytest.mark.bpf
@pytest.mark.parametrize("rules", [False, True])
def test_catalogue_N9_no_content_of_a_policy_is_told(
    host: Host, tap: Callable[[str], int], rules: bool
) -> None:
    tap("tap0")
    policy = document(RULES, vms={"web01": interface("tap0")}, extra=GROUP)
    host.attach(policy, "web01")
    send_to_vm("tap0", to_vm(src="203.0.113.65", dport=4711))

    told = repr(series(host, rules=rules))

    for secret in ("203.0.113", "secret-partners", "4711", VM_ADDRESS, VM_MAC):
        assert secret not in told
    assert ("secret-rule" in told) == rules  # names of rules are opted in to
