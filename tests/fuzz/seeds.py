# SPDX-License-Identifier: Apache-2.0
"""Frames to start from, made with scapy: every protocol of the catalogue, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import DHCP6_Advertise, DHCP6_Request, DHCP6_Solicit
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLDone,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    RouterAlert,
)
from scapy.layers.ipsec import AH, ESP
from scapy.layers.l2 import ARP, GRE, LLC, SNAP, STP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from tests.frames import (
    ALL_NODES6,
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    MLD_ROUTERS6,
    OTHER_VM4,
    PAIR4,
    PAIR_MAC,
    PEER4,
    PEER6,
    STRANGER4,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    VM_MAC,
    igmp,
)
from vgw.abi import Path

Seed = tuple[Path, bytes]
BROADCAST: Final = "ff:ff:ff:ff:ff:ff"
GROUP4: Final = "239.1.2.3"


def _mac(raw: bytes) -> str:
    return raw.hex(":")


class _Side:
    """The fixed parts of frames that go along one path."""

    def __init__(self, path: Path, vm4: str = VM4, vm_mac: bytes = VM_MAC) -> None:
        here, there = (0, 1) if path is Path.FROM_VM else (1, 0)
        macs = _mac(vm_mac), _mac(GATEWAY_MAC)
        hosts4, hosts6, near = (vm4, PEER4), (VM6, PEER6), (VM_LINK_LOCAL, GATEWAY6)
        self.mac = macs[here]
        self.ether = Ether(src=macs[here], dst=macs[there])
        self.ip = IP(src=hosts4[here], dst=hosts4[there], id=1)
        self.back = IP(src=hosts4[there], dst=hosts4[here], id=1)
        self.ip6 = IPv6(src=hosts6[here], dst=hosts6[there])
        self.back6 = IPv6(src=hosts6[there], dst=hosts6[here])
        self.link_local = near[here]
        self.near6 = IPv6(src=near[here], dst=near[there], hlim=255)
        self.own = (VM4, GATEWAY4)[here]

    def group4(self, address: str) -> Packet:
        low = bytes(int(part) for part in address.split("."))
        mac = bytes([1, 0, 0x5E, low[1] & 0x7F, low[2], low[3]])
        return Ether(src=self.mac, dst=_mac(mac)) / IP(src=self.ip.src, dst=address, ttl=1)

    def group6(self, address: str, **fields: Any) -> Packet:
        mac = b"\x33\x33\0\0\0" + bytes([int(address.rsplit(":", 1)[1] or "0", 16) & 0xFF])
        ether = Ether(src=self.mac, dst=_mac(mac))
        return ether / IPv6(src=self.link_local, dst=address, **fields)


def _link_layer(side: _Side) -> Iterator[Packet]:
    udp = UDP(sport=40000, dport=53) / Raw(b"query")
    for tags in (
        Dot1Q(vlan=100),
        Dot1Q(vlan=4094),
        Dot1Q(vlan=0),
        Dot1Q(vlan=5),
        Dot1Q(vlan=100) / Dot1Q(vlan=5),
        Dot1AD(vlan=100) / Dot1Q(vlan=5),
    ):
        yield side.ether / tags / side.ip / udp
        yield side.ether / tags / side.ip6 / TCP(sport=40000, dport=443, flags="S", seq=1000)
    yield side.ether / LLC() / SNAP(code=0x0800) / side.ip / udp
    yield Ether(src=side.mac, dst="01:80:c2:00:00:00", type=38) / LLC() / STP()
    for ethertype in (0x88CC, 0x8847, 0x8863, 0x88F7, 0x0842, 0x22F3):
        yield Ether(src=side.mac, dst=side.ether.dst, type=ethertype) / Raw(bytes(46))
    for operation in (1, 2):
        for target in (GATEWAY4, VM4, OTHER_VM4, PAIR4):
            for sender in (side.own, UNSPECIFIED4, target):
                message = ARP(op=operation, hwsrc=side.mac, psrc=sender, pdst=target)
                yield Ether(src=side.mac, dst=BROADCAST) / message
    yield Ether(src=side.mac, dst=BROADCAST, type=0x8035) / ARP(
        op=3, hwsrc=side.mac, hwdst=side.mac, psrc=UNSPECIFIED4, pdst=UNSPECIFIED4
    )


def _transports(side: _Side) -> Iterator[Packet]:
    for network in (side.ether / side.ip, side.ether / side.ip6):
        for ports in ((40000, 443), (40000, 23), (40000, 22), (443, 40000), (40000, 3306)):
            for flags in ("S", "SA", "A", "PA", "FA", "R", "RA"):
                yield network / TCP(sport=ports[0], dport=ports[1], flags=flags, seq=1000, ack=5000)
            yield network / UDP(sport=ports[0], dport=ports[1]) / Raw(b"data")
        options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("WScale", 7)]
        yield network / TCP(sport=40001, dport=443, flags="S", seq=1000, options=options)
        yield network / UDP(sport=40000, dport=53) / Raw(b"query")
        yield network / UDP(sport=53, dport=40000) / Raw(b"answer")
        yield network / UDP(sport=40000, dport=4789) / VXLAN(vni=1) / side.ether / side.ip
        yield network / SCTP(sport=40000, dport=3868, tag=0) / SCTPChunkInit(init_tag=1)
        yield network / GRE() / side.back / UDP(sport=1, dport=2)
        yield network / GRE(key_present=1, key=7) / Raw(bytes(20))
        yield network / ESP(spi=1, seq=1, data=bytes(24))
        yield network / AH(nh=6, spi=1, seq=1, payloadlen=4, icv=bytes(12)) / TCP(dport=443)
        yield network / side.back / UDP(sport=53, dport=40000)
        yield network / side.back6 / UDP(sport=53, dport=40000)


def _ipv4(side: _Side) -> Iterator[Packet]:
    udp = UDP(sport=40000, dport=53) / Raw(b"x" * 64)
    for option in (b"\x94\x04\0\0", b"\x83\x07\x04\x0a\0\0\x01\0", b"\x07\x07\x04\0\0\0\0\0"):
        network = IP(src=side.ip.src, dst=side.ip.dst, options=IPOption(option))
        yield side.ether / network / udp
    for protocol in (0, 61, 89, 103, 112, 115, 253, 255):
        yield side.ether / IP(src=side.ip.src, dst=side.ip.dst, proto=protocol) / Raw(bytes(24))
    for flags, offset, payload in (
        ("MF", 0, udp),
        ("MF", 0, Raw(bytes(8))),
        ("MF", 9, Raw(bytes(64))),
        (0, 9, Raw(bytes(10))),
        (0, 1, Raw(bytes(16))),
        (0, 8190, Raw(bytes(64))),
    ):
        network = IP(src=side.ip.src, dst=side.ip.dst, id=7, flags=flags, frag=offset, proto=17)
        yield side.ether / network / payload
    for kind in (0, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 17):
        yield side.ether / side.ip / ICMP(type=kind, id=7, seq=1) / Raw(b"ping" * 8)
    for kind, code in ((3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (12, 0)):
        for quoted in (
            TCP(sport=443, dport=40000, flags="A", seq=5001),
            UDP(sport=53, dport=40000) / Raw(b"answer"),
            ICMP(type=8, id=7),
            SCTP(sport=3868, dport=40000),
            GRE() / Raw(bytes(8)),
        ):
            error = ICMP(type=kind, code=code, nexthopmtu=1400 if code == 4 else 0)
            yield side.ether / side.ip / error / side.back / quoted
    for kind in (0x11, 0x12, 0x16, 0x17, 0x22):
        for address in (GROUP4, "224.0.0.22"):
            for options in ([IPOption(b"\x94\x04\0\0")], []):
                frame = side.group4(address)
                frame[IP].options, frame[IP].proto = options, 2
                yield frame / Raw(igmp(kind))
    yield side.group4(GROUP4) / UDP(sport=40000, dport=5353) / Raw(b"mdns")
    yield side.group4(GROUP4) / ICMP(type=8, id=7)


def _ipv6(side: _Side) -> Iterator[Packet]:
    udp = UDP(sport=40000, dport=53) / Raw(b"x" * 64)
    for headers in (
        IPv6ExtHdrHopByHop(),
        IPv6ExtHdrDestOpt(),
        IPv6ExtHdrRouting(type=0, addresses=[PEER6]),
        IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(),
        IPv6ExtHdrFragment(id=7),
        IPv6ExtHdrFragment(id=7, m=1),
        IPv6ExtHdrFragment(id=7) / IPv6ExtHdrFragment(id=8),
        IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(id=7, m=1),
    ):
        yield side.ether / side.ip6 / headers / udp
    yield side.ether / side.ip6 / IPv6ExtHdrFragment(id=7, offset=9, nh=17) / Raw(bytes(64))
    for protocol in (59, 103, 135, 139, 140, 143, 253):
        header = IPv6(src=side.ip6.src, dst=side.ip6.dst, nh=protocol)
        yield side.ether / header / Raw(b"\x06\x11\x3a\x2c" * 6)
    for quoted in (
        TCP(sport=443, dport=40000, flags="A", seq=5001),
        UDP(sport=53, dport=40000) / Raw(b"answer"),
        ICMPv6EchoRequest(id=7),
        SCTP(sport=3868, dport=40000),
    ):
        for error in (
            ICMPv6DestUnreach(code=1),
            ICMPv6PacketTooBig(mtu=1280),
            ICMPv6PacketTooBig(mtu=600),
            ICMPv6TimeExceeded(),
            ICMPv6ParamProblem(),
        ):
            yield side.ether / side.ip6 / error / side.back6 / quoted
    yield side.ether / side.ip6 / ICMPv6EchoRequest(id=7, data=b"ping")
    yield side.ether / side.ip6 / ICMPv6EchoReply(id=7, data=b"ping")


def _neighbours(side: _Side) -> Iterator[Packet]:
    source, target = ICMPv6NDOptSrcLLAddr(lladdr=side.mac), ICMPv6NDOptDstLLAddr(lladdr=side.mac)
    near = side.ether / side.near6
    group = side.group6(ALL_NODES6, hlim=255)
    for address in (VM6, VM_LINK_LOCAL, GATEWAY6, PEER6):
        yield near / ICMPv6ND_NS(tgt=address) / source
        yield near / ICMPv6ND_NS(tgt=address)
        yield near / ICMPv6ND_NA(tgt=address) / target
        yield group / ICMPv6ND_NA(tgt=address, R=0) / target
        probe = side.group6("ff02::1:ff00:11", hlim=255)
        probe[IPv6].src = "::"
        yield probe / ICMPv6ND_NS(tgt=address)
    yield side.group6("ff02::2", hlim=255) / ICMPv6ND_RS() / source
    yield group / ICMPv6ND_RA() / ICMPv6NDOptPrefixInfo(prefix="2001:db8:20::") / source
    yield near / ICMPv6ND_Redirect(tgt=GATEWAY6, dst=PEER6)
    for message, address in (
        (ICMPv6MLQuery(), ALL_NODES6),
        (ICMPv6MLReport(mladdr="ff02::fb"), "ff02::fb"),
        (ICMPv6MLDone(mladdr="ff02::fb"), "ff02::2"),
        (ICMPv6MLReport2(), MLD_ROUTERS6),
    ):
        alert = IPv6ExtHdrHopByHop(options=[RouterAlert()])
        yield side.group6(address, hlim=1) / alert / message
        yield side.group6(address, hlim=1) / message


def _dhcp(side: _Side) -> Iterator[Packet]:
    mac = VM_MAC
    for source, destination, ether in (
        (UNSPECIFIED4, "255.255.255.255", BROADCAST),
        (side.ip.src, "255.255.255.255", BROADCAST),
        (side.ip.src, side.ip.dst, side.ether.dst),
    ):
        network = Ether(src=side.mac, dst=ether) / IP(src=source, dst=destination)
        yield (
            network
            / UDP(sport=68, dport=67)
            / BOOTP(op=1, chaddr=mac)
            / DHCP(options=[("message-type", "discover"), "end"])
        )
        yield (
            network
            / UDP(sport=67, dport=68)
            / BOOTP(op=2, chaddr=mac)
            / DHCP(options=[("message-type", "offer"), "end"])
        )
    servers = side.group6("ff02::1:2")
    yield servers / UDP(sport=546, dport=547) / DHCP6_Solicit()
    yield servers / UDP(sport=547, dport=546) / DHCP6_Advertise()
    yield side.ether / side.near6 / UDP(sport=546, dport=547) / DHCP6_Request()
    yield side.ether / side.near6 / UDP(sport=547, dport=546) / DHCP6_Advertise()


def make_seeds() -> Iterator[Seed]:
    """Yield the frames; takes a second or two."""
    for path in Path:
        side = _Side(path)
        for make in (_link_layer, _transports, _ipv4, _ipv6, _neighbours, _dhcp):
            for frame in make(side):
                yield path, bytes(frame)
        for address, mac in ((PAIR4, PAIR_MAC), ("10.20.0.201", VM_MAC), (STRANGER4, VM_MAC)):
            for frame in _transports(_Side(path, address, mac)):
                yield path, bytes(frame)
