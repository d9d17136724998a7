# SPDX-License-Identifier: Apache-2.0
"""A firewall in user space, in the way of a VM.

The VM gets a bridge of its own, and a process (bench/slow_path.c) moves what it accepts between
that bridge and the lab's.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from bench.lab import Lab
from bench.native import build
from scripts.lab.tap_guest import open_tap
from scripts.lab.wire import inside
from vgw.abi import Action
from vgw.policy.model import ANYWHERE, EffectiveRule

_BRIDGE: Final = "br-slow"
#: TAPs of the process, on the lab's bridge and on the VM's.
_OUTSIDE, _INSIDE = "tap-outside", "tap-inside"
_ALL_PORTS: Final = (0, 65535)
_ANYWHERE: Final = {4: "0.0.0.0/0", 6: "::/0"}


@contextmanager
def in_the_way(
    lab: Lab, interface: str, rules: Sequence[EffectiveRule], version: int
) -> Iterator[None]:
    """Have every packet of a VM pass through the process for the length of the block."""
    program = build("slow_path", lab.directory)
    with ExitStack() as stack:
        taps = []
        with inside(f"{lab.name}-host"):
            for name in (_OUTSIDE, _INSIDE):
                taps.append(open_tap(name, None, offload=True))
                stack.callback(os.close, taps[-1])
        lab.run_on_host(
            "ip",
            "-batch",
            "-",
            text=f"link add {_BRIDGE} type bridge mcast_snooping 0\n"
            f"link set {_BRIDGE} addrgenmode none\n"
            f"link set {_BRIDGE} up\n"
            f"link set {_OUTSIDE} addrgenmode none\n"
            f"link set {_OUTSIDE} master br0\n"
            f"link set {_INSIDE} addrgenmode none\n"
            f"link set {_INSIDE} master {_BRIDGE}\n"
            f"link set {interface} master {_BRIDGE}\n",
        )
        stack.callback(lab.run_on_host, "ip", "link", "delete", _BRIDGE)
        stack.callback(lab.run_on_host, "ip", "link", "set", interface, "master", "br0")
        file = stack.enter_context(
            tempfile.NamedTemporaryFile("w", dir=lab.directory, suffix=".rules")
        )
        file.writelines(f"{_line(rule, version)}\n" for rule in rules)
        file.flush()
        process = subprocess.Popen([program, *map(str, taps), file.name], pass_fds=taps)
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield


def _line(rule: EffectiveRule, version: int) -> str:
    (service,) = rule.services
    low, high = service.ports or _ALL_PORTS
    networks = (
        _ANYWHERE[version] if each == ANYWHERE else str(each[0])
        for each in (rule.peers, rule.local)
    )
    verdict = "accept" if rule.action is Action.ACCEPT else "drop"
    return f"{version} {' '.join(networks)} {service.protocol or 0} {low} {high} {verdict}"
