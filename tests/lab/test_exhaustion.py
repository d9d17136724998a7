# SPDX-License-Identifier: Apache-2.0
"""Floods against one VM: its open connections go on, its own limits hold, others notice nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from bench.accounts import Account, half_open_flows, read_account
from bench.flood import (
    Flood,
    Flooder,
    Sent,
    Side,
    Step,
    handshake,
    outcome,
    packet_target,
    syn,
    udp_frame,
)
from bench.limits import REFUSALS, Limits
from bench.live import LiveFlows, Pair
from scripts.lab import wire
from tests.lab.topology import Lab, eventually
from vgw.abi import Path, Reason, Verdict
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

pytestmark = pytest.mark.lab

PORT = 8080
TABLE = 2048
LIVE = 100
HALF_OPEN = 512
LIMITS = Limits(timeouts={"tcp_syn": 2, "udp_single": 2}, half_open_max=HALF_OPEN)
#: Belongs to the VM by its policy and is used by no system in it, so nobody answers there.
SPARE = "10.20.0.11{}"
FLOOD_SECONDS = 1.5
EVERY_VM = pytest.mark.parametrize("vm", ["db01", "web01"])


def policy(limits: Limits) -> str:
    """Return a policy under which both VMs accept everything, with a small table."""
    lines = ["schema: vgw/v1", "vms:"]
    interfaces = {"web01": ("tap-web01", 11), "db01": ("veth-db01", 12)}
    for vm, (name, number) in interfaces.items():
        addresses = f"[10.20.0.{number}, {spare(vm)}]"
        lines += [
            f"  {vm}:",
            "    interfaces:",
            f"      - {{name: {name}, mac: '52:54:00:00:00:{number}', addresses: {addresses},",
            f"         conntrack_max: {TABLE}}}",
            f"    {limits.key()}",
        ]
    return "\n".join([*lines, "defaults: {ingress: accept, egress: accept}", ""])


def spare(vm: str) -> str:
    """Return the address of a VM at which nobody answers."""
    return SPARE.format({"web01": 1, "db01": 2}[vm])


@dataclass
class Scene:
    """One VM under attack, the other one beside it, both protected, with open connections."""

    lab: Lab
    host: Host
    flooder: Flooder
    vm: str
    live: LiveFlows
    beside: LiveFlows
    before: Account

    @property
    def other(self) -> str:
        return "web01" if self.vm == "db01" else "db01"

    def account(self) -> Account:
        return read_account(self.host, self.vm)

    def side(self, name: str, address: str = "", port: int = PORT) -> Side:
        """Return a node of the lab as one side of conversations."""
        node = self.lab.nodes[name]
        return Side(node.mac, address or node.ipv4, port)

    def card(self, name: str) -> str:
        """Return the target for frames that a node sends."""
        return packet_target("eth0", self.lab.nodes[name].namespace)

    def connects(self, sender: str, receiver: str, port: int = PORT) -> bool:
        """Tell whether a new connection comes about and data goes both ways."""
        near, far = self.lab.nodes[sender], self.lab.nodes[receiver]
        with wire.listen(far, port) as server:
            try:
                here = wire.connect(near, far.ipv4, port, timeout=1.0)
            except OSError:
                return False
            with here, server.accept()[0] as there:
                here.sendall(b"question")
                return there.recv(64) == b"question"


@contextmanager
def scene(lab: Lab, flooder: Flooder, vm: str, limits: Limits = LIMITS) -> Iterator[Scene]:
    """Protect both VMs and open connections: of the client to both, and of the VM to the client."""
    lab.write_policy(policy(limits))
    lab.attach("web01", "db01")
    host = Host(Paths.from_environment(lab.environment))
    other = "web01" if vm == "db01" else "db01"
    with ExitStack() as stack:
        inbound = connections(stack, lab, "client", vm, LIVE // 2)
        outbound = connections(stack, lab, vm, "client", LIVE // 2)
        beside = connections(stack, lab, "client", other, 10)
        yield Scene(
            lab,
            host,
            flooder,
            vm,
            stack.enter_context(LiveFlows(inbound + outbound)),
            stack.enter_context(LiveFlows(beside)),
            read_account(host, vm),
        )


def connections(stack: ExitStack, lab: Lab, sender: str, receiver: str, count: int) -> list[Pair]:
    """Open connections that stay until the stack is closed."""
    near, far = lab.nodes[sender], lab.nodes[receiver]
    pairs: list[Pair] = []
    with wire.listen(far, PORT + 1) as server:
        for _ in range(count):
            here = stack.enter_context(wire.connect(near, far.ipv4, PORT + 1))
            pairs.append((here, stack.enter_context(server.accept()[0])))
    return pairs


def withstand(scene: Scene, flood: Flood) -> tuple[Sent, Account]:
    """Run a flood and check what holds during it and after it."""
    with scene.flooder.running(flood) as process:
        assert scene.live.proceed(3), scene.live.problems
        assert scene.beside.proceed(3), scene.beside.problems
        assert scene.connects("client", scene.other)
        assert scene.connects(scene.other, "client", PORT + 2)
        sent = outcome(process)
    after = scene.account()
    assert after.half_open == half_open_flows(scene.host, scene.vm)
    assert scene.live.proceed(3), scene.live.problems
    assert scene.beside.proceed(3), scene.beside.problems
    assert after.entries <= after.limit == TABLE
    # Those of the flood and, for moments, what the checks above opened.
    assert after.entries <= LIVE + HALF_OPEN + 10
    assert after.memory <= scene.before.memory + TABLE * 400
    beside = read_account(scene.host, scene.other)
    assert not REFUSALS & {reason for _, _, reason in beside.packets}
    return sent, after


def gave_way(scene: Scene, after: Account) -> int:
    """Return how many half-open flows made room for others."""
    return after.opened(scene.before) - (after.entries - scene.before.entries)


# --- L1, L2, L3 -----------------------------------------------------------------------------------


def syn_flood(scene: Scene) -> Flood:
    """SYNs of the network to an address of the VM, from a million sources."""
    sources = scene.side("client", "10.64.0.0")
    steps = syn(scene.card("client"), sources, scene.side(scene.vm, spare(scene.vm)), "source")
    return Flood(steps, 10**9, FLOOD_SECONDS, distinct=10**6, order="random")


def syn_scan(scene: Scene) -> Flood:
    """SYNs of the VM to a million destinations."""
    anywhere = Side(scene.lab.nodes["client"].mac, "10.64.0.0", 80)
    steps = syn(scene.card(scene.vm), scene.side(scene.vm, port=4000), anywhere, "destination")
    return Flood(steps, 10**9, FLOOD_SECONDS, distinct=10**6, order="random")


def datagrams(scene: Scene) -> Flood:
    """Datagrams of the network to the VM, each of a flow of its own."""
    near, far = scene.side("client", "10.64.0.0"), scene.side(scene.vm, spare(scene.vm))
    step = Step(scene.card("client"), "source", udp_frame(near, far))
    return Flood((step,), 10**9, FLOOD_SECONDS, distinct=10**6)


def outward_datagrams(scene: Scene) -> Flood:
    """Datagrams of the VM, each of a flow of its own."""
    anywhere = Side(scene.lab.nodes["client"].mac, "10.64.0.0", 80)
    step = Step(
        scene.card(scene.vm), "destination", udp_frame(scene.side(scene.vm, port=4000), anywhere)
    )
    return Flood((step,), 10**9, FLOOD_SECONDS, distinct=10**6)


def check_recovery(scene: Scene, sender: str, receiver: str) -> None:
    """Check that a new connection works again as soon as what the flood left has expired."""
    eventually(
        "new connections work", lambda: scene.connects(sender, receiver, PORT + 3), timeout=20
    )


@EVERY_VM
def test_catalogue_L1_a_syn_flood_hurts_no_open_connection(
    lab: Lab, flooder: Flooder, vm: str
) -> None:
    with scene(lab, flooder, vm) as at:
        _, after = withstand(at, syn_flood(at))
        assert gave_way(at, after) > 10 * TABLE
        check_recovery(at, "client", vm)


@EVERY_VM
def test_catalogue_L2_a_scan_by_the_vm_hurts_no_open_connection(
    lab: Lab, flooder: Flooder, vm: str
) -> None:
    with scene(lab, flooder, vm) as at:
        _, after = withstand(at, syn_scan(at))
        assert gave_way(at, after) > TABLE
        check_recovery(at, vm, "client")


@EVERY_VM
@pytest.mark.parametrize("flood", [datagrams, outward_datagrams])
def test_catalogue_L3_datagrams_hurt_no_open_connection(
    lab: Lab, flooder: Flooder, vm: str, flood: Callable[[Scene], Flood]
) -> None:
    with scene(lab, flooder, vm) as at:
        _, after = withstand(at, flood(at))
        assert gave_way(at, after) > TABLE
        ends = ("client", vm) if flood is datagrams else (vm, "client")
        check_recovery(at, *ends)


@EVERY_VM
def test_catalogue_L1_without_limits_a_flood_takes_the_whole_table(
    lab: Lab, flooder: Flooder, vm: str
) -> None:
    """The control: half-open flows up to the size of the table leave no room for the VM's own."""
    with scene(lab, flooder, vm, Limits(half_open_max=TABLE)) as at:
        at.flooder.run(syn_flood(at))
        assert at.account().entries == TABLE
        assert not at.connects(vm, "client", PORT + 3)


@EVERY_VM
def test_catalogue_L1_the_vm_opens_connections_during_a_flood(
    lab: Lab, flooder: Flooder, vm: str
) -> None:
    """Each side has half-open flows of its own: those of the network take none of the VM's."""
    with scene(lab, flooder, vm) as at, at.flooder.running(syn_flood(at)) as process:
        eventually("the flood is at its limit", lambda: gave_way(at, at.account()) > TABLE)
        assert at.connects(vm, "client", PORT + 3)
        assert process.poll() is None


def test_catalogue_L1_metrics_tell_why(lab: Lab, flooder: Flooder) -> None:
    reason = Reason.CT_FULL
    with scene(lab, flooder, "db01", Limits(half_open_max=TABLE)) as at, lab.controller():
        at.flooder.run(syn_flood(at))
        labels = {"vm": "db01", "direction": "ingress"}
        counted = lab.metric("vgw_dropped_packets_total", reason=reason.name, **labels)
        assert counted == at.account().packets[Path.TO_VM, Verdict.DROP, reason]
        assert lab.metric("vgw_conntrack_entries", vm="db01") == TABLE
        half_open = lab.metric("vgw_conntrack_half_open", **labels)
        assert half_open == at.account().half_open[Path.TO_VM] > 0
        assert lab.metric("vgw_conntrack_half_open_max", vm="db01") == TABLE
        assert lab.metric("vgw_dropped_packets_total", vm="web01", reason=reason.name) is None


# --- L4 -------------------------------------------------------------------------------------------


@EVERY_VM
def test_catalogue_L4_a_table_full_of_open_connections_takes_no_more(
    lab: Lab, flooder: Flooder, vm: str
) -> None:
    with scene(lab, flooder, vm) as at:
        assert at.connects("client", vm)
        fill(at)
        assert at.live.proceed(3), at.live.problems
        before = at.account()
        assert not at.connects("client", vm)
        assert not at.connects(vm, "client", PORT + 3)
        after = at.account()
        dropped = after.by_reason(before, Verdict.DROP)
        assert dropped[Reason.CT_FULL] >= 2
        assert after.entries == TABLE
        assert at.live.proceed(3), at.live.problems
        assert at.beside.proceed(3), at.beside.problems
        assert at.connects("client", at.other)

        at.live.stop()
        lab.vgw("conntrack", "flush", "--vm", vm)
        check_recovery(at, "client", vm)


def fill(scene: Scene) -> None:
    """Fill the VM's table with open connections of an address at which nobody answers."""
    near = scene.side("client", "10.64.0.0")
    far = scene.side(scene.vm, spare(scene.vm), 443)
    steps = handshake(scene.card("client"), scene.card(scene.vm), near, far)

    def is_full() -> bool:
        scene.flooder.run(Flood(steps, 2 * TABLE, 5))
        return scene.account().entries == TABLE

    eventually("the table is full", is_full)
