# SPDX-License-Identifier: Apache-2.0
"""A VM that is going to be attacked, another one beside it, and connections to both."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from bench.accounts import Account, read_account
from bench.flood import Flood, Flooder, Side, packet_target, syn
from bench.lab import CARDS, CONNTRACK_MAX, BenchError, Lab
from bench.lab import lab as build_lab
from bench.limits import Limits
from bench.live import LiveFlows, Pair
from bench.native import build
from bench.scale import Scale
from scripts.lab import wire
from scripts.lab.wire import Node
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

VM, OTHER, CLIENT = "vm", "other", "client"
#: Belongs to the VM by its policy and is used by no system in it, so nobody answers there.
SPARE: Final = "10.20.0.111"
#: The first of the addresses that floods come from.
STRANGERS: Final = "10.64.0.0"
SOURCES: Final = 1_000_000
_PORT, _NEW_PORT = 8080, 8081
_BLOCK: Final = bytes(1 << 18)


@dataclass
class Attacked:
    """Both VMs, protected; `live` are open connections of the one that is attacked, silent yet."""

    lab: Lab
    host: Host
    flooder: Flooder
    nodes: dict[str, Node]
    live: LiveFlows
    stack: ExitStack

    def account(self, vm: str = VM) -> Account:
        """Return the counters of a VM."""
        return read_account(self.host, vm)

    def card(self, name: str, interface: str = "eth0") -> str:
        """Return the target for frames that a node sends."""
        return packet_target(interface, self.nodes[name].namespace)

    def flood(self, seconds: float, interface: str = "eth0") -> Flood:
        """Return a SYN flood of the network to the VM, at an address where nobody answers."""
        near = Side(self.nodes[CLIENT].mac, STRANGERS, _PORT)
        far = Side(self.nodes[VM].mac, SPARE, _PORT)
        steps = syn(self.card(CLIENT, interface), near, far, "source")
        return Flood(steps, 10**12, seconds, distinct=SOURCES, order="random")

    def connects(self, receiver: str, timeout: float = 0.3) -> bool:
        """Tell whether a new connection of the client comes about."""
        far = self.nodes[receiver]
        with wire.listen(far, _NEW_PORT):
            try:
                wire.connect(self.nodes[CLIENT], far.ipv4, _NEW_PORT, timeout=timeout).close()
            except OSError:
                return False
        return True


@contextmanager
def attacked(scale: Scale) -> Iterator[Attacked]:
    """Build a lab, protect both VMs by a policy that accepts everything, and open connections."""
    with build_lab() as lab, ExitStack() as stack:
        timeouts = {} if scale.half_open is None else {"tcp_syn": scale.half_open}
        lab.write_policy(_policy(Limits(timeouts=timeouts)))
        attach = lab.vgw("attach", "--vm", VM, "--vm", OTHER)
        if attach.returncode != 0:
            raise BenchError(attach.stderr.strip())
        stack.callback(lab.vgw, "detach", "--all")
        nodes = {
            name: Node(lab.name, name, mac, addresses[4], addresses[6])
            for name, (mac, addresses) in CARDS.items()
        }
        pairs = connections(stack, nodes, VM, scale.live)
        yield Attacked(
            lab,
            Host(Paths.from_environment(lab.environment)),
            Flooder(build("flood", lab.directory)),
            nodes,
            LiveFlows(pairs),
            stack,
        )


def connections(stack: ExitStack, nodes: dict[str, Node], vm: str, count: int) -> list[Pair]:
    """Open connections of the client to a VM that stay until the stack is closed."""
    _allow_files(2 * count + 256)
    pairs: list[Pair] = []
    with wire.listen(nodes[vm], _PORT) as server:
        for _ in range(count):
            here = stack.enter_context(wire.connect(nodes[CLIENT], nodes[vm].ipv4, _PORT))
            pairs.append((here, stack.enter_context(server.accept()[0])))
    return pairs


def _allow_files(count: int) -> None:
    """Let this process have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise BenchError(f"{count} open files are needed, {hard} allowed; see ulimit -Hn")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def throughput(pair: Pair, seconds: float, cpu: int) -> float:
    """Send as fast as a connection takes it, on one CPU, and return Gbit/s received."""
    here, there = pair
    ended = threading.Event()

    def send() -> None:
        os.sched_setaffinity(0, {cpu})
        here.settimeout(1.0)
        while not ended.is_set():
            with suppress(TimeoutError):
                here.sendall(_BLOCK)

    sender = threading.Thread(target=send, daemon=True)
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        sender.start()
        received = _receive(there, seconds)
        ended.set()
        # What is under way has to leave, or the sender would not see that it is to end.
        while sender.is_alive():
            _receive(there, 0.05)
    finally:
        os.sched_setaffinity(0, home)
    return received * 8 / seconds / 1e9


def _receive(there: socket.socket, seconds: float) -> int:
    """Receive what comes in so many seconds and return how many bytes it was."""
    there.settimeout(0.05)
    buffer, received = bytearray(1 << 20), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(TimeoutError):
            received += there.recv_into(buffer)
    return received


def _policy(limits: Limits) -> str:
    lines = ["schema: vgw/v1", "vms:"]
    for vm in (VM, OTHER):
        mac, addresses = CARDS[vm]
        owned = [addresses[4], *([SPARE] if vm == VM else [])]
        lines += [
            f"  {vm}:",
            "    interfaces:",
            f"      - {{name: veth-{vm}, mac: '{mac}', addresses: [{', '.join(owned)}],",
            f"         conntrack_max: {CONNTRACK_MAX}}}",
            f"    {limits.key()}",
        ]
    return "\n".join([*lines, "defaults: {ingress: accept, egress: accept}", ""])
