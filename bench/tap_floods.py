# SPDX-License-Identifier: Apache-2.0
"""The parts `log`, `expiry` and `leftovers`, where this process is the VM behind a TAP, or nobody.

What is written to a TAP has been judged when the call returns, so all accounts are exact.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from bench.accounts import Account, read_account
from bench.expiry_race import LIMITS, Ends, run_race
from bench.flood import Flood, Flooder, Side, Step, packet_target, tap_target, udp_frame
from bench.lab import CLIENT_MAC, CONNTRACK_MAX, VM_ADDRESSES, VM_MAC, BenchError, Lab
from bench.lab import lab as build_lab
from bench.leftovers import WARM_UP, Cycles
from bench.native import build
from bench.options import Progress
from bench.report import Row, ratio
from bench.scale import Scale
from scripts.lab.tap_guest import open_tap
from scripts.lab.wire import inside
from vgw.controller.events import read_log
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

LOG_PART: Final = "log"
EXPIRY_PART: Final = "expiry"
LEFTOVERS_PART: Final = "leftovers"
_VM, _TAP = "vm", "tap-vm"
_PATIENCE: Final = 30.0
_RACE_SECONDS: Final = 3000.0
#: Packets to the one port are dropped and logged, to the other dropped alone.
_LOGGED, _SILENT = 53, 54
_POLICY: Final = f"""
schema: vgw/v1
vms:
  {_VM}:
    interfaces:
      - {{name: {_TAP}, mac: '{VM_MAC}', addresses: [{VM_ADDRESSES[4]}],
         conntrack_max: {CONNTRACK_MAX}}}
    {LIMITS.key()}
policies:
  - name: out
    tier: vm
    applies_to: {{all: true}}
    egress:
      - {{name: logged, action: drop, services: [udp/{_LOGGED}], log: true}}
      - {{name: silent, action: drop, services: [udp/{_SILENT}]}}
defaults: {{ingress: accept, egress: accept}}
"""


@dataclass(frozen=True, slots=True)
class _Host:
    """A host in a namespace that the calling thread is in; `vm` is the other end of its TAP."""

    lab: Lab
    host: Host
    flooder: Flooder
    document: PolicyDocument
    vm: int


@contextmanager
def _host(*, tap: bool = True) -> Iterator[_Host]:
    """Build a host; with a VM behind a TAP, which is not yet attached."""
    with build_lab() as lab, inside(f"{lab.name}-host"):
        host = Host(Paths.from_environment(lab.environment))
        flooder = Flooder(build("flood", lab.directory))
        document = parse_sources([("policy.yaml", _POLICY)])
        vm = open_tap(_TAP, None, offload=False) if tap else -1
        try:
            yield _Host(lab, host, flooder, document, vm)
        finally:
            host.detach_all()
            if tap:
                os.close(vm)


# --- the part log ---------------------------------------------------------------------------------


def run_log(scale: Scale, progress: Progress) -> list[Row]:
    """Return the rate of packets that are dropped, with a log and without, and their account."""
    rates: dict[int, list[float]] = {_SILENT: [], _LOGGED: []}
    with _host() as at:
        at.host.attach(at.document, _VM)
        with _controller(at):
            before = read_account(at.host, _VM)
            sent = 0
            for number in range(scale.rounds):
                progress(f"round {number + 1} of {scale.rounds}")
                for port, found in rates.items():
                    done = at.flooder.run(_datagrams(at, port, scale.sample))
                    found.append(done.rate)
                    sent += done.sent if port == _LOGGED else 0
            after = read_account(at.host, _VM)
            progress("waiting for the log")
            received = _await_records(at, after)
    silent, logged = (tuple(rates[port]) for port in (_SILENT, _LOGGED))
    quotient = ratio(logged, silent)
    ratios = {} if quotient is None else {"no log": quotient}
    suppressed, lost = after.suppressed - before.suppressed, after.lost - before.lost
    account = (
        ("sent", sent),
        ("received: in the log", received),
        ("suppressed: over the budget", suppressed),
        ("lost: no room in the buffer", lost),
        ("difference", sent - received - suppressed - lost),
    )
    return [
        Row(LOG_PART, "no log", "packets/s", silent),
        Row(LOG_PART, "log", "packets/s", logged, {}, ratios),
        *(Row(LOG_PART, f"packets {what}", "packets", (count,)) for what, count in account),
    ]


def _datagrams(at: _Host, port: int, seconds: float) -> Flood:
    near = Side(VM_MAC, VM_ADDRESSES[4], 4000)
    far = Side(CLIENT_MAC, "192.0.2.7", port)
    step = Step(tap_target(at.vm), "neither", udp_frame(near, far))
    return Flood((step,), 10**12, seconds)


@contextmanager
def _controller(at: _Host) -> Iterator[None]:
    """Run a controller, which reads events."""
    at.lab.write_policy(_POLICY)
    process = subprocess.Popen(
        [at.lab.vgw_command, "controller", "--listen", "127.0.0.1:0"],
        env=at.lab.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait("the controller has not started", at.host.paths.socket.exists, process)
        yield
    finally:
        process.terminate()
        process.wait(timeout=_PATIENCE)


def _await_records(at: _Host, after: Account) -> int:
    """Wait until all events that were sent are in the log and return how many are."""
    found = 0

    def is_there() -> bool:
        nonlocal found
        records = read_log(at.host.paths.log_file, _VM)
        found = sum(record.get("rule") == "logged" for record in records)
        return found >= after.sent

    _wait("events that were sent are not in the log", is_there)
    return found


# --- the part expiry ------------------------------------------------------------------------------


def run_expiry(scale: Scale, progress: Progress) -> list[Row]:
    """Let connections come and go beside live ones and return how many of these were cut."""
    with _host() as at:
        at.host.attach(at.document, _VM)
        ends = Ends(
            packet_target(_TAP),
            tap_target(at.vm),
            Side(CLIENT_MAC, "10.50.0.0", 1),
            Side(VM_MAC, VM_ADDRESSES[4], 80),
        )
        progress(f"{scale.connections} connections come and go")
        race = run_race(
            at.flooder, at.host, _VM, ends, scale.live, scale.connections, _RACE_SECONDS
        )
        after = read_account(at.host, _VM)
    figures = (
        ("connections sent", "connections", race.rounds),
        ("connections opened", "connections", race.opened),
        ("connections opened and closed", "connections/s", race.opened / race.seconds),
        ("dead flows removed by user space", "flows", race.reaped),
        ("flows at the end", "flows", after.entries),
        ("live connections", "connections", race.live),
        ("exchanges of each live connection", "exchanges", race.exchanges),
    )
    rows = [Row(EXPIRY_PART, what, unit, (value,)) for what, unit, value in figures]
    cut = Row(EXPIRY_PART, "live connections cut", "connections", (len(race.cut),))
    return [*rows, replace(cut, note="; ".join(race.cut[:2]))]


# --- the part leftovers ---------------------------------------------------------------------------


def run_leftovers(scale: Scale, progress: Progress) -> list[Row]:
    """Let interfaces come and go under protection and return what stays of them."""
    with _host(tap=False) as at:
        cycles = Cycles(at.host, parse_sources([("policy.yaml", _together(scale.together))]))
        cycles.run(WARM_UP * scale.together)
        before = cycles.traces()
        started = time.monotonic()
        cycles.run(scale.cycles, lambda number: progress(f"{number} of {scale.cycles} cycles"))
        seconds = time.monotonic() - started
        after = cycles.traces()
    kept = {
        "programs": after.programs,
        "maps": after.maps,
        "pins": after.pins,
        "files of state": after.files,
        "descriptors": after.descriptors - before.descriptors,
        "objects of Python": after.objects - before.objects,
        "blocks of Python": after.blocks - before.blocks,
        "KiB in use of malloc": after.malloc_kib - before.malloc_kib,
        "KiB of resident memory": after.resident_kib - before.resident_kib,
    }
    return [
        Row(LEFTOVERS_PART, "cycles", "cycles", (scale.cycles,)),
        Row(LEFTOVERS_PART, "a cycle", "ms", (seconds / scale.cycles * 1e3,)),
        *(Row(LEFTOVERS_PART, f"left: {what}", what, (n,)) for what, n in kept.items()),
    ]


def _together(interfaces: int) -> str:
    """Return a policy for VMs with an interface each, which come and go at the same time."""
    vms = "".join(
        f"  vm{number}: {{interfaces: [{{name: left{number}, conntrack_max: 4096}}]}}\n"
        for number in range(interfaces)
    )
    return f"schema: vgw/v1\nvms:\n{vms}policies:{_POLICY.partition('policies:')[2]}"


def _wait(
    what: str, holds: Callable[[], bool], process: subprocess.Popen[bytes] | None = None
) -> None:
    """Return as soon as it holds. Raises BenchError when it does not in time."""
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise BenchError(what)
        time.sleep(0.05)
