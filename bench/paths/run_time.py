# SPDX-License-Identifier: Apache-2.0
"""How long the attached programs run under the lab's load, by the kernel's own statistics.

Reading the clock is in these figures, as it is in those of a program that does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from bench.accounts import Account, read_account
from bench.cost.load import Load
from bench.cost.measures import BULK, SMALL, SMALL_BYTES
from bench.cost.systems import SYSTEMS, VGW, Setting, System
from bench.cost.vms import VMS, Vm
from bench.lab import BenchError, Lab, lab
from bench.native import build
from bench.options import Options, Progress
from bench.paths.checked import ESTABLISHED
from bench.paths.stats import require_off, run_time, run_times_on
from bench.report import Row
from scripts.lab.wire import inside
from vgw import libbpf
from vgw.abi import Path
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.libbpf import AttachType

PART: Final = "run time"
NO_OP: Final = "no-op program"
_RULES: Final = (10, 10_000)
_QUICK_RULES: Final = (10,)
_MOST_ROUNDS: Final = 3
_CLIENT: Final = "client"
#: A firewall's share of packets that may be of no open connection: handshakes.
_OTHERS: Final = 0.01
_WAYS: Final = {Path.TO_VM: "to the VM", Path.FROM_VM: "from the VM"}


class _Key(NamedTuple):
    """What tells a figure apart; `path` is that of the load and of the program."""

    system: str
    device: str
    load: str
    path: Path
    rules: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A VM of a lab and what is attached to its interface, as fds by path."""

    built: Lab
    load: Load
    vm: Vm
    system: System
    size: int
    programs: Mapping[Path, int]


def run(options: Options, progress: Progress) -> list[Row]:
    """Return ns of a run of each program, for each kind of device and load."""
    samples: dict[_Key, list[float]] = {}
    with lab(options.vgw, guest=True) as built:
        load = Load(built, build("load", built.directory))
        rounds = min(options.rounds, _MOST_ROUNDS)
        for number in range(rounds):
            for vm, system, size in _systems(quick=options.quick):
                progress(f"round {number + 1} of {rounds}: {vm.device}, {system.name}")
                setting = Setting(built, vm, options.version, size, options.shape)
                with system.in_force(setting), ExitStack() as stack:
                    programs = stack.enter_context(_attached(built, vm))
                    at = _Place(built, load, vm, system, size, programs)
                    for key, ns in _samples(at, options):
                        samples.setdefault(key, []).append(ns)
    require_off()
    return [_row(key, found) for key, found in samples.items()]


def _systems(*, quick: bool) -> Iterator[tuple[Vm, System, int]]:
    by_name = {system.name: system for system in SYSTEMS}
    for vm in VMS.values():
        yield vm, by_name[NO_OP], 0
        for size in _QUICK_RULES if quick else _RULES:
            yield vm, by_name[VGW], size


@contextmanager
def _attached(built: Lab, vm: Vm) -> Iterator[Mapping[Path, int]]:
    """Open the programs at a VM's interface."""
    with inside(f"{built.name}-host"):
        ifindex = socket.if_nametoindex(vm.interface)
        xdp = libbpf.xdp_program(ifindex)
        to_vm = libbpf.tcx_programs(ifindex, AttachType.TCX_EGRESS)
        from_vm = libbpf.tcx_programs(ifindex, AttachType.TCX_INGRESS)
    ids = {Path.TO_VM: to_vm, Path.FROM_VM: [xdp[0]] if xdp else from_vm}
    with ExitStack() as stack:
        fds = {}
        for path, found in ids.items():
            if len(found) != 1:
                raise BenchError(f"{len(found)} programs are attached to {vm.interface}, not one")
            fds[path] = libbpf.prog_fd_by_id(found[0])
            stack.callback(os.close, fds[path])
        yield fds


def _samples(at: _Place, options: Options) -> Iterator[tuple[_Key, float]]:
    """Yield the ns of a run, of each load and each way: of the program that the load meets."""
    version, seconds = options.version, options.seconds
    loads: Mapping[str, Callable[[str, str], object]] = {
        BULK: lambda one, other: at.load.stream(one, other, version, seconds, 1),
        SMALL: lambda one, other: at.load.datagrams(one, other, version, seconds, SMALL_BYTES),
    }
    for kind, send in loads.items():
        for path, program in at.programs.items():
            ends = (_CLIENT, at.vm.node)
            account, before = _account(at), run_time(program)
            with run_times_on():
                send(*(ends if path is Path.TO_VM else reversed(ends)))
            found = run_time(program).since(before)
            key = _Key(at.system.name, at.vm.device, kind, path, at.size)
            if not found.runs:
                raise BenchError(f"{key}: the program did not run, so the measurement is void")
            if account is not None:
                _check(at, account)
            yield key, found.ns / found.runs


def _account(at: _Place) -> Account | None:
    if at.system.name != VGW:
        return None
    return read_account(Host(Paths.from_environment(at.built.environment)), at.vm.node)


def _check(at: _Place, before: Account) -> None:
    """Raise BenchError unless nearly all packets since then were of open connections."""
    new = _account(at)
    after = {} if new is None else new.packets
    since = {key: packets - before.packets.get(key, 0) for key, packets in after.items()}
    passed = sum(since.get((path, *ESTABLISHED), 0) for path in Path)
    if passed < (1 - _OTHERS) * sum(since.values()):
        raise BenchError(f"{passed} of {sum(since.values())} packets were of open connections")


def _row(key: _Key, found: list[float]) -> Row:
    facts: dict[str, str | int] = {
        "device": key.device,
        "load": key.load,
        "direction": _WAYS[key.path],
    }
    facts |= {"rules": key.rules} if key.rules else {}
    return Row(PART, key.system, "ns/run", tuple(found), facts)
