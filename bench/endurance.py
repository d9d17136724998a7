# SPDX-License-Identifier: Apache-2.0
"""The part `endurance`: numbered packets while controllers are killed, restarted and upgraded.

What a start does with the programs is not for this to say: it counts which were replaced, and
whether a packet was lost or let through meanwhile.
"""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench.controllers import controller, other_build, start
from bench.lab import CLIENT_ADDRESSES, VM, VM_ADDRESSES, VM_MAC, BenchError, Lab
from bench.lab import lab as build_lab
from bench.native import build
from bench.options import Progress
from bench.report import Row
from scripts.lab.wire import inside
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.parse import parse_sources

PART: Final = "endurance"
_ALLOWED: Final = 5001
_PATIENCE: Final = 60.0
#: The latest moment of a controller's life at which it is killed, in seconds from its start.
_LATEST_KILL: Final = 2.0
_POLICY: Final = f"""
schema: vgw/v1
vms:
  {VM}:
    interfaces:
      - {{name: veth-vm, mac: '{VM_MAC}', addresses: [{VM_ADDRESSES[4]}]}}
policies:
  - name: streams
    tier: vm
    applies_to: {{all: true}}
    ingress:
      - {{name: in, action: accept, services: [udp/{_ALLOWED}]}}
    egress:
      - {{name: out, action: accept, services: [udp/{_ALLOWED}]}}
defaults: {{ingress: drop, egress: drop}}
"""


@dataclass(frozen=True, slots=True)
class Ordeal:
    """How much of everything there is; at least `packets`, about `rate` of them a second."""

    packets: int
    rate: int
    kills: int
    restarts: int
    upgrades: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the numbered packets so far; `slowest` in microseconds, of a batch."""

    sent: int
    lost: int
    reordered: int
    denied: int
    passed: int
    slowest: int


class Stream:
    """The numbered packets, on their way during a `with` block."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._latest = Counts(0, 0, 0, 0, 0, 0)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            with self._changed:
                self._latest = Counts(*map(int, line.split()))
                self._changed.notify_all()

    def await_packets(self, packets: int, progress: Progress) -> None:
        """Wait until so many were sent. Raises BenchError when no more are."""
        with self._changed:
            while (sent := self._latest.sent) < packets:
                progress(f"{sent} of {packets} packets")
                if not self._changed.wait(_PATIENCE):
                    raise BenchError("no packets are sent any more")

    def end(self) -> Counts:
        """Send no more and return what became of all."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._thread.join(_PATIENCE)
        if self._process.wait(_PATIENCE) != 0:
            raise BenchError("the program that sends numbered packets failed")
        return self._latest


@contextmanager
def stream(lab: Lab, rate: int) -> Iterator[Stream]:
    """Send numbered packets between the client and the VM, both ways."""
    ends = ((f"{lab.name}-client", CLIENT_ADDRESSES[4]), (f"{lab.name}-vm", VM_ADDRESSES[4]))
    words = [word for name, address in ends for word in (f"/run/netns/{name}", address)]
    with subprocess.Popen(
        [str(build("sequence", lab.directory)), *words, str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Stream(process)
        finally:
            process.kill()


def run_endurance(ordeal: Ordeal, progress: Progress) -> list[Row]:
    """Let controllers end in every way under traffic and return what it cost."""
    with build_lab() as lab:
        lab.write_policy(_POLICY)
        with inside(f"{lab.name}-host"):
            host = Host(Paths.from_environment(lab.environment))
            host.attach(parse_sources([("policy.yaml", _POLICY)]), VM)
        began = time.monotonic()
        with stream(lab, ordeal.rate) as packets:
            packets.await_packets(1, progress)
            lost_programs = _kill(lab, host, ordeal.kills, progress)
            lost_programs += _restart(lab, host, ordeal.restarts, progress)
            replaced = _upgrade(lab, host, ordeal.upgrades, progress)
            packets.await_packets(ordeal.packets, progress)
            counts = packets.end()
        seconds = time.monotonic() - began
        with inside(f"{lab.name}-host"):
            host.detach_all()
    figures: Mapping[str, tuple[str, float]] = {
        "packets sent": ("packets", counts.sent),
        "packets lost": ("packets", counts.lost),
        "packets out of order": ("packets", counts.reordered),
        "packets that policy denies": ("packets", counts.denied),
        "of these passed": ("packets", counts.passed),
        "slowest batch": ("ms", counts.slowest / 1000),
        "kills": ("controllers", ordeal.kills),
        "restarts": ("controllers", ordeal.restarts),
        "upgrades": ("controllers", ordeal.upgrades),
        "programs replaced by kills and restarts": ("programs", lost_programs),
        "programs replaced by upgrades": ("programs", replaced),
        "all of it": ("s", seconds),
    }
    return [Row(PART, what, unit, (value,)) for what, (unit, value) in figures.items()]


def _kill(lab: Lab, host: Host, kills: int, progress: Progress) -> int:
    """Kill controllers at any moment from their start on; return how many programs are others."""
    before = _programs(lab, host)
    chance = random.Random(kills)  # noqa: S311 - no secret
    for number in range(kills):
        progress(f"kill {number + 1} of {kills}")
        process = start(lab)
        time.sleep(chance.uniform(0, _LATEST_KILL))
        process.kill()
        process.wait(_PATIENCE)
    return len(before - _programs(lab, host))


def _restart(lab: Lab, host: Host, restarts: int, progress: Progress) -> int:
    """Start controllers and end them when they are ready; return as `_kill` does."""
    before = _programs(lab, host)
    for number in range(restarts):
        progress(f"restart {number + 1} of {restarts}")
        with controller(lab) as running:
            running.end(signal.SIGTERM)
    return len(before - _programs(lab, host))


def _upgrade(lab: Lab, host: Host, upgrades: int, progress: Progress) -> int:
    """Start controllers of other builds, one after the other; return how many programs changed."""
    replaced = 0
    for number in range(1, upgrades + 1):
        progress(f"upgrade {number} of {upgrades}")
        before = _programs(lab, host)
        with controller(lab, other_build(lab, number)) as running:
            running.end(signal.SIGTERM)
        replaced += len(before - _programs(lab, host))
    return replaced


def _programs(lab: Lab, host: Host) -> set[int]:
    """Return the ids of the programs on the VM's interface. Raises BenchError when one is off."""
    with inside(f"{lab.name}-host"):
        (row,) = host.status(VM)["vms"]
    attachments = [
        interface[path] for interface in row["interfaces"] for path in ("from_vm", "to_vm")
    ]
    if not attachments or None in attachments:
        raise BenchError(f"a program is not attached any more: {row}")
    return {attachment["prog_id"] for attachment in attachments}
