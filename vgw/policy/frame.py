# SPDX-License-Identifier: Apache-2.0
"""Makes an Ethernet frame from the description of a packet that a user gives to `simulate`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address

from vgw.errors import VgwError
from vgw.policy.model import (
    ECHO_REPLY,
    ECHO_REQUEST,
    ICMP,
    ICMP_PROTOCOLS,
    ICMPV6,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Address,
)
from vgw.policy.packet_fields import (
    ACK,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    FIN,
    LIMITED_BROADCAST,
    PSH,
    RST,
    SYN,
    URG,
    is_group,
)

PROTOCOL_NUMBERS = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": ICMP, "icmpv6": ICMPV6}
TCP_FLAG_LETTERS = {"F": FIN, "S": SYN, "R": RST, "P": PSH, "A": ACK, "U": URG}
#: Protocol -> where its header holds the Internet checksum. SCTP's is another one.
CHECKSUM_OFFSETS = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2, 2: 2}
#: Key of a description -> protocols that have such a field; keys that are not here fit every one.
FIELDS_OF_PROTOCOLS = {
    "sport": PORT_PROTOCOLS,
    "dport": PORT_PROTOCOLS,
    "flags": frozenset({TCP}),
    "icmp_type": ICMP_PROTOCOLS,
    "icmp_code": ICMP_PROTOCOLS,
    "icmp_id": ICMP_PROTOCOLS,
}
KNOWN_FIELDS = frozenset({"src", "dst", "proto", "vlan", "length", *FIELDS_OF_PROTOCOLS})
ICMP_TYPE_NAMES = {"echo-request": ECHO_REQUEST, "echo-reply": ECHO_REPLY}
ND_TYPES = range(133, 138)
MAX_PAYLOAD = 1400
#: Sequence number of a SYN of either side.
FIRST_SEQUENCE = 1000


class FieldError(VgwError):
    """A packet description is wrong: `field` is at fault, `problem` says how."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"packet description, field {field}: {problem}")
        self.field = field
        self.problem = problem


def build_frame(
    description: Mapping[str, object], *, source_mac: bytes, destination_mac: bytes
) -> bytes:
    """Return the Ethernet frame of a packet description.

    Keys: `src`, `dst` (addresses of one family), `proto` (tcp, udp, sctp, icmp, icmpv6 or a
    number), `sport`, `dport`, `flags` (TCP, letters of SFRPAU, default S), `icmp_type` (default
    echo request), `icmp_code`, `icmp_id`, `vlan` (one 802.1Q id), `length` (bytes of payload behind
    the upper header). Checksums and lengths are right. A packet to a group goes to the group's MAC.
    Raises FieldError.
    """
    unknown = sorted(set(description) - KNOWN_FIELDS)
    if unknown:
        raise FieldError(unknown[0], f"unknown field; known are {', '.join(sorted(KNOWN_FIELDS))}")
    source, destination = _addresses(description)
    protocol = _protocol(description)
    for name, protocols in FIELDS_OF_PROTOCOLS.items():
        if name in description and protocol not in protocols:
            raise FieldError(name, f"protocol {protocol} has no such field; leave it out")
    if protocol == (ICMPV6 if source.version == 4 else ICMP):
        problem = f"protocol {protocol} does not go with IPv{source.version} addresses"
        raise FieldError("proto", problem)
    segment = seal(_segment(description, protocol), protocol, source, destination)
    hop_limit = 255 if protocol == ICMPV6 and segment[0] in ND_TYPES else 64
    packet = _ip_packet(segment, protocol, source, destination, hop_limit)
    ethertype = ETHERTYPE_IPV4 if source.version == 4 else ETHERTYPE_IPV6
    tag = b""
    if "vlan" in description:
        tag = struct.pack("!HH", 0x8100, _integer(description, "vlan", 1, 4094))
    to = group_mac(destination) or destination_mac
    return to + source_mac + tag + struct.pack("!H", ethertype) + packet


def group_mac(address: Address) -> bytes | None:
    """Return the MAC that packets to a group go to (RFC 1112, 6.4; RFC 2464, 7), else None."""
    if not is_group(address):
        return None
    if address == LIMITED_BROADCAST:
        return b"\xff" * 6
    if address.version == 6:
        return b"\x33\x33" + address.packed[-4:]
    return b"\x01\x00\x5e" + bytes([address.packed[1] & 0x7F]) + address.packed[2:]


def internet_checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of some bytes."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def seal(segment: bytes, protocol: int, source: Address, destination: Address) -> bytes:
    """Return an upper-layer segment with its checksum filled in, if its protocol has one."""
    if protocol == SCTP and len(segment) >= 12:
        blank = segment[:8] + bytes(4) + segment[12:]
        return segment[:8] + struct.pack("<I", crc32c(blank)) + segment[12:]
    offset = CHECKSUM_OFFSETS.get(protocol)
    if offset is None or len(segment) < offset + 2:
        return segment
    pseudo_header = b""
    if protocol in {TCP, UDP, ICMPV6}:
        layout = "!BBH" if source.version == 4 else "!II"
        rest = (0, protocol, len(segment)) if source.version == 4 else (len(segment), protocol)
        pseudo_header = source.packed + destination.packed + struct.pack(layout, *rest)
    blank = segment[:offset] + bytes(2) + segment[offset + 2 :]
    checksum = internet_checksum(pseudo_header + blank)
    if protocol == UDP and checksum == 0:
        checksum = 0xFFFF  # zero would say that there is no checksum
    return segment[:offset] + struct.pack("!H", checksum) + segment[offset + 2 :]


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes, which SCTP uses as its checksum."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def _segment(description: Mapping[str, object], protocol: int) -> bytes:
    payload = bytes(_integer(description, "length", 0, MAX_PAYLOAD, 0))
    if protocol in PORT_PROTOCOLS:
        ports = struct.pack(
            "!HH",
            _integer(description, "sport", 0, 65535, 40000),
            _integer(description, "dport", 0, 65535),
        )
        if protocol == UDP:
            return ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        if protocol == SCTP:
            return ports + struct.pack("!II", 1, 0) + payload
        flags = _tcp_flags(description)
        # Numbers that fit each other in whichever order segments of both sides come.
        sequence = FIRST_SEQUENCE if flags & SYN else FIRST_SEQUENCE + 1
        acknowledgement = FIRST_SEQUENCE + 1 if flags & ACK else 0
        header = struct.pack("!IIBBHHH", sequence, acknowledgement, 0x50, flags, 65535, 0, 0)
        return ports + header + payload
    if protocol in ICMP_PROTOCOLS:
        kind = _icmp_type(description, protocol)
        code = _integer(description, "icmp_code", 0, 255, 0)
        identifier = _integer(description, "icmp_id", 0, 65535, 1)
        return struct.pack("!BBHHH", kind, code, 0, identifier, 1) + payload
    # An IPv6 packet without any payload is none; give a protocol without a header eight bytes.
    return payload if "length" in description else bytes(8)


def _ip_packet(
    segment: bytes, protocol: int, source: Address, destination: Address, hop_limit: int
) -> bytes:
    if isinstance(source, IPv4Address):
        fields = (0x45, 0, 20 + len(segment), 0, 0x4000, hop_limit, protocol, 0)
        header = struct.pack("!BBHHHBBH", *fields) + source.packed + destination.packed
        return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + segment
    header = struct.pack("!IHBB", 6 << 28, len(segment), protocol, hop_limit)
    return header + source.packed + destination.packed + segment


def _addresses(description: Mapping[str, object]) -> tuple[Address, Address]:
    found = []
    for name in ("src", "dst"):
        value = description.get(name)
        try:
            if not isinstance(value, str):
                raise ValueError
            found.append(ip_address(value))
        except ValueError:
            raise FieldError(name, f"{value!r} is not an IP address") from None
    source, destination = found
    if source.version != destination.version:
        raise FieldError("dst", f"IPv{destination.version}, but src is IPv{source.version}")
    return source, destination


def _protocol(description: Mapping[str, object]) -> int:
    value = description.get("proto")
    if isinstance(value, str) and value.lower() in PROTOCOL_NUMBERS:
        return PROTOCOL_NUMBERS[value.lower()]
    return _integer(description, "proto", 0, 255)


def _icmp_type(description: Mapping[str, object], protocol: int) -> int:
    value = description.get("icmp_type", "echo-request")
    if isinstance(value, str) and value in ICMP_TYPE_NAMES:
        return ICMP_TYPE_NAMES[value][protocol]
    return _integer(description, "icmp_type", 0, 255)


def _tcp_flags(description: Mapping[str, object]) -> int:
    letters = description.get("flags", "S")
    if not isinstance(letters, str) or not set(letters.upper()) <= set(TCP_FLAG_LETTERS):
        raise FieldError("flags", f"{letters!r} is not made of the letters S A F R P U")
    flags = 0
    for letter in letters.upper():
        flags |= TCP_FLAG_LETTERS[letter]
    return flags


def _integer(
    description: Mapping[str, object], name: str, low: int, high: int, default: int | None = None
) -> int:
    value = description.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        problem = "it is missing" if value is None else f"{value!r} is wrong"
        names = f"{', '.join(PROTOCOL_NUMBERS)} or " if name == "proto" else ""
        raise FieldError(name, f"{problem}; give {names}a number from {low} to {high}")
    return value
