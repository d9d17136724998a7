# SPDX-License-Identifier: Apache-2.0
"""What a packet is to the firewall: the values that parsing leaves for guards, flows and rules.

All numbers are host order, all MAC addresses six raw bytes. `Span` and `UnreadableError` are the
tools of the readers in packet.py, packet_upper.py and packet_icmp.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from vgw.abi import Reason
from vgw.policy.model import ECHO_REPLY, ECHO_REQUEST, Address

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_RARP = 0x8035
ETHERTYPE_IPV6 = 0x86DD

ARP_REQUEST, ARP_REPLY, RARP_REQUEST = 1, 2, 3

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT = 133, 134
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136

LIMITED_BROADCAST = IPv4Address("255.255.255.255")


class Membership(enum.Enum):
    """What an IGMP or MLD message does."""

    QUERY = "query"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Arp:
    """An ARP or RARP message over Ethernet and IPv4."""

    operation: int
    sender_mac: bytes
    sender: IPv4Address
    target_mac: bytes
    target: IPv4Address


@dataclass(frozen=True, slots=True)
class Tcp:
    """The parts of a TCP segment that connection tracking reads; `payload` is in bytes."""

    flags: int
    sequence: int
    acknowledgement: int
    payload: int = 0


@dataclass(frozen=True, slots=True)
class Icmp:
    """An ICMP header over IPv4 or an ICMPv6 header over IPv6.

    `echo` is the protocol's view of the type: True a request, False a reply, None neither.
    `identifier` means something for echo only.
    """

    type: int
    code: int
    identifier: int
    echo: bool | None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour discovery message: its target (NS and NA) and its link-layer option."""

    target: IPv6Address | None = None
    link_layer: bytes | None = None


@dataclass(frozen=True, slots=True)
class Bootp:
    """The fields of a DHCP client's message that tie it to its sender."""

    operation: int
    hardware_type: int
    hardware_length: int
    relay: IPv4Address
    client_mac: bytes


@dataclass(frozen=True, slots=True)
class Quoted:
    """The packet an ICMP error speaks of; for echo both ports are the identifier.

    `tcp_sequence` means something for TCP only.
    """

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    echo: bool | None = None
    tcp_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Fragment:
    """Which part of which datagram a packet is; offset and length are bytes of the IP payload.

    `protocol` is what the fragment's own header names, with IPv6 that behind the fragment header.
    """

    identification: int
    offset: int
    length: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame as far as it could be read.

    `reason` is Reason.NONE when it was read to the end of its upper header, else why not; then the
    fields read before that point are still filled, for logs. `vlan` 0 is untagged. Nothing above IP
    is read of a fragment that is not the first of its datagram.
    """

    reason: Reason = Reason.NONE
    length: int = 0
    destination_mac: bytes = b""
    source_mac: bytes = b""
    vlan: int = 0
    ethertype: int = 0
    arp: Arp | None = None
    source: Address | None = None
    destination: Address | None = None
    hop_limit: int = 0
    router_alert: bool = False
    fragment_header: bool = False
    fragment: Fragment | None = None
    protocol: int | None = None
    source_port: int = 0
    destination_port: int = 0
    tcp: Tcp | None = None
    icmp: Icmp | None = None
    neighbour: Neighbour | None = None
    membership: Membership | None = None
    bootp: Bootp | None = None
    quoted: Quoted | None = None

    @property
    def is_later_fragment(self) -> bool:
        """Whether this is a fragment, and not the first one of its datagram."""
        return self.fragment is not None and self.fragment.offset > 0


def is_group(address: Address | None) -> bool:
    """Tell whether an address stands for many: multicast, or IPv4's limited broadcast."""
    return address is not None and (address.is_multicast or address == LIMITED_BROADCAST)


class UnreadableError(Exception):
    """Ends the reading of a frame; caught in parse_frame."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


@dataclass(slots=True)
class Reading:
    """A frame being read and what was found so far; `gso`: the kernel vouches for its lengths.

    `upper` is the payload of the IP packet, behind all headers of IP.
    """

    frame: bytes
    gso: bool
    packet: Packet = field(default_factory=Packet)
    upper: Span | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` to `end` of a frame; what follows `end` is padding."""

    frame: bytes
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def require(self, size: int) -> bytes:
        """Return the first `size` bytes.

        Raises UnreadableError: BAD_LENGTH when only a length field keeps them out of reach,
        TRUNCATED when the frame does not have them.
        """
        if size > len(self):
            in_padding = self.start + size <= len(self.frame)
            raise UnreadableError(Reason.BAD_LENGTH if in_padding else Reason.TRUNCATED)
        return self.frame[self.start : self.start + size]

    def after(self, size: int) -> Span:
        """Return the span without its first `size` bytes."""
        return Span(self.frame, self.start + size, self.end)

    def content(self) -> bytes:
        """Return all bytes of the span."""
        return self.frame[self.start : self.end]


def echo_kind(protocol: int, icmp_type: int) -> bool | None:
    """Return True for an echo request, False for an echo reply, None for another ICMP type."""
    if icmp_type == ECHO_REQUEST[protocol]:
        return True
    return False if icmp_type == ECHO_REPLY[protocol] else None


def is_mapped(address: Address | None) -> bool:
    """Tell whether an address is an IPv4-mapped one, which does not belong on a wire.

    The tables of the programs hold IPv4 addresses in that form.
    """
    return isinstance(address, IPv6Address) and address.ipv4_mapped is not None


def number(header: bytes, offset: int, size: int = 2) -> int:
    """Return the big-endian number of `size` bytes at `offset`."""
    return int.from_bytes(header[offset : offset + size], "big")
