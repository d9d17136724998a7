# SPDX-License-Identifier: Apache-2.0
"""Frames of DHCP servers, right ones and all kinds of wrong ones."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from tests.frames import IPV4, UDP, ethernet, ipv4, ipv6, udp

MAC = bytes.fromhex("525400000011")
SERVER_MAC = bytes.fromhex("525400000001")
ALL_MAC = b"\xff" * 6
SERVER, SERVER6 = "10.20.0.1", "fe80::1"
LINK_LOCAL = "fe80::5054:ff:fe00:11"
ACK = 5


def option(code: int, value: bytes) -> bytes:
    return bytes([code, len(value)]) + value


def lease_options(kind: int = ACK, seconds: int | None = 3600) -> bytes:
    """Return the options that every acknowledgement has."""
    time = b"" if seconds is None else option(51, struct.pack("!I", seconds))
    return option(53, bytes([kind])) + option(54, IPv4Address(SERVER).packed) + time


def message4(
    address: str = "10.20.0.50",
    *,
    options: bytes | None = None,
    client: bytes = MAC,
    operation: int = 2,
    hardware: bytes = b"\x01\x06",
    cookie: bytes = bytes.fromhex("63825363"),
    file: bytes = b"",
    name: bytes = b"",
) -> bytes:
    """Return a DHCPv4 message, by default the acknowledgement of a lease."""
    head = bytes([operation]) + hardware + bytes(1) + b"\x12\x34\x56\x78" + bytes(4)
    addresses = bytes(4) + IPv4Address(address).packed + bytes(8)
    fields = client.ljust(16, b"\0") + name.ljust(64, b"\0") + file.ljust(128, b"\0")
    body = lease_options() if options is None else options
    return head + addresses + fields + cookie + body + b"\xff"


def frame4(
    message: bytes | None = None,
    *,
    to: str = "255.255.255.255",
    mac: bytes = ALL_MAC,
    source: str = SERVER,
    ports: tuple[int, int] = (67, 68),
) -> bytes:
    """Return the frame of a DHCPv4 message from a server."""
    payload = udp(*ports, message4() if message is None else message)
    packet = ipv4(payload, UDP, source, to)
    return ethernet(packet, IPV4, source=SERVER_MAC, destination=mac)


def option6(code: int, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value


def address6(address: str = "2001:db8:20::50", seconds: int = 3600, options: bytes = b"") -> bytes:
    """Return an IA Address option."""
    return option6(5, IPv6Address(address).packed + struct.pack("!II", seconds, seconds) + options)


def association(content: bytes, code: int = 3) -> bytes:
    """Return an option of an identity association, by default one of addresses."""
    return option6(code, bytes(12) + content)


def status(code: int) -> bytes:
    return option6(13, struct.pack("!H", code))


def message6(content: bytes | None = None, kind: int = 7) -> bytes:
    """Return a DHCPv6 message, by default the reply that leases an address."""
    body = association(address6()) if content is None else content
    return bytes([kind]) + b"abc" + option6(1, b"client") + option6(2, b"server") + body


def frame6(
    message: bytes | None = None,
    *,
    to: str = LINK_LOCAL,
    mac: bytes = MAC,
    ports: tuple[int, int] = (547, 546),
) -> bytes:
    """Return the frame of a DHCPv6 message from a server."""
    payload = udp(*ports, message6() if message is None else message)
    packet = ipv6(payload, UDP, SERVER6, to)
    return ethernet(packet, 0x86DD, source=SERVER_MAC, destination=mac)
