# SPDX-License-Identifier: Apache-2.0
"""Frames for tests: small builders that nest, from the upper layer out to Ethernet.

Upper-layer builders leave the checksum at zero; `ipv4` and `ipv6` fill it in, because it covers
their addresses. `Wire` knows who talks to whom and puts the right addresses on both layers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeVar

from vgw.abi import Path
from vgw.policy.frame import TCP_FLAG_LETTERS, group_mac, internet_checksum, seal

VM_MAC = bytes.fromhex("525400000011")
PAIR_MAC = bytes.fromhex("00005e000101")
GATEWAY_MAC = bytes.fromhex("525400000001")
OTHER_VM_MAC = bytes.fromhex("525400000012")
BROADCAST_MAC = b"\xff" * 6
MULTICAST_MAC = bytes.fromhex("333300000001")

VM4, VM6 = "10.20.0.11", "2001:db8:20::11"
VM_LINK_LOCAL = "fe80::5054:ff:fe00:11"
PAIR4 = "10.20.0.100"
UNSPECIFIED4 = "0.0.0.0"  # noqa: S104 (an address in packets, not a listener)
BROADCAST4 = "255.255.255.255"
PEER4, PEER6 = "192.0.2.10", "2001:db8:1::10"
STRANGER4, STRANGER6 = "198.51.100.7", "2001:db8:f::7"
GATEWAY4, GATEWAY6 = "10.20.0.1", "fe80::1"
OTHER_VM4, OTHER_VM6 = "10.20.0.12", "2001:db8:20::12"
ALL_HOSTS4, IGMP_ROUTERS4 = "224.0.0.1", "224.0.0.22"
ALL_NODES6, MLD_ROUTERS6 = "ff02::1", "ff02::16"

IPV4, IPV6, ARP, RARP, VLAN = 0x0800, 0x86DD, 0x0806, 0x8035, 0x8100
ICMP, IGMP, TCP, UDP, ICMPV6, SCTP = 1, 2, 6, 17, 58, 132
IGMP_ROUTER_ALERT = bytes.fromhex("94040000")
MLD_ROUTER_ALERT = bytes.fromhex("050200000100")
NOWHERE = IPv4Address(0)

Side = TypeVar("Side")


def ethernet(
    payload: bytes, ethertype: int, *, source: bytes = VM_MAC, destination: bytes = GATEWAY_MAC
) -> bytes:
    return destination + source + struct.pack("!H", ethertype) + payload


def tagged(frame: bytes, vlan: int, tpid: int = VLAN) -> bytes:
    """Put a tag in front of what a frame carries."""
    return frame[:12] + struct.pack("!HH", tpid, vlan) + frame[12:]


def arp(
    operation: int,
    sender: str,
    target: str,
    *,
    sender_mac: bytes = VM_MAC,
    target_mac: bytes = bytes(6),
    head: str = "000108000604",
) -> bytes:
    addresses = ip_address(sender).packed, ip_address(target).packed
    body = sender_mac + addresses[0] + target_mac + addresses[1]
    return bytes.fromhex(head) + struct.pack("!H", operation) + body


def ipv4(
    payload: bytes,
    protocol: int,
    source: str = VM4,
    destination: str = PEER4,
    *,
    options: bytes = b"",
    fragment: int = 0,
    total: int | None = None,
    ttl: int = 64,
    tos: int = 0,
    first_byte: int | None = None,
) -> bytes:
    """`fragment` is the whole field: flags and offset; `first_byte` version and IHL."""
    source_address, destination_address = IPv4Address(source), IPv4Address(destination)
    length = 20 + len(options)
    payload = seal(payload, protocol, source_address, destination_address)
    header = struct.pack(
        "!BBHHHBBH",
        0x40 | length // 4 if first_byte is None else first_byte,
        tos,
        length + len(payload) if total is None else total,
        1,
        fragment,
        ttl,
        protocol,
        0,
    )
    header += source_address.packed + destination_address.packed + options
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + payload


def ipv6(
    payload: bytes,
    protocol: int,
    source: str = VM6,
    destination: str = PEER6,
    *,
    headers: bytes = b"",
    first: int | None = None,
    length: int | None = None,
    hop_limit: int = 64,
    first_word: int = 6 << 28,
) -> bytes:
    """`headers` are extension headers and `first` the number of the first of them."""
    source_address, destination_address = IPv6Address(source), IPv6Address(destination)
    content = headers + seal(payload, protocol, source_address, destination_address)
    fixed = struct.pack(
        "!IHBB",
        first_word,
        len(content) if length is None else length,
        protocol if first is None else first,
        hop_limit,
    )
    return fixed + source_address.packed + destination_address.packed + content


def extension(next_header: int, body: bytes = bytes(6), units: int | None = None) -> bytes:
    """An extension header; `units` is its length byte, in eight bytes besides the first."""
    length = (len(body) + 2) // 8 - 1 if units is None else units
    return bytes([next_header, length]) + body


def hop_by_hop(next_header: int = ICMPV6, options: bytes = MLD_ROUTER_ALERT) -> bytes:
    return extension(next_header, options)


def fragment6(next_header: int, offset: int = 0, *, more: bool = False) -> bytes:
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, 7)


def tcp(
    sport: int = 40000,
    dport: int = 443,
    flags: str = "S",
    *,
    seq: int = 1000,
    ack: int | None = None,
    words: int = 5,
    payload: bytes = b"",
    extra_flags: int = 0,
) -> bytes:
    """`flags` are letters of SFRPAU, `words` the data offset, options belong to `payload`."""
    bits = extra_flags
    for letter in flags:
        bits |= TCP_FLAG_LETTERS[letter]
    acknowledged = (5000 if "A" in flags else 0) if ack is None else ack
    fields = (sport, dport, seq, acknowledged, words << 4, bits, 65535, 0, 0)
    return struct.pack("!HHIIBBHHH", *fields) + payload


def udp(
    sport: int = 40000, dport: int = 53, payload: bytes = b"", *, length: int | None = None
) -> bytes:
    size = 8 + len(payload) if length is None else length
    return struct.pack("!HHHH", sport, dport, size, 0) + payload


def sctp(sport: int = 40000, dport: int = 3868, payload: bytes = b"") -> bytes:
    return struct.pack("!HHII", sport, dport, 1, 0) + payload


def icmp(kind: int, code: int = 0, rest: int = 0, payload: bytes = b"") -> bytes:
    """Any ICMP or ICMPv6 message; `rest` is the second word of its header."""
    return struct.pack("!BBHI", kind, code, 0, rest) + payload


def echo(kind: int, identifier: int = 7, sequence: int = 1, payload: bytes = b"ping") -> bytes:
    return icmp(kind, 0, identifier << 16 | sequence, payload)


def icmp_error(kind: int, quoted: bytes, code: int = 0, rest: int | None = None) -> bytes:
    """An error; ICMPv6's packet too big (2) names an MTU of 1400 unless `rest` says otherwise."""
    if rest is None:
        rest = 1400 if kind == 2 else 0
    return icmp(kind, code, rest, quoted)


def link_layer(option: int, mac: bytes = VM_MAC) -> bytes:
    return bytes([option, 1]) + mac


def solicitation(target: str, options: bytes = b"", code: int = 0) -> bytes:
    return icmp(135, code, 0, IPv6Address(target).packed + options)


def advertisement(target: str, options: bytes = b"", rest: int = 0x60000000) -> bytes:
    return icmp(136, 0, rest, IPv6Address(target).packed + options)


def router_solicitation(options: bytes = b"") -> bytes:
    return icmp(133, 0, 0, options)


def router_advertisement(options: bytes = b"") -> bytes:
    return icmp(134, 0, 0x40000708, bytes(8) + options)


def igmp(kind: int, group: str = "239.1.2.3") -> bytes:
    return struct.pack("!BBH", kind, 0, 0) + IPv4Address(group).packed


def mld(kind: int, group: str = "ff02::fb") -> bytes:
    """A query, report or done of MLD version 1, or with kind 143 a report of version 2."""
    if kind == 143:
        return icmp(kind, 0, 1, bytes.fromhex("04000000") + IPv6Address(group).packed)
    return icmp(kind, 0, 0, IPv6Address(group).packed)


def bootp(
    operation: int = 1,
    *,
    client_mac: bytes = VM_MAC,
    hardware_type: int = 1,
    hardware_length: int = 6,
    relay: IPv4Address = NOWHERE,
) -> bytes:
    head = struct.pack("!BBBBIHH", operation, hardware_type, hardware_length, 0, 7, 0, 0)
    message = head + bytes(12) + relay.packed + client_mac + bytes(10) + bytes(192)
    return message + bytes.fromhex("63825363350101ff")


@dataclass(frozen=True, slots=True)
class Wire:
    """One direction of a conversation between the VM and a peer.

    `wrap4` and `wrap6` put a segment into a packet and a frame from the one to the other; what goes
    to a group of hosts goes to the MAC of that group.
    """

    path: Path
    local_mac: bytes = VM_MAC
    remote_mac: bytes = GATEWAY_MAC

    def frame(self, packet: bytes, ethertype: int, to: str | None = None) -> bytes:
        """Return a frame; `to` is the address that the packet goes to, if it has one."""
        source, destination = self._turn(self.local_mac, self.remote_mac)
        if to is not None:
            destination = group_mac(ip_address(to)) or destination
        return ethernet(packet, ethertype, source=source, destination=destination)

    def wrap4(
        self,
        segment: bytes,
        protocol: int,
        *,
        local: str = VM4,
        remote: str = PEER4,
        options: bytes = b"",
        fragment: int = 0,
        ttl: int = 64,
    ) -> bytes:
        source, destination = self._turn(local, remote)
        packet = ipv4(
            segment,
            protocol,
            source,
            destination,
            options=options,
            fragment=fragment,
            ttl=ttl,
        )
        return self.frame(packet, IPV4, destination)

    def wrap6(
        self,
        segment: bytes,
        protocol: int,
        *,
        local: str = VM6,
        remote: str = PEER6,
        headers: bytes = b"",
        first: int | None = None,
        hop_limit: int = 64,
    ) -> bytes:
        source, destination = self._turn(local, remote)
        packet = ipv6(
            segment,
            protocol,
            source,
            destination,
            headers=headers,
            first=first,
            hop_limit=hop_limit,
        )
        return self.frame(packet, IPV6, destination)

    def wrap(self, segment: bytes, protocol: int, local: str, remote: str) -> bytes:
        """Wrap by the family of the addresses."""
        if ip_address(local).version == 4:
            return self.wrap4(segment, protocol, local=local, remote=remote)
        return self.wrap6(segment, protocol, local=local, remote=remote)

    def _turn(self, local: Side, remote: Side) -> tuple[Side, Side]:
        return (local, remote) if self.path is Path.FROM_VM else (remote, local)


OUT = Wire(Path.FROM_VM)
IN = Wire(Path.TO_VM)


def igmp_frame(
    path: Path,
    message: bytes,
    destination: str = IGMP_ROUTERS4,
    *,
    source: str | None = None,
    options: bytes = b"",
) -> bytes:
    """Return the frame of an IGMP message, from the VM or for it, to a group (or wrongly not)."""
    if path is Path.FROM_VM:
        local, remote = source or VM4, destination
    else:
        local, remote = destination, source or GATEWAY4
    return Wire(path).wrap4(message, IGMP, local=local, remote=remote, options=options, ttl=1)


def mld_frame(
    path: Path,
    message: bytes,
    destination: str = MLD_ROUTERS6,
    *,
    source: str | None = None,
    headers: bytes | None = None,
    first: int = 0,
    hop_limit: int = 1,
) -> bytes:
    """As igmp_frame for MLD, behind a router alert unless `headers` and `first` say otherwise."""
    if path is Path.FROM_VM:
        local, remote = source or VM_LINK_LOCAL, destination
    else:
        local, remote = destination, source or GATEWAY6
    return Wire(path).wrap6(
        message,
        ICMPV6,
        local=local,
        remote=remote,
        headers=hop_by_hop() if headers is None else headers,
        first=first,
        hop_limit=hop_limit,
    )
