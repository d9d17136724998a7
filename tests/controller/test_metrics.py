# SPDX-License-Identifier: Apache-2.0
"""What a scrape shows, and that Prometheus' own tool finds nothing wrong with it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.patience import PATIENCE
from vgw import __version__
from vgw.abi import ABI_VERSION, Path, Reason, Verdict
from vgw.controller.alarms import Alarm
from vgw.controller.metrics import (
    ApplyTimes,
    EndpointReading,
    HostCollector,
    RuleReading,
)
from vgw.controller.metrics_server import MetricsServer
from vgw.errors import VgwError
from vgw.maps import Counter
from vgw.policy.model import Direction

READING = EndpointReading(
    vm="web01",
    interface="tap-web01",
    generation=3,
    attached=True,
    hook="xdp",
    mode="native",
    vm_mode="enforce",
    stats={
        (Path.TO_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED): Counter(10, 1000),
        (Path.TO_VM, Verdict.ACCEPT, Reason.RULE): Counter(1, 60),
        (Path.TO_VM, Verdict.DROP, Reason.DEFAULT): Counter(4, 240),
        (Path.TO_VM, Verdict.DROP, Reason.RULE): Counter(2, 120),
        (Path.TO_VM, Verdict.REJECT, Reason.RULE): Counter(3, 180),
        (Path.FROM_VM, Verdict.WOULD_DROP, Reason.SPOOF_MAC): Counter(5, 300),
    },
    conntrack_entries=7,
    conntrack_max=65536,
    half_open={Direction.INGRESS: 3, Direction.EGRESS: 2},
    half_open_max=16384,
    new_connections={Direction.INGRESS: 6, Direction.EGRESS: 1},
    events=9,
    reject_answers={"sent": 2, "suppressed": 1, "failed": 0},
    rules=(RuleReading("ingress", "web-tier", "site", 1),),
)
WHERE = 'interface="tap-web01"'


class FakeController:
    """Has whatever endpoints a test gives it."""

    def __init__(self) -> None:
        self.readings = [READING]
        self.losses = {"suppressed": 5, "buffer": 4, "reader": 3, "malformed": 2}
        self.applies = ApplyTimes()
        self.alarms: list[Alarm] = []

    def collector(self, *, rules: bool = False) -> HostCollector:
        return HostCollector(
            lambda: self.readings,
            lambda: self.losses,
            self.applies,
            alarms=lambda: self.alarms,
            rules=rules,
        )


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def server(controller: FakeController) -> Iterator[MetricsServer]:
    server = MetricsServer(("127.0.0.1", 0), controller.collector())
    yield server
    server.close()


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.port}/metrics", timeout=PATIENCE
    ) as answer:
        text: str = answer.read().decode()
    return text


def samples(server: MetricsServer) -> set[str]:
    return {line for line in scrape(server).splitlines() if not line.startswith("#")}


def of_endpoint(name: str, more: str, value: int) -> str:
    labels = sorted(filter(None, (WHERE, 'vm="web01"', *more.split(","))))
    return f"{name}{{{','.join(labels)}}} {float(value)}"


def test_every_sample_of_an_endpoint(server: MetricsServer) -> None:
    def packets(direction: str, verdict: str, packets: int, octets: int) -> set[str]:
        labels = f'direction="{direction}",verdict="{verdict}"'
        return {
            of_endpoint("vgw_packets_total", labels, packets),
            of_endpoint("vgw_bytes_total", labels, octets),
        }

    dropped = "vgw_dropped_packets_total"
    created = "vgw_new_connections_total"
    expected = {
        *packets("ingress", "accept", 11, 1060),
        *packets("ingress", "drop", 6, 360),
        *packets("ingress", "reject", 3, 180),
        *packets("egress", "accept", 0, 0),
        *packets("egress", "drop", 0, 0),
        *packets("egress", "would_drop", 5, 300),
        of_endpoint(dropped, 'direction="ingress",reason="DEFAULT"', 4),
        of_endpoint(dropped, 'direction="ingress",reason="RULE"', 5),
        of_endpoint("vgw_conntrack_entries", "", 7),
        of_endpoint("vgw_conntrack_max_entries", "", 65536),
        of_endpoint("vgw_conntrack_half_open", 'direction="ingress"', 3),
        of_endpoint("vgw_conntrack_half_open", 'direction="egress"', 2),
        of_endpoint("vgw_conntrack_half_open_max", "", 16384),
        of_endpoint("vgw_reject_answers_total", 'result="sent"', 2),
        of_endpoint("vgw_reject_answers_total", 'result="suppressed"', 1),
        of_endpoint("vgw_reject_answers_total", 'result="failed"', 0),
        of_endpoint(created, 'direction="ingress"', 6),
        of_endpoint(created, 'direction="egress"', 1),
        of_endpoint("vgw_events_total", "", 9),
        of_endpoint("vgw_reject_answers_total", 'result="sent"', 2),
        of_endpoint("vgw_reject_answers_total", 'result="suppressed"', 1),
        of_endpoint("vgw_reject_answers_total", 'result="failed"', 0),
        of_endpoint("vgw_attached", 'hook="xdp",mode="native"', 1),
        'vgw_policy_generation{vm="web01"} 3.0',
    }

    assert {line for line in samples(server) if "web01" in line} == expected


def test_samples_of_the_host(server: MetricsServer, controller: FakeController) -> None:
    controller.applies.record(0.02)
    controller.applies.record(0.3, failures=2)
    controller.applies.record(99)

    found = {line for line in samples(server) if "web01" not in line}

    assert {line for line in found if "_bucket" not in line} == {
        'vgw_events_lost_total{cause="suppressed"} 5.0',
        'vgw_events_lost_total{cause="buffer"} 4.0',
        'vgw_events_lost_total{cause="reader"} 3.0',
        'vgw_events_lost_total{cause="malformed"} 2.0',
        "vgw_policy_apply_seconds_count 3.0",
        "vgw_policy_apply_seconds_sum 99.32",
        "vgw_policy_apply_errors_total 2.0",
        "vgw_omitted_samples 0.0",
        f'vgw_build_info{{abi="{ABI_VERSION}",version="{__version__}"}} 1.0',
    }
    assert {
        'vgw_policy_apply_seconds_bucket{le="0.01"} 0.0',
        'vgw_policy_apply_seconds_bucket{le="0.025"} 1.0',
        'vgw_policy_apply_seconds_bucket{le="0.5"} 2.0',
        'vgw_policy_apply_seconds_bucket{le="10.0"} 2.0',
        'vgw_policy_apply_seconds_bucket{le="+Inf"} 3.0',
    } <= found


def test_series_of_a_vm_go_with_it(server: MetricsServer, controller: FakeController) -> None:
    controller.readings = []

    assert not [line for line in samples(server) if "web01" in line]


def test_one_generation_for_a_vm_with_two_interfaces(
    server: MetricsServer, controller: FakeController
) -> None:
    controller.readings = [READING, replace(READING, interface="tap1", attached=False)]

    found = samples(server)

    assert 'vgw_policy_generation{vm="web01"} 3.0' in found
    assert 'vgw_attached{hook="xdp",interface="tap1",mode="native",vm="web01"} 0.0' in found


def test_rules_have_series_only_when_asked_for(controller: FakeController) -> None:
    def names(rules: bool) -> list[str]:
        families = controller.collector(rules=rules).collect()
        return [sample.name for family in families for sample in family.samples]

    assert "vgw_rule_packets_total" not in names(rules=False)
    assert names(rules=True).count("vgw_rule_packets_total") == 1


def test_label_values_are_escaped(server: MetricsServer, controller: FakeController) -> None:
    controller.readings = [replace(READING, vm='a"b\\c\nd')]

    assert 'vgw_policy_generation{vm="a\\"b\\\\c\\nd"} 3.0' in samples(server)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_finds_nothing(controller: FakeController) -> None:
    controller.applies.record(0.1)
    server = MetricsServer(("127.0.0.1", 0), controller.collector(rules=True))
    try:
        text = scrape(server)
    finally:
        server.close()

    check = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_scrape_of_a_thousand_endpoints_is_quick(
    server: MetricsServer, controller: FakeController
) -> None:
    controller.readings = [replace(READING, vm=f"vm{n}", interface=f"tap{n}") for n in range(1000)]
    begin = time.process_time()

    text = scrape(server)

    assert time.process_time() - begin < 5
    assert text.count("vgw_conntrack_entries{") == 1000


def test_address_in_use(server: MetricsServer, controller: FakeController) -> None:
    with pytest.raises(VgwError, match=rf"127.0.0.1 port {server.port}: .* in use; .*--listen"):
        MetricsServer(("127.0.0.1", server.port), controller.collector())


def test_serves_only_the_address_it_was_given(server: MetricsServer) -> None:
    with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(("127.0.0.2", server.port))


def test_each_alarm_that_stands_is_a_sample(
    server: MetricsServer, controller: FakeController
) -> None:
    assert not [line for line in samples(server) if line.startswith("vgw_alarm")]
    controller.alarms = [
        Alarm("detached", "web01", "tap0", "why", 5),
        Alarm("x", None, None, "", 5),
    ]
    assert {line for line in samples(server) if line.startswith("vgw_alarm")} == {
        'vgw_alarm{alarm="detached",interface="tap0",vm="web01"} 1.0',
        'vgw_alarm{alarm="x",interface="",vm=""} 1.0',
    }
