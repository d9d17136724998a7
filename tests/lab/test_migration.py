# SPDX-License-Identifier: Apache-2.0
"""A VM moves between two hosts with an open TCP connection, its flows by export and import."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from scripts.lab import wire
from scripts.lab.wire import inside
from tests.lab.topology import eventually
from vgw import abi
from vgw.controller.flow_export import Token, export_flows
from vgw.controller.flow_import import import_flows, put_piece
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.parse import parse_sources

pytestmark = pytest.mark.lab

MAC, VM, CLIENT, PORT = "52:54:00:00:00:11", "192.0.2.11", "192.0.2.1", 5001
ETH_P_RARP = 0x8035
POLICY = """
schema: vgw/v1
vms:
  web01:
    conntrack: {{grace: 0s}}
    interfaces: [{{name: {interface}, mac: "{mac}", addresses: [{vm}]}}]
policies:
  - name: site
    tier: vm
    applies_to: {{all: true}}
    ingress: [{{name: transfer, action: accept, services: [tcp/{port}]}}]
defaults: {{ingress: drop, egress: accept}}
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def quietly(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)


class Site:
    """Two hosts behind one switch, a client at the switch, and a VM, all in namespaces."""

    def __init__(self, stack: ExitStack, root: Path, cache: Path) -> None:
        self._prefix = f"vgwmove{os.getpid()}"
        for name in ("a", "b", "vm", "client"):
            stack.callback(quietly, "ip", "netns", "del", self.ns(name))
            ip("netns", "add", self.ns(name))
        self._bridge("client")
        ip("-n", self.ns("client"), "addr", "add", f"{CLIENT}/24", "dev", "br0")
        self.hosts = {name: self._host(stack, name, root, cache) for name in ("a", "b")}
        self.plug("a", "eth0")

    def ns(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _bridge(self, name: str) -> None:
        ip("-n", self.ns(name), "link", "add", "br0", "type", "bridge")
        ip("-n", self.ns(name), "link", "set", "br0", "up")

    def _host(self, stack: ExitStack, name: str, root: Path, cache: Path) -> Host:
        """Make a host with a port for the VM, which nothing is plugged into yet."""
        self._bridge(name)
        for near, port, far, peer in (
            (name, "up0", "client", f"to-{name}"),
            (name, f"vm-{name}", name, "plug"),
        ):
            pair = ["type", "veth", "peer", "name", peer, "netns", self.ns(far)]
            ip("-n", self.ns(near), "link", "add", port, *pair)
            for place, device in ((near, port), (far, peer)):
                if device != "plug":
                    ip("-n", self.ns(place), "link", "set", device, "master", "br0", "up")
        bpffs = root / f"bpffs-{name}"
        bpffs.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
        stack.callback(quietly, "umount", "-l", str(bpffs))
        places = (root / f"{name}.yaml", root / f"run-{name}", root / f"state-{name}")
        return Host(Paths(*places, bpffs / "vgw", cache, root / f"{name}.log"))

    def attach(self, name: str) -> None:
        text = POLICY.format(interface=f"vm-{name}", mac=MAC, vm=VM, port=PORT)
        with inside(self.ns(name)):
            self.hosts[name].attach(parse_sources([("policy.yaml", text)]), "web01")

    def plug(self, name: str, device: str) -> None:
        """Give the VM the end of a host's port as its interface, and have it say where it is."""
        ip("-n", self.ns(name), "link", "set", "plug", "netns", self.ns("vm"), "name", device)
        for words in (
            ("link", "set", device, "address", MAC, "addrgenmode", "none"),
            ("addr", "add", f"{VM}/24", "dev", device),
            ("link", "set", device, "up"),
        ):
            ip("-n", self.ns("vm"), *words)
        mac = wire.mac_bytes(MAC)
        body = struct.pack("!HHBBH", 1, wire.ETH_P_IP, 6, 4, 3) + (mac + bytes(4)) * 2
        with inside(self.ns("vm")), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((device, 0))
            sock.send(wire.ethernet(MAC, wire.BROADCAST, ETH_P_RARP, body))

    def counted(self, name: str, verdict: abi.Verdict, reason: abi.Reason) -> int:
        """Return how many packets a host's endpoint counted under a verdict and a reason."""
        total = 0
        for endpoint in self.hosts[name].open_endpoints("web01"):
            with endpoint:
                stats = endpoint.maps.stats()
                total += sum(stats[key].packets for key in stats if key[1:] == (verdict, reason))
        return total

    def told(self, since: str | None) -> tuple[io.BytesIO, str]:
        out = io.BytesIO()
        token = None if since is None else Token.parse(since)
        answer = export_flows(self.hosts["a"], "web01", out, token)
        out.seek(0)
        return out, answer["token"]

    def take(self, data: io.BytesIO) -> None:
        target = self.hosts["b"]
        with inside(self.ns("b")):
            import_flows(target, "web01", data, lambda piece: put_piece(target, piece))


class Transfer:
    """A TCP connection from the client to the VM on which numbers flow, each once and in order."""

    def __init__(self, site: Site) -> None:
        with inside(site.ns("vm")), socket.create_server((VM, PORT)) as server:
            with inside(site.ns("client")):
                self._near = socket.create_connection((VM, PORT), timeout=20)
            self._far, _ = server.accept()
        self._far.settimeout(0.2)
        self._end = threading.Event()
        self.received = 0
        #: The longest time in which nothing came, in seconds.
        self.stall = 0.0
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        number = 0
        while not self._end.is_set():
            with contextlib.suppress(BrokenPipeError):  # closed while the connection is broken
                self._near.sendall(struct.pack("!1024I", *range(number, number + 1024)))
            number += 1024
            self._end.wait(0.002)

    def _receive(self) -> None:
        rest, last = b"", time.monotonic()
        while not self._end.is_set():
            try:
                data = rest + self._far.recv(1 << 16)
            except TimeoutError:
                continue  # the end may have come meanwhile
            count = len(data) // 4
            whole, rest = data[: count * 4], data[count * 4 :]
            numbers = struct.unpack(f"!{count}I", whole)
            assert numbers == tuple(range(self.received, self.received + count))
            self.received += count
            now = time.monotonic()
            self.stall, last = max(self.stall, now - last), now

    def goes_on(self) -> None:
        """Wait until more has arrived."""
        before = self.received
        eventually("more arrives", lambda: self.received > before)

    def close(self) -> None:
        self._end.set()
        self._near.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._near.close()
        self._far.close()


@contextmanager
def site_in(root: Path, cache: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, root, cache)


@pytest.mark.parametrize("carried", [True, False], ids=["carried", "left-behind"])
def test_catalogue_M35_a_transfer_goes_on_where_the_vm_moves(
    tmp_path: Path, program_cache: Path, carried: bool
) -> None:
    with site_in(tmp_path, program_cache) as site, ExitStack() as stack:
        site.attach("a")
        site.attach("b")
        transfer = Transfer(site)
        stack.callback(transfer.close)
        transfer.goes_on()
        full, token = site.told(None)
        if carried:
            site.take(full)
        transfer.goes_on()
        transfer.stall = 0.0

        began = time.monotonic()
        ip("-n", site.ns("vm"), "link", "set", "eth0", "down")  # the VM is paused
        delta, _ = site.told(token)
        if carried:
            site.take(delta)
        ip("-n", site.ns("vm"), "link", "del", "eth0")
        site.plug("b", "eth1")
        took = time.monotonic() - began

        assert site.counted("b", abi.Verdict.ACCEPT, abi.Reason.RARP) == 1
        if carried:
            transfer.goes_on()
            print(f"switch-over {took:.2f} s, the transfer stood still for {transfer.stall:.2f} s")
            # A sender that hears nothing tries again after twice the time of the last attempt.
            assert transfer.stall < 2 * took + 1
            assert site.counted("b", abi.Verdict.DROP, abi.Reason.NO_STATE) == 0
        else:
            received = transfer.received
            eventually(
                "the sender tries again in vain",
                lambda: site.counted("b", abi.Verdict.DROP, abi.Reason.NO_STATE) > 1,
            )
            assert transfer.received == received, "the control: without its flow it breaks"
        with inside(site.ns("a")):
            site.hosts["a"].detach("web01")
        assert not list(site.hosts["a"].paths.state_dir.rglob("*.json"))
        with inside(site.ns("b")):
            site.hosts["b"].detach("web01")
