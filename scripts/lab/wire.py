# SPDX-License-Identifier: Apache-2.0
"""Real packets between the lab's network namespaces: sockets, raw frames, captures.

A socket belongs for its whole life to the namespace it was opened in, so one process can hold both
ends of a connection: it steps into a namespace, opens a socket and steps back out.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 0x0003
ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD
PACKET_OUTGOING = 4
SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM = 0x00000017
BROADCAST = "ff:ff:ff:ff:ff:ff"
PATIENCE = 5.0  # seconds after which something awaited counts as not coming

_libc = ctypes.CDLL(None, use_errno=True)
_marks = itertools.count(1)


@dataclass(frozen=True)
class Node:
    """One namespace of the lab and its card, eth0."""

    lab: str
    name: str
    mac: str
    ipv4: str
    ipv6: str

    @property
    def namespace(self) -> str:
        """Name of the network namespace."""
        return f"{self.lab}-{self.name}"

    def address(self, family: int) -> str:
        """Return the node's address of one family (4 or 6)."""
        return self.ipv4 if family == 4 else self.ipv6

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs `words` in this node."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *words]

    def open(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket in this node."""
        with inside(self.namespace):
            return socket.socket(family, kind, protocol)


def lab_nodes(lab: str) -> dict[str, Node]:
    """Return the nodes that scripts/netns-lab.sh builds, by name."""
    nodes = (
        Node(lab, "web01", "52:54:00:00:00:11", "10.20.0.11", "2001:db8:20::11"),
        Node(lab, "db01", "52:54:00:00:00:12", "10.20.0.12", "2001:db8:20::12"),
        Node(lab, "client", "52:54:00:00:00:02", "10.20.0.2", "2001:db8:20::2"),
    )
    return {node.name: node for node in nodes}


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Put the calling thread into a network namespace for the length of the block."""
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        with Path("/run/netns", namespace).open("rb") as there:
            _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


# --- ordinary traffic ---------------------------------------------------------------------------


def family_of(address: str) -> socket.AddressFamily:
    """Return AF_INET or AF_INET6 for an address written as text."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(node: Node, port: int) -> socket.socket:
    """Open a TCP server for both families; the kernel accepts on its own."""
    server = node.open(socket.AF_INET6, socket.SOCK_STREAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", port))
    server.listen()
    server.settimeout(PATIENCE)
    return server


def receiver(node: Node, port: int, family: int = socket.AF_INET6) -> socket.socket:
    """Open a UDP server; with AF_INET6 it serves both families."""
    server = node.open(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    server.settimeout(PATIENCE)
    return server


def client(
    node: Node, kind: int, address: str, source: str | None = None, timeout: float = PATIENCE
) -> socket.socket:
    """Open a client's socket toward `address`, from `source` if given."""
    sock = node.open(family_of(address), kind)
    if source is not None:
        sock.bind((source, 0))
    sock.settimeout(timeout)
    return sock


def connect(
    node: Node, address: str, port: int, source: str | None = None, timeout: float = PATIENCE
) -> socket.socket:
    """Open a TCP connection; raises OSError when it does not come about."""
    sock = client(node, socket.SOCK_STREAM, address, source, timeout)
    try:
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def ping(node: Node, address: str, source: str | None = None, timeout: float = PATIENCE) -> bool:
    """Send one echo request and return whether it was answered."""
    origin = ["-I", source] if source else []
    command = node.command("ping", "-n", "-c1", f"-W{timeout}", *origin, address)
    outcome = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return outcome.returncode == 0


def leave_checksums(node: Node, interface: str, to_card: bool) -> None:
    """Say whether frames leave a node by an interface without checksums, for a card to fill in.

    Where they must not, the kernel fills in on the way out what a sender left out, and whoever
    gets the frame verifies it.
    """
    command = struct.pack("=II", ETHTOOL_STXCSUM, to_card)
    with node.open(socket.AF_INET, socket.SOCK_DGRAM) as control:
        argument = ctypes.create_string_buffer(command)
        request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(argument))
        fcntl.ioctl(control, SIOCETHTOOL, request)


# --- frames -------------------------------------------------------------------------------------


def mac_bytes(mac: str) -> bytes:
    """Return the six bytes of a MAC address."""
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, destination: str, ethertype: int, payload: bytes) -> bytes:
    """Build an Ethernet frame."""
    return mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", ethertype) + payload


def arp_request(mac: str, address: str, wanted: str) -> bytes:
    """Build the frame in which `address` asks everybody who has `wanted`."""
    sender = mac_bytes(mac) + ipaddress.IPv4Address(address).packed
    target = bytes(6) + ipaddress.IPv4Address(wanted).packed
    body = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 1) + sender + target
    return ethernet(mac, BROADCAST, ETH_P_ARP, body)


def network_packet(frame: bytes) -> tuple[int, str, bytes] | None:
    """Read (protocol, destination address, what follows the IP header), None unless it is IP.

    Good for what this module and the kernel send; not for hostile frames.
    """
    ethertype = int.from_bytes(frame[12:14], "big")
    packet = frame[14:]
    if ethertype == ETH_P_IP:
        length = (packet[0] & 15) * 4
        return packet[9], str(ipaddress.IPv4Address(packet[16:20])), packet[length:]
    if ethertype == ETH_P_IPV6:
        return packet[6], str(ipaddress.IPv6Address(packet[24:40])), packet[40:]
    return None


class Tap:
    """A raw socket on a node's eth0: sends frames as they are and sees all that come and go."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._socket = node.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind(("eth0", ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Send a frame out of eth0."""
        self._socket.send(frame)

    def frames(self, timeout: float) -> Iterator[tuple[bytes, bool]]:
        """Yield (frame, whether it left the node) as they come, for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                frame, address = self._socket.recvfrom(65536)
            except TimeoutError:
                return
            yield frame, address[2] == PACKET_OUTGOING

    def until(
        self,
        wanted: Callable[[bytes], bool],
        *,
        outgoing: bool = False,
        timeout: float = PATIENCE,
    ) -> list[bytes]:
        """Collect one direction's frames up to the first `wanted` one; TimeoutError without."""
        seen = []
        for frame, left_here in self.frames(timeout):
            if left_here is outgoing:
                seen.append(frame)
                if wanted(frame):
                    return seen
        what = "sent" if outgoing else "received"
        raise TimeoutError(f"{self.node.name} {what} {len(seen)} frames, none of them the awaited")


def mark_of(node: Node) -> bytes:
    """Build a frame that every guard lets pass and nobody answers, unlike any before.

    It is an ARP request for an address nobody has. Frames keep their order on the way, so when a
    mark has arrived, whatever was sent before it has arrived too or never will.
    """
    number = next(_marks)
    return arp_request(node.mac, node.ipv4, f"198.18.{number >> 8 & 255}.{number & 255}")


def arrivals(sender: Tap, listener: Tap, wanted: Callable[[bytes], bool]) -> list[bytes]:
    """Return the `wanted` frames that have reached `listener` of all that `sender` sent so far."""
    mark = mark_of(sender.node)
    sender.send(mark)
    return [frame for frame in listener.until(lambda frame: frame == mark) if wanted(frame)]
