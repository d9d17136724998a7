# SPDX-License-Identifier: Apache-2.0
"""Path MTU discovery of a real TCP through the firewall, past a router with a narrow link (H9)."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.lab import wire
from tests.frames import ICMP, ICMPV6, TCP, icmp_error, ipv4, ipv6, tcp
from tests.frames import Wire as Conversation
from tests.lab.devices import Devices, Guarded, Space, Wire, document, run
from tests.lab.topology import eventually
from vgw.abi import Path as PacketPath
from vgw.abi import Reason, Verdict

pytestmark = pytest.mark.lab

FAMILIES = pytest.mark.parametrize("family", [4, 6])
NARROW = 1400
TRANSFER = 4 << 20
PORT = 443
FAR4, FAR6 = "192.0.2.10", "2001:db8:1::10"
ROUTER4, ROUTER6 = "10.20.0.2", "2001:db8:20::2"
ROUTER_MAC = "52:54:00:00:00:02"
RELATED = (PacketPath.TO_VM, Verdict.ACCEPT, Reason.CT_RELATED)


@dataclass(frozen=True)
class Route:
    """A VM, a router one hop from it, and a machine behind a narrow link of the router."""

    vm: Space
    router: Space
    far: Space
    guarded: Guarded

    def send(self, family: int, size: int, patience: float) -> int:
        """Have the VM send bytes to the far machine; return how many came in time."""
        address = FAR4 if family == 4 else FAR6
        with (
            wire.listen(self.far, PORT) as server,
            wire.connect(self.vm, address, PORT) as here,
        ):
            there, _ = server.accept()
            with there:
                there.settimeout(patience)
                here.settimeout(patience)
                sending = threading.Thread(target=_send, args=(here, size))
                sending.start()
                arrived = _receive(there)
                here.close()
                sending.join()
        return arrived


def _send(sock: socket.socket, size: int) -> None:
    try:
        sock.sendall(bytes(size))
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side gave up


def _receive(sock: socket.socket) -> int:
    arrived = 0
    try:
        while data := sock.recv(1 << 20):
            arrived += len(data)
    except TimeoutError:
        pass
    return arrived


@pytest.fixture
def route(devices: Devices) -> Route:
    """The VM may open connections to PORT; nothing else passes unless it belongs to one."""
    vm = devices.stack("tap0", "52:54:00:00:00:11", "10.20.0.11", "2001:db8:20::11")
    router = devices.stack("net0", ROUTER_MAC, ROUTER4, ROUTER6)
    devices.bridge("tap0", "net0")
    far = devices.space("far", "", FAR4, FAR6)
    run("ip link add far0 type veth peer name eth0")
    run(f"ip link set far0 netns {router.namespace}")
    run(f"ip link set eth0 netns {far.namespace}")
    with wire.inside(router.namespace):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
        run(f"ip link set far0 mtu {NARROW} up")
        run("ip addr add 192.0.2.1/24 dev far0")
        run("ip addr add 2001:db8:1::1/64 dev far0 nodad")
    for space, address4, address6, gateway4, gateway6 in (
        (vm, "", "", ROUTER4, ROUTER6),
        (far, f"{FAR4}/24", f"{FAR6}/64", "192.0.2.1", "2001:db8:1::1"),
    ):
        with wire.inside(space.namespace):
            run("ip link set eth0 up")
            if address4:
                run(f"ip addr add {address4} dev eth0")
                run(f"ip addr add {address6} dev eth0 nodad")
            run(f"ip route add default via {gateway4}")
            run(f"ip -6 route add default via {gateway6}")
    egress = f"[{{name: out, action: accept, services: [tcp/{PORT}]}}]"
    policy = document(egress=egress, defaults="{ingress: drop, egress: drop}")
    return Route(vm, router, far, devices.protect(policy))


def known_mtu(vm: Space, family: int) -> str:
    """Return what the VM knows of the way to the far machine."""
    return run(*vm.command(f"ip -{family} route get {FAR4 if family == 4 else FAR6}"))


@FAMILIES
def test_catalogue_H9_a_transfer_finds_the_mtu_of_its_path(route: Route, family: int) -> None:
    assert "mtu" not in known_mtu(route.vm, family)
    route.guarded.counts()

    assert route.send(family, TRANSFER, wire.PATIENCE) == TRANSFER

    counts = route.guarded.counts()
    assert counts[RELATED].packets >= 1
    assert f"mtu {NARROW}" in known_mtu(route.vm, family)


@FAMILIES
def test_catalogue_H9_without_the_error_the_transfer_stalls(route: Route, family: int) -> None:
    """The control: it is the router's error, and nothing else, that makes it come through."""
    kind = "icmp type destination-unreachable" if family == 4 else "icmpv6 type packet-too-big"
    with wire.inside(route.router.namespace):
        run("nft add table inet narrow")
        run("nft add chain inet narrow out { type filter hook output priority 0 ; }")
        run(f"nft add rule inet narrow out {kind} drop")

    assert route.send(family, TRANSFER, patience=0.5) < TRANSFER

    assert RELATED not in route.guarded.counts()
    assert "mtu" not in known_mtu(route.vm, family)


@FAMILIES
def test_catalogue_H9_an_error_about_no_flow_is_not_believed(route: Route, family: int) -> None:
    """The other control: the same error about a connection that does not exist is dropped."""
    to_vm = Conversation(PacketPath.TO_VM, remote_mac=wire.mac_bytes(ROUTER_MAC))
    sender = Wire(route.router)
    try:
        if family == 4:
            quoted = ipv4(tcp(41000, PORT), TCP, destination=FAR4)
            error = icmp_error(3, quoted, code=4, rest=NARROW)
            frame = to_vm.wrap4(error, ICMP, remote=ROUTER4)
        else:
            quoted = ipv6(tcp(41000, PORT), TCP, destination=FAR6)
            frame = to_vm.wrap6(icmp_error(2, quoted, rest=NARROW), ICMPV6, remote=ROUTER6)
        sender.send(frame)
        unrelated = (PacketPath.TO_VM, Verdict.DROP, Reason.ICMP_UNRELATED)
        eventually("it is counted", lambda: unrelated in route.guarded.counts())
    finally:
        sender.close()

    assert "mtu" not in known_mtu(route.vm, family)
