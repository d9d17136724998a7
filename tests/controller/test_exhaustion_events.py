# SPDX-License-Identifier: Apache-2.0
"""Every packet of a flood is worth an event: what became of each is known, and no packet waits.

Packets that are written to a TAP have been judged when the call returns, so accounts are exact.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.accounts import Account, read_account
from bench.flood import Flood, Flooder, Sent, Side, Step, outcome, tap_target, udp_frame
from tests.controller import policies
from tests.controller.process import Controller, eventually
from vgw import libbpf
from vgw.abi import Reason, Verdict
from vgw.controller.event_reader import CAUSES
from vgw.controller.events import read_log
from vgw.controller.inventory import read_document
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.libbpf.perf import PerfReader

pytestmark = pytest.mark.bpf

VM = Side(policies.VM_MAC, policies.VM_ADDRESS, 4000)
#: Packets to the first are dropped and logged, to the second dropped alone.
LOGGED = Side(policies.PEER_MAC, policies.PEER_ADDRESS, 53)
SILENT = Side(policies.PEER_MAC, policies.PEER_ADDRESS, 54)
POLICY = f"""
schema: vgw/v1
vms:
  web01: {policies.interface("tap0")}
policies:
  - name: out
    tier: vm
    applies_to: {{all: true}}
    egress:
      - {{name: logged, action: drop, services: [udp/53], log: true}}
      - {{name: silent, action: drop, services: [udp/54]}}
"""
PACKETS = 100_000
Tap = Callable[[str], int]


class Running:
    """A controller that protects web01, the VM's end of its TAP, and what was counted at first."""

    def __init__(self, paths: Paths, vm: int) -> None:
        paths.policy.write_text(POLICY)
        self.paths = paths
        self.host = Host(paths)
        self.vm = vm
        self.controller = Controller(paths, 9477)
        self.before = self.account()

    def account(self) -> Account:
        return read_account(self.host, "web01")

    def flood(self, peer: Side = LOGGED, packets: int = PACKETS) -> Flood:
        """Return a flood of equal packets of the VM."""
        step = Step(tap_target(self.vm), "neither", udp_frame(VM, peer))
        return Flood((step,), packets, 60)

    def logged(self) -> list[dict[str, Any]]:
        """Return the records of packets that the rule dropped."""
        drops = (found for found in read_log(self.paths.log_file) if found["event"] == "drop")
        return [found for found in drops if found.get("rule") == "logged"]

    def reported(self) -> dict[str, int]:
        """Return the losses of web01 that the log tells of, by cause."""
        found: dict[str, int] = {}
        for record in self.controller.records("lost"):
            if record.get("vm") == "web01":
                found[record["cause"]] = found.get(record["cause"], 0) + record["count"]
        return found

    def metrics(self) -> dict[str, float]:
        """Return what the exporter says of events."""
        lost = "vgw_events_lost_total"
        found = {c: self.controller.metric(f'{lost}{{cause="{c}"}}') for c in CAUSES}
        return found | {"sent": self.controller.metric("vgw_events_total{")}


@pytest.fixture
def running(paths: Paths, tap: Tap) -> Iterator[Running]:
    """web01 on tap0, protected by a controller."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    made = Running(paths, tap("tap0"))
    yield made
    if made.controller.process.poll() is None:
        made.controller.end(signal.SIGKILL)
    with contextlib.suppress(VgwError):
        Host(paths).detach_all()


def check_account(running: Running, sent: int) -> Account:
    """Check that each packet of a flood was dropped by the rule and is in the account of events."""
    after, before = running.account(), running.before
    assert after.by_reason(before, Verdict.DROP)[Reason.RULE] == sent
    assert after.events(before) == sent
    return after


def test_catalogue_L9_each_packet_of_a_log_flood_is_accounted_for(
    running: Running, flooder: Flooder
) -> None:
    sent = flooder.run(running.flood()).sent
    after = check_account(running, sent)
    eventually("all that was sent is logged", lambda: len(running.logged()) >= after.sent)
    metrics = running.metrics()
    running.controller.end()

    assert after.suppressed > 0
    assert metrics == {
        **dict.fromkeys(CAUSES, 0),
        "sent": after.sent,
        "suppressed": after.suppressed,
        "buffer": after.lost,
    }
    assert len(running.logged()) == after.sent
    lost = running.reported()
    assert len(running.logged()) + lost.get("suppressed", 0) + lost.get("buffer", 0) == sent


def test_catalogue_L9_without_log_nothing_is_due(running: Running, flooder: Flooder) -> None:
    """The control: what the account counts comes from the rule's log."""
    flooder.run(running.flood(SILENT))

    assert running.account().events(running.before) == 0


def test_catalogue_L9_the_controller_stays_small(running: Running, flooder: Flooder) -> None:
    flooder.run(running.flood())
    small = running.controller.memory_mb()
    for _ in range(3):
        flooder.run(running.flood(packets=10 * PACKETS))

    assert running.controller.memory_mb() < small + 10


def test_catalogue_L10_both_signals_of_a_full_buffer_agree(
    host: Host, paths: Paths, tap: Tap, flooder: Flooder
) -> None:
    """Nobody empties a buffer of one page: the program's count and the reader's are the same."""
    vm = tap("tap0")
    paths.policy.write_text(POLICY)
    host.attach(read_document(paths), "web01")
    taken, gaps = [], []
    fd = libbpf.get_pinned(paths.events)
    with PerfReader(fd, lambda _, data: taken.append(data), lambda _, n: gaps.append(n), 1) as each:
        os.close(fd)
        before = read_account(host, "web01")
        step = Step(tap_target(vm), "neither", udp_frame(VM, LOGGED))
        # One CPU has one buffer; and less than a second's budget, so that none is suppressed.
        with flooder.running(Flood((step,), 400, 60), cpu=0) as process:
            outcome(process)
        each.consume()
        full = read_account(host, "web01")
        with flooder.running(Flood((step,), 1, 60), cpu=0) as process:
            outcome(process)  # the kernel tells of a gap with the next record
        each.consume()
    after = read_account(host, "web01")

    assert after.suppressed == before.suppressed
    assert full.lost == after.lost > 0
    assert sum(gaps) == after.lost - before.lost
    assert len(taken) == after.sent - before.sent
    assert len(taken) + sum(gaps) == 401


def test_catalogue_L11_a_controller_that_stops_reading_blocks_nothing(
    running: Running, flooder: Flooder
) -> None:
    """Seconds of budget pass unread until the buffers are full; then it reads on."""
    process = running.controller.process
    process.send_signal(signal.SIGSTOP)
    floods: list[Sent] = []

    def is_full() -> bool:
        floods.append(flooder.run(running.flood()))
        return running.account().lost > running.before.lost

    eventually("the buffers are full", is_full)
    stopped = check_account(running, sum(flood.sent for flood in floods))
    process.send_signal(signal.SIGCONT)
    eventually("what waited is logged", lambda: len(running.logged()) >= stopped.sent)
    # What comes later is logged as if nothing had been; the budget may be used up for a second.
    eventually("a new event is logged", lambda: log_another(running, stopped))
    running.controller.end()
    after = running.account()

    assert len(running.logged()) == after.sent
    assert running.reported() == {"suppressed": after.suppressed, "buffer": after.lost}
    reports = [r for r in running.controller.records("lost") if r["cause"] == "buffer"]
    assert [r["count"] for r in reports] == [after.lost]
    assert len({(r["ts"], r["dport"]) for r in running.logged()}) > after.sent // 2


def log_another(running: Running, before: Account) -> bool:
    """Send one more packet that is to be logged and tell whether one has been by now."""
    os.write(running.vm, udp_frame(VM, LOGGED))
    return len(running.logged()) > before.sent
