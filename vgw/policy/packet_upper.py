# SPDX-License-Identifier: Apache-2.0
"""Reads what an IP packet carries: TCP, UDP with BOOTP, SCTP, IGMP; ICMP is in packet_icmp.py.

Any other protocol is accepted unread: rules name it by its number and it has no ports.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from vgw.abi import Reason
from vgw.policy.model import ICMP, ICMPV6, SCTP, TCP, UDP
from vgw.policy.packet_fields import (
    ACK,
    FIN,
    RST,
    SYN,
    Bootp,
    Membership,
    Reading,
    Span,
    Tcp,
    UnreadableError,
    number,
)
from vgw.policy.packet_icmp import read_icmp, read_icmpv6

IGMP = 2
IGMP_QUERY = 0x11
#: Reports of IGMP versions 1, 2 and 3, and leave.
IGMP_REPORTS = frozenset({0x12, 0x16, 0x22, 0x17})
DHCP_SERVER_PORT, DHCP_CLIENT_PORT = 67, 68
#: Everything of BOOTP up to the end of the client's hardware address.
BOOTP_FIXED_PART = 44
TCP_FLAG_COMBINATIONS = frozenset({SYN, SYN | ACK, RST, RST | ACK, ACK, FIN | ACK})


def read_upper(reading: Reading, payload: Span) -> None:
    """Read the header of `reading.packet.protocol` at the start of the IP payload.

    Raises UnreadableError with the reason when it is cut short or makes no sense.
    """
    protocol = reading.packet.protocol
    over_ipv4 = isinstance(reading.packet.source, IPv4Address)
    if protocol == TCP:
        _read_tcp(reading, payload)
    elif protocol == UDP:
        _read_udp(reading, payload, over_ipv4)
    elif protocol == SCTP:
        _note_ports(reading, payload.require(12))
    elif protocol == IGMP and over_ipv4:
        _read_igmp(reading, payload)
    elif protocol == ICMP and over_ipv4:
        read_icmp(reading, payload)
    elif protocol == ICMPV6 and not over_ipv4:
        read_icmpv6(reading, payload)


def _note_ports(reading: Reading, header: bytes) -> None:
    source_port, destination_port = number(header, 0), number(header, 2)
    reading.packet = replace(
        reading.packet, source_port=source_port, destination_port=destination_port
    )
    if source_port == 0 or destination_port == 0:
        raise UnreadableError(Reason.PORT_ZERO)


def _read_tcp(reading: Reading, payload: Span) -> None:
    header = payload.require(20)
    data_offset = (header[12] >> 4) * 4
    if not 20 <= data_offset <= len(payload):
        raise UnreadableError(Reason.BAD_HEADER)
    flags = header[13]
    reading.packet = replace(
        reading.packet,
        tcp=Tcp(
            flags,
            sequence=number(header, 4, 4),
            acknowledgement=number(header, 8, 4),
            payload=len(payload) - data_offset,
        ),
    )
    if flags & (FIN | SYN | RST | ACK) not in TCP_FLAG_COMBINATIONS:
        raise UnreadableError(Reason.TCP_FLAGS)
    _note_ports(reading, header)


def _read_udp(reading: Reading, payload: Span, over_ipv4: bool) -> None:
    header = payload.require(8)
    length = number(header, 4)
    if length == 0 and reading.gso:
        length = len(payload)
    # The length is the datagram's, so a first fragment never has all of it.
    is_fragment = reading.packet.fragment is not None
    if length < 8 or (length > len(payload)) is not is_fragment:
        raise UnreadableError(Reason.BAD_LENGTH)
    _note_ports(reading, header)
    packet = reading.packet
    ports = packet.source_port, packet.destination_port
    if over_ipv4 and ports == (DHCP_CLIENT_PORT, DHCP_SERVER_PORT):
        if is_fragment:
            raise UnreadableError(Reason.DHCP_INVALID)
        _read_bootp(reading, payload.frame[payload.start + 8 : payload.start + length])


def _read_bootp(reading: Reading, message: bytes) -> None:
    if len(message) < BOOTP_FIXED_PART:
        raise UnreadableError(Reason.DHCP_INVALID)
    bootp = Bootp(
        operation=message[0],
        hardware_type=message[1],
        hardware_length=message[2],
        relay=IPv4Address(message[24:28]),
        client_mac=message[28:34],
    )
    reading.packet = replace(reading.packet, bootp=bootp)


def _read_igmp(reading: Reading, payload: Span) -> None:
    kind = payload.require(8)[0]
    destination = reading.packet.destination
    is_fragment = reading.packet.fragment is not None
    if destination is None or not destination.is_multicast or is_fragment:
        raise UnreadableError(Reason.MEMBERSHIP_INVALID)
    if kind == IGMP_QUERY:
        membership = Membership.QUERY
    elif kind in IGMP_REPORTS:
        membership = Membership.REPORT
    else:
        raise UnreadableError(Reason.MEMBERSHIP_INVALID)
    reading.packet = replace(reading.packet, membership=membership)
