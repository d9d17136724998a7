# SPDX-License-Identifier: Apache-2.0
"""The packets that are measured: between a VM and a network of peers, each with its Frame.

Of a connection, the peer's address and the opener's port differ from value to value, so there are
as many connections as values; of what opens none, the sender's address and port do.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Final

from bench.cost.rules import DENIED_PORT
from bench.paths.vary import Frame
from vgw.abi import Path
from vgw.policy.frame import build_frame
from vgw.policy.model import Address, Network

MAC: Final = "52:54:00:00:00:11"
ADDRESSES: Final[Mapping[int, Address]] = {
    4: ip_address("10.20.0.11"),
    6: ip_address("2001:db8:20::11"),
}
#: Where the peers are. The frame of value 0 has the first one.
PEERS: Final[Mapping[int, Network]] = {
    4: ip_network("10.32.0.0/12"),
    6: ip_network("2001:db8:30::/64"),
}
_PEER_MAC: Final = bytes.fromhex("525400000002")
_FOREIGN_MAC: Final = bytes.fromhex("525400000099")
_MAC: Final = bytes.fromhex(MAC.replace(":", ""))
#: Of whoever claims to be another: no VM's.
_FORGED: Final[Mapping[int, str]] = {4: "203.0.0.1", 6: "2001:db8:ffff::1"}
#: Of the side that opens: as many numbers as a half has bits follow it.
_OPENER_PORT: Final = 0x8000
_SERVICE_PORT: Final = 443
_PAYLOAD: Final = 18
_LINK: Final = 14
_HEADER: Final = {4: 20, 6: 40}
#: Behind the Ethernet header: the last four bytes of both addresses.
_SOURCE: Final = {4: 12, 6: 20}
_DESTINATION: Final = {4: 16, 6: 36}
_SOURCE_BEGIN: Final = {4: 12, 6: 8}
_LENGTH: Final = {4: _LINK + 2, 6: _LINK + 4}
#: Where the word of offset and flags is, and the last two bytes of the identification: of IPv6 in
#: a header of its own (RFC 8200, 4.5).
_FRAGMENT: Final = {4: _LINK + 6, 6: _LINK + 40 + 2}
_IDENTIFICATION: Final = {4: _LINK + 4, 6: _LINK + 40 + 6}
_MORE_FRAGMENTS: Final = {4: 0x2000, 6: 1}
_IPV6_NEXT_HEADER: Final = _LINK + 6
_FRAGMENT_HEADER: Final = 44
#: Payload of a datagram in its first fragment, a multiple of eight with the UDP header.
_FIRST_BYTES: Final = 24


def peer(version: int) -> str:
    """Return the address of the peer of value 0."""
    return str(PEERS[version].network_address + 1)


def packet(  # noqa: PLR0913, PLR0917 - what a packet is
    path: Path, version: int, protocol: str, opener: Path, flags: str = "", port: int = 0
) -> Frame:
    """Return a packet on a path, of the connections that a side opened.

    `flags` are TCP's; `port` is the opened one, by default one that rules accept.
    """
    near, far = str(ADDRESSES[version]), peer(version)
    forward = path is opener
    ports = (_OPENER_PORT, port or _SERVICE_PORT)
    more: dict[str, object] = {"flags": flags} if flags else {"length": _PAYLOAD}
    description = {
        "src": far if path is Path.TO_VM else near,
        "dst": near if path is Path.TO_VM else far,
        "proto": protocol,
        "sport": ports[0 if forward else 1],
        "dport": ports[1 if forward else 0],
        **more,
    }
    first_port = _LINK + _HEADER[version]
    peer_place = _SOURCE if path is Path.TO_VM else _DESTINATION
    return Frame(
        _frame(path, description),
        word=_LINK + peer_place[version],
        half=first_port if forward else first_port + 2,
    )


def denied(version: int, path: Path) -> Frame:
    """Return a datagram that a rule denies; its sender's port and the peer's address differ."""
    return packet(path, version, "udp", path, port=DENIED_PORT)


def forged(version: int, path: Path) -> Frame:
    """Return a packet that a guard refuses.

    From the VM it has another's source address, toward the VM another's MAC.
    """
    frame = packet(path, version, "udp", path)
    if path is Path.TO_VM:
        return replace(frame, data=_FOREIGN_MAC + frame.data[6:])
    address = ip_address(_FORGED[version]).packed
    begin = _LINK + _SOURCE_BEGIN[version]
    data = frame.data[:begin] + address + frame.data[begin + len(address) :]
    return replace(frame, data=data, word=_LINK + _SOURCE[version])


def first_fragment(version: int, opener: Path, path: Path) -> Frame:
    """Return the first fragment of a datagram of an open connection; the identification differs."""
    frame = packet(path, version, "udp", opener)
    end = _LINK + _HEADER[version]
    network, upper = bytearray(frame.data[:end]), bytearray(frame.data[end : end + _FIRST_BYTES])
    struct.pack_into("!H", upper, 4, 2 * _FIRST_BYTES)  # the length that UDP says
    half = frame.half
    if version == 6:
        network += bytes([network[_IPV6_NEXT_HEADER], *bytes(7)])
        network[_IPV6_NEXT_HEADER] = _FRAGMENT_HEADER
        half = None if half is None else half + 8
    counted = len(network) - end + len(upper) + (_HEADER[4] if version == 4 else 0)
    struct.pack_into("!H", network, _LENGTH[version], counted)
    struct.pack_into("!H", network, _FRAGMENT[version], _MORE_FRAGMENTS[version])
    data = bytes(network + upper)
    return replace(frame, data=data, half=half, number=_IDENTIFICATION[version])


def later_fragment(version: int, opener: Path, path: Path) -> Frame:
    """Return the rest of the datagram of value 0."""
    first = first_fragment(version, opener, path)
    rest = bytearray(first.data)
    offset = _FIRST_BYTES // 8 if version == 4 else _FIRST_BYTES
    struct.pack_into("!H", rest, _FRAGMENT[version], offset)
    return replace(first, data=bytes(rest), half=None)


def arp(path: Path) -> Frame:
    """Return an ARP request of whoever sends on a path for the other side's address."""
    near, far = ADDRESSES[4].packed, ip_address(peer(4)).packed
    sender = (_PEER_MAC, far) if path is Path.TO_VM else (_MAC, near)
    target = near if path is Path.TO_VM else far
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    request = body + b"".join(sender) + bytes(6) + target
    return Frame(b"\xff" * 6 + sender[0] + b"\x08\x06" + request)


def _frame(path: Path, description: Mapping[str, object]) -> bytes:
    source, destination = (_PEER_MAC, _MAC) if path is Path.TO_VM else (_MAC, _PEER_MAC)
    return build_frame(description, source_mac=source, destination_mac=destination)
