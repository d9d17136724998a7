# SPDX-License-Identifier: Apache-2.0
"""What the demo tries: each attempt, whether policy lets it through, and what should decide."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scripts.lab import wire
from scripts.lab.wire import Node
from vgw.policy.frame import build_frame

OFFICE = "192.0.2.10"
GIVE_UP = 0.5  # seconds that an attempt may take; what passes takes less than a millisecond
Nodes = Mapping[str, Node]
Trial = Callable[[Nodes], bool]


@dataclass(frozen=True)
class Attempt:
    """One row of the demo's table.

    `vm` and `direction` say whose firewall judges it, `decision` what it must answer.
    """

    what: str
    passes: bool
    vm: str
    direction: str
    decision: str
    run: Trial


def tcp(sender: str, receiver: str, port: int, family: int = 4, source: str | None = None) -> Trial:
    """Connect and send a word each way."""

    def run(nodes: Nodes) -> bool:
        address = nodes[receiver].address(family)
        with wire.listen(nodes[receiver], port) as server:
            try:
                near = wire.connect(nodes[sender], address, port, source, GIVE_UP)
            except OSError:
                return False
            with near, server.accept()[0] as far:
                far.settimeout(GIVE_UP)
                near.sendall(b"question")
                heard = far.recv(64)
                far.sendall(b"answer")
                return heard + near.recv(64) == b"questionanswer"

    return run


def udp(sender: str, receiver: str, port: int) -> Trial:
    """Send a datagram and await the answer."""

    def run(nodes: Nodes) -> bool:
        address = nodes[receiver].ipv4
        with (
            wire.receiver(nodes[receiver], port, socket.AF_INET) as server,
            wire.client(nodes[sender], socket.SOCK_DGRAM, address, timeout=GIVE_UP) as near,
        ):
            server.settimeout(GIVE_UP)
            near.sendto(b"question", (address, port))
            try:
                _, origin = server.recvfrom(64)
                server.sendto(b"answer", origin)
                return near.recv(64) == b"answer"
            except TimeoutError:
                return False

    return run


def ping(sender: str, receiver: str, family: int) -> Trial:
    """Send one echo request and await the reply."""
    return lambda nodes: wire.ping(nodes[sender], nodes[receiver].address(family), timeout=GIVE_UP)


def frame(sender: str, receiver: str, build: Callable[[Node, Node], bytes]) -> Trial:
    """Send a frame as only a raw socket can and see whether it arrives."""

    def run(nodes: Nodes) -> bool:
        near, far = nodes[sender], nodes[receiver]
        crafted = build(near, far)
        with wire.Tap(near) as here, wire.Tap(far) as there:
            here.send(crafted)
            return crafted in wire.arrivals(here, there, lambda seen: seen == crafted)

    return run


def _stolen_address(vm: Node, victim: Node) -> bytes:
    return _udp(("10.20.0.99", 4000), (victim.ipv4, 4000), vm.mac, victim.mac)


def _stolen_mac(vm: Node, victim: Node) -> bytes:
    return _udp((vm.ipv4, 4000), (victim.ipv4, 4000), "52:54:00:00:00:99", victim.mac)


def _stolen_arp(vm: Node, victim: Node) -> bytes:
    return wire.arp_request(vm.mac, "10.20.0.1", victim.ipv4)


def _dhcp_answer(vm: Node, _: Node) -> bytes:
    return _udp((vm.ipv4, 67), ("255.255.255.255", 68), vm.mac, wire.BROADCAST)


def _router_advertisement(vm: Node, _: Node) -> bytes:
    packet = {"src": "fe80::5054:ff:fe00:11", "dst": "ff02::1", "proto": "icmpv6"}
    return _frame({**packet, "icmp_type": 134, "length": 8}, vm.mac, "33:33:00:00:00:01")


def _udp(source: tuple[str, int], target: tuple[str, int], mac: str, to_mac: str) -> bytes:
    packet = {"src": source[0], "sport": source[1], "dst": target[0], "dport": target[1]}
    return _frame({**packet, "proto": "udp", "length": 240}, mac, to_mac)


def _frame(packet: Mapping[str, object], mac: str, to_mac: str) -> bytes:
    macs = {"source_mac": wire.mac_bytes(mac), "destination_mac": wire.mac_bytes(to_mac)}
    return build_frame(packet, **macs)


#: The decision that vgw's counters show -> what it says in plain words.
GUARDS = {
    "SPOOF_ADDRESS": "guard: not this VM's IP address",
    "SPOOF_MAC": "guard: not this VM's MAC address",
    "SPOOF_ARP": "guard: ARP for an address of others",
    "DHCP_SERVER": "guard: a VM is no DHCP server",
    "ROUTER_ADVERTISEMENT": "guard: a VM is no router",
}
DEFAULT_ACCEPT, DEFAULT_DROP = "default: accept", "default: drop"

ATTEMPTS = (
    Attempt("client opens the web page (tcp/80) of web01", True, "web01", "ingress",
        "web-tier / site", tcp("client", "web01", 80)),
    Attempt("the same over IPv6", True, "web01", "ingress",
        "web-tier / site", tcp("client", "web01", 80, family=6)),
    Attempt("client pings web01", True, "web01", "ingress",
        "reachable / ping", ping("client", "web01", 4)),
    Attempt("the same over IPv6", True, "web01", "ingress",
        "reachable / ping", ping("client", "web01", 6)),
    Attempt("the office logs in to web01 (tcp/22)", True, "web01", "ingress",
        "web-tier / ops", tcp("client", "web01", 22, source=OFFICE)),
    Attempt("client, not the office, does (tcp/22)", False, "web01", "ingress",
        DEFAULT_DROP, tcp("client", "web01", 22)),
    Attempt("the office uses telnet (tcp/23) on web01", False, "web01", "ingress",
        "guardrails / no-telnet", tcp("client", "web01", 23, source=OFFICE)),
    Attempt("client opens mysql (tcp/3306) on web01", False, "web01", "ingress",
        "web-tier / no-mysql", tcp("client", "web01", 3306)),
    Attempt("web01 opens a page on client (tcp/80)", True, "web01", "egress",
        DEFAULT_ACCEPT, tcp("web01", "client", 80)),
    Attempt("web01 opens the database (tcp/5432) of db01", True, "db01", "ingress",
        "db-tier / from-web", tcp("web01", "db01", 5432)),
    Attempt("client opens the database of db01", False, "db01", "ingress",
        DEFAULT_DROP, tcp("client", "db01", 5432)),
    Attempt("db01 asks client a DNS question (udp/53)", True, "db01", "egress",
        "db-tier / dns", udp("db01", "client", 53)),
    Attempt("db01 opens a page on client (tcp/80)", False, "db01", "egress",
        "db-tier / nothing-else", tcp("db01", "client", 80)),
    Attempt("web01 sends from an IP address not its own", False, "web01", "egress",
        GUARDS["SPOOF_ADDRESS"], frame("web01", "client", _stolen_address)),
    Attempt("web01 sends from a MAC address not its own", False, "web01", "egress",
        GUARDS["SPOOF_MAC"], frame("web01", "client", _stolen_mac)),
    Attempt("web01 claims the gateway's address by ARP", False, "web01", "egress",
        GUARDS["SPOOF_ARP"], frame("web01", "client", _stolen_arp)),
    Attempt("web01 answers as a DHCP server", False, "web01", "egress",
        GUARDS["DHCP_SERVER"], frame("web01", "client", _dhcp_answer)),
    Attempt("web01 advertises itself as IPv6 router", False, "web01", "egress",
        GUARDS["ROUTER_ADVERTISEMENT"], frame("web01", "client", _router_advertisement)),
)  # fmt: skip
