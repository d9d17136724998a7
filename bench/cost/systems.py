# SPDX-License-Identifier: Apache-2.0
"""What is compared: nothing, a program that does nothing, vgw, and other firewalls.

Each is put in force for one VM, under rules toward it, and removed again.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench import nft
from bench.cost import iptables, slow_path
from bench.cost.rules import measured_rules
from bench.cost.vms import Vm
from bench.lab import BenchError, Lab
from bench.policy_text import policy_text
from scripts.lab.wire import inside
from vgw import libbpf
from vgw.libbpf import AttachType, ProgType

NOTHING: Final = "nothing"
VGW: Final = "vgw"
#: `mov r0, TCX_NEXT; exit`
_NO_OP: Final = bytes.fromhex("b7000000ffffffff 9500000000000000")


@dataclass(frozen=True, slots=True)
class Setting:
    """For whom a system is put in force: rules of one IP version toward a VM of a lab."""

    lab: Lab
    vm: Vm
    version: int
    size: int
    shape: str


@dataclass(frozen=True, slots=True)
class System:
    """Something that stands between a VM and the network, or nothing.

    `protect` has it in force for its block and yields what there is to note about its figures.
    `has_rules`: it is measured once for each size of rule set. `filters`: it drops what the rules
    drop.
    """

    name: str
    protect: Callable[[Setting], Iterator[str]]
    has_rules: bool = True
    filters: bool = True

    @contextmanager
    def in_force(self, setting: Setting) -> Iterator[str]:
        """Protect for a block, whatever becomes of it."""
        with contextmanager(self.protect)(setting) as note:
            yield note


def _nothing(_: Setting) -> Iterator[str]:
    yield ""


def _no_op(at: Setting) -> Iterator[str]:
    program = libbpf.prog_load(ProgType.SCHED_CLS, "vgw_bench_noop", _NO_OP)
    links = []
    try:
        with inside(f"{at.lab.name}-host"):
            ifindex = socket.if_nametoindex(at.vm.interface)
            for hook in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS):
                links.append(libbpf.link_create(program, ifindex, hook, 0))
        yield "tc in both directions"
    finally:
        for fd in (program, *links):
            os.close(fd)


def _vgw(at: Setting) -> Iterator[str]:
    rules = measured_rules(at.size, at.shape, at.version, at.vm)
    at.lab.write_policy(policy_text(rules, at.vm.endpoint))
    attach = at.lab.vgw("attach", "--vm", at.vm.node)
    try:
        if attach.returncode != 0:
            raise BenchError(attach.stderr.strip())
        yield _attached(at)
    finally:
        detach = at.lab.vgw("detach", "--all")
        if detach.returncode != 0:
            raise BenchError(detach.stderr.strip())


def _attached(at: Setting) -> str:
    """Return on which hook the VM is attached; raises BenchError where rules are missing."""
    (vm,) = json.loads(at.lab.vgw("status", "-o", "json").stdout)["vms"]
    (interface,) = vm["interfaces"]
    loaded = interface["rules"]["ingress"]
    if loaded != at.size:
        raise BenchError(f"vgw loaded {loaded} of {at.size} rules")
    return f"from the VM: {interface['from_vm']['hook']}"


def _nft(form: nft.Form) -> Callable[[Setting], Iterator[str]]:
    def protect(at: Setting) -> Iterator[str]:
        rules = measured_rules(at.size, at.shape, at.version, at.vm)
        ruleset = form(rules, at.version, at.vm.mac)
        at.lab.filter_bridged(on=True)
        try:
            at.lab.nft(ruleset.text)
            yield f"{ruleset.maps} maps in turn" if ruleset.maps else ""
        finally:
            at.lab.nft("flush ruleset\n")
            at.lab.filter_bridged(on=False)

    return protect


def _iptables(at: Setting) -> Iterator[str]:
    rules = measured_rules(at.size, at.shape, at.version, at.vm)
    at.lab.filter_bridged(on=True)
    try:
        iptables.load(at.lab, rules, at.version, at.vm.interface)
        yield ""
    finally:
        at.lab.nft("flush ruleset\n")
        at.lab.filter_bridged(on=False)


def _slow_path(at: Setting) -> Iterator[str]:
    rules = measured_rules(at.size, at.shape, at.version, at.vm)
    with slow_path.in_the_way(at.lab, at.vm.interface, rules, at.version):
        yield "every packet through a process"


#: In the order in which they are measured and printed.
SYSTEMS: Final = (
    System(NOTHING, _nothing, has_rules=False, filters=False),
    System("no-op program", _no_op, has_rules=False, filters=False),
    System(VGW, _vgw),
    System("nft linear", _nft(nft.linear)),
    System("nft maps", _nft(nft.ordered_maps)),
    System("iptables physdev", _iptables),
    System("user space", _slow_path),
)
