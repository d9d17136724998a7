# SPDX-License-Identifier: Apache-2.0
"""A flood of packets from a VM that a rule denies: how many a second one processor gets rid of.

vgw has its largest set of rules in force, of which the last but two denies the flood. Beside it
stand the least that can be done at each hook: a program that drops everything, and nftables with
one rule. What is written to a TAP or sent out of a veth is judged within the sender's call, so
the sender's rate is that of the drops.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from bench.accounts import read_account
from bench.controllers import controller
from bench.cost.rules import DENIED_PORT, measured_rules
from bench.cost.vms import VMS, Vm
from bench.flood import Flood, Flooder, Side, Step, packet_target, tap_target, udp_frame
from bench.lab import CLIENT_ADDRESSES, CLIENT_MAC, BenchError, Lab, lab
from bench.native import build
from bench.options import Options, Progress
from bench.policy_text import policy_text
from bench.report import Row, ratio
from scripts.lab.tap_guest import open_tap
from scripts.lab.wire import inside
from vgw import libbpf
from vgw.abi import Path, Reason, Verdict
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.libbpf import XDP_NATIVE, AttachType, ProgType
from vgw.policy.model import Direction

PART: Final = "denied"
#: Of the VM behind a TAP, which is opened by this process: what it writes is what the VM sends.
_TAP: Final = Vm("tap", "guest", "tap-flood")
_VMS: Final = (VMS["veth"], _TAP)
_RULES: Final = 10_000
_QUICK_RULES: Final = 100
_SENDER_PORT: Final = 4_000
_XDP_DROP, _TC_SHOT = 1, 2
#: vgw, once its controller has noticed the flood; there are shields on a TAP only.
_SHIELDED: Final = "vgw, noticed"
_PATIENCE: Final = 30.0


@dataclass(frozen=True, slots=True)
class _At:
    """A VM of a lab that is going to flood, and the rules that are to stop it.

    `target` is where its frames are put in.
    """

    lab: Lab
    vm: Vm
    size: int
    shape: str
    flooder: Flooder
    target: str


@contextmanager
def _program(at: _At, kind: ProgType, verdict: int, hook: AttachType, flags: int) -> Iterator[str]:
    """Have a program that returns one verdict for all packets from the VM."""
    with ExitStack() as stack:
        code = bytes.fromhex(f"b7000000{verdict:02x}000000 9500000000000000")
        program = libbpf.prog_load(kind, "vgw_bench_drop", code)
        stack.callback(os.close, program)
        with inside(f"{at.lab.name}-host"):
            ifindex = socket.if_nametoindex(at.vm.interface)
            link = libbpf.link_create(program, ifindex, hook, flags)
        stack.callback(os.close, link)
        yield ""


def _xdp_drop(at: _At) -> Iterator[str]:
    with _program(at, ProgType.XDP, _XDP_DROP, AttachType.XDP, XDP_NATIVE) as note:
        yield note


def _tc_drop(at: _At) -> Iterator[str]:
    with _program(at, ProgType.SCHED_CLS, _TC_SHOT, AttachType.TCX_INGRESS, 0) as note:
        yield note


def _nft_ingress(at: _At) -> Iterator[str]:
    hook = f"type filter hook ingress device {at.vm.interface} priority 0; policy accept;"
    rule = f"udp dport {DENIED_PORT} drop"
    at.lab.nft(f"table netdev vgw_bench {{\nchain from_vm {{\n{hook}\n{rule}\n}}\n}}\n")
    try:
        yield ""
    finally:
        at.lab.nft("delete table netdev vgw_bench\n")


def _vgw(hook: str) -> Callable[[_At], Iterator[str]]:
    def protect(at: _At) -> Iterator[str]:
        rules = measured_rules(at.size, at.shape, 4, at.vm)
        at.lab.write_policy(policy_text(rules, at.vm.endpoint, Direction.EGRESS))
        attach = at.lab.vgw("attach", "--vm", at.vm.node, "--hook", hook)
        try:
            if attach.returncode != 0:
                raise BenchError(attach.stderr.strip())
            yield f"{at.size} rules"
        finally:
            at.lab.vgw("detach", "--all")

    return protect


def _shielded(at: _At) -> Iterator[str]:
    """Have a controller, and flood until it has met that."""
    for note in _vgw("auto")(at):
        with controller(at.lab), inside(f"{at.lab.name}-host"):
            ifindex = socket.if_nametoindex(at.vm.interface)
            process = at.flooder.running(_flood_of(at, _PATIENCE))
            deadline = time.monotonic() + _PATIENCE
            with process:
                while libbpf.xdp_program(ifindex) is None:
                    if time.monotonic() > deadline:
                        raise BenchError("the flood was not met at XDP")
                    time.sleep(0.05)
            yield note


_SYSTEMS: Final[Mapping[str, Callable[[_At], Iterator[str]]]] = {
    "nft netdev ingress": _nft_ingress,
    "XDP drop": _xdp_drop,
    "tc drop": _tc_drop,
    "vgw": _vgw("auto"),
    "vgw --hook xdp": _vgw("xdp"),
    _SHIELDED: _shielded,
}
#: What the others are divided by.
_BASES: Final = ("nft netdev ingress", "XDP drop")


def run(options: Options, progress: Progress) -> list[Row]:
    """Return drops a second of each system for each kind of device."""
    size = _QUICK_RULES if options.quick else _RULES
    samples: dict[tuple[str, str], list[float]] = {}
    notes: dict[tuple[str, str], str] = {}
    with lab(options.vgw) as built, ExitStack() as stack:
        flooder = Flooder(build("flood", built.directory))
        with inside(f"{built.name}-host"):
            tap = open_tap(_TAP.interface, None, offload=False)
        stack.callback(os.close, tap)
        targets = {
            "veth": packet_target("eth0", f"{built.name}-vm"),
            "tap": tap_target(tap),
        }
        for number in range(options.rounds):
            for vm in _VMS:
                at = _At(built, vm, size, options.shape, flooder, targets[vm.device])
                for name, protect in _SYSTEMS.items():
                    if name == _SHIELDED and vm is not _TAP:
                        continue
                    progress(f"round {number + 1} of {options.rounds}: {vm.device}, {name}")
                    with contextmanager(protect)(at) as note:
                        notes[vm.device, name] = note
                        rate = _rate(at, options.seconds, name)
                    samples.setdefault((vm.device, name), []).append(rate)
    return [_row(key, found, samples, notes[key]) for key, found in samples.items()]


def _flood_of(at: _At, seconds: float) -> Flood:
    near = Side(at.vm.mac, at.vm.addresses[4], _SENDER_PORT)
    far = Side(CLIENT_MAC, CLIENT_ADDRESSES[4], DENIED_PORT)
    return Flood((Step(at.target, "neither", udp_frame(near, far)),), 10**12, seconds)


def _rate(at: _At, seconds: float, name: str) -> float:
    """Return how many frames a second were sent, all of them dropped."""
    done = at.flooder.run(_flood_of(at, seconds))
    if name.startswith("vgw"):
        host = Host(Paths.from_environment(at.lab.environment))
        account = read_account(host, at.vm.node)
        dropped = account.packets.get((Path.FROM_VM, Verdict.DROP, Reason.RULE), 0)
        if dropped < done.sent - done.refused:
            raise BenchError(f"{name}: {dropped} of {done.sent} packets were denied by a rule")
    return done.rate


def _row(
    key: tuple[str, str],
    found: list[float],
    samples: Mapping[tuple[str, str], list[float]],
    note: str,
) -> Row:
    device, name = key
    quotients = {base: ratio(found, samples[device, base]) for base in _BASES}
    ratios = {base: value for base, value in quotients.items() if value is not None}
    return Row(PART, name, "drops/s", tuple(found), {"device": device}, ratios, note)
