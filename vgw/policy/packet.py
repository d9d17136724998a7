# SPDX-License-Identifier: Apache-2.0
"""Reads an Ethernet frame: the link and network layers; upper layers are in packet_upper.py.

Reading never decides: a frame is read to the end of its upper header, or the reason why it cannot
be is recorded. The order of the checks is part of the contract, because the first that fails names
the reason.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from vgw.abi import Reason
from vgw.policy.model import ICMPV6
from vgw.policy.packet_checksum import check_request
from vgw.policy.packet_fields import (
    ARP_REPLY,
    ARP_REQUEST,
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    ETHERTYPE_RARP,
    RARP_REQUEST,
    Arp,
    Fragment,
    Packet,
    Reading,
    Span,
    UnreadableError,
    is_mapped,
    number,
)
from vgw.policy.packet_upper import IGMP, read_upper

__all__ = ["Packet", "parse_frame"]

ETHERNET_HEADER = 14
FIRST_ETHERTYPE = 0x0600
TPID_8021Q = 0x8100
TAG_TPIDS = frozenset({TPID_8021Q, 0x88A8, 0x9100})

HOP_BY_HOP, ROUTING, FRAGMENT, NO_NEXT, DESTINATION = 0, 43, 44, 59, 60
MOBILITY, HIP, SHIM6 = 135, 139, 140
#: Next headers that are extensions of IPv6 and not an upper protocol.
EXTENSIONS = frozenset({HOP_BY_HOP, ROUTING, FRAGMENT, NO_NEXT, DESTINATION, MOBILITY, HIP, SHIM6})
#: Router alert for MLD with two bytes of padding, PadN or two Pad1, behind or before it.
ROUTER_ALERT_OPTIONS = tuple(
    bytes.fromhex(text) for text in ("050200000100", "010005020000", "050200000000", "000005020000")
)
#: IPv4's flags and offset, and the bytes that offsets count in.
DONT_FRAGMENT, MORE_FRAGMENTS, OFFSET_MASK = 0x4000, 0x2000, 0x1FFF
FRAGMENT_UNIT, DATAGRAM_MAX = 8, 65535
#: What a header that does not fit into a packet is refused with.
CUT_SHORT = frozenset({Reason.TRUNCATED, Reason.BAD_LENGTH, Reason.BAD_HEADER})
#: Type and length of the option that holds the length of a jumbogram.
JUMBO_OPTION = bytes.fromhex("c204")
IGMP_ROUTER_ALERT = bytes.fromhex("94040000")


def parse_frame(
    frame: bytes,
    *,
    vlan_tag: int | None = None,
    gso: bool = False,
    checksum: tuple[int, int] | None = None,
) -> Packet:
    """Read a frame.

    `vlan_tag` is the 802.1Q id of a tag held beside the bytes (skb metadata), None without one.
    `gso` says that the frame is a super-packet of the kernel, whose length fields may be 0.
    `checksum` is the request to put in a checksum: over all from a place in the frame on, at so
    many bytes behind it; None without one.
    Returns what was read; `Packet.reason` is Reason.NONE when that is all there is to read.
    """
    reading = Reading(frame, gso, Packet(length=len(frame)))
    try:
        _read_ethernet(reading, vlan_tag)
        if checksum is not None:
            check_request(reading, *checksum)
    except UnreadableError as error:
        return replace(reading.packet, reason=error.reason)
    return reading.packet


def _read_ethernet(reading: Reading, vlan_tag: int | None) -> None:
    frame = reading.frame
    if len(frame) < ETHERNET_HEADER:
        raise UnreadableError(Reason.TRUNCATED)
    ethertype = number(frame, 12)
    reading.packet = replace(
        reading.packet, destination_mac=frame[:6], source_mac=frame[6:12], ethertype=ethertype
    )
    start = ETHERNET_HEADER
    if vlan_tag is not None:
        _note_tag(reading, vlan_tag)
    elif ethertype in TAG_TPIDS:
        ethertype = _read_tag(reading, ethertype)
        start += 4
    if ethertype < FIRST_ETHERTYPE:
        raise UnreadableError(Reason.LLC)
    if ethertype in TAG_TPIDS:
        raise UnreadableError(Reason.VLAN)
    reading.packet = replace(reading.packet, ethertype=ethertype)
    content = Span(frame, start, len(frame))
    if ethertype == ETHERTYPE_IPV4:
        _read_ipv4(reading, content)
    elif ethertype == ETHERTYPE_IPV6:
        _read_ipv6(reading, content)
    elif ethertype in {ETHERTYPE_ARP, ETHERTYPE_RARP}:
        _read_arp(reading, content)
    else:
        raise UnreadableError(Reason.ETHERTYPE)


def _read_tag(reading: Reading, tpid: int) -> int:
    """Read the one tag a frame may have in its bytes; returns the EtherType behind it."""
    if tpid != TPID_8021Q:
        raise UnreadableError(Reason.VLAN)
    tag = Span(reading.frame, ETHERNET_HEADER, len(reading.frame)).require(4)
    _note_tag(reading, number(tag, 0) & 0x0FFF)
    return number(tag, 2)


def _note_tag(reading: Reading, vlan: int) -> None:
    # Id 0 is a priority tag: some hosts strip it and read on, so what follows could pass unseen.
    if vlan == 0:
        raise UnreadableError(Reason.VLAN)
    reading.packet = replace(reading.packet, vlan=vlan)


def _read_arp(reading: Reading, content: Span) -> None:
    header = content.require(28)
    operation = number(header, 6)
    reading.packet = replace(
        reading.packet,
        arp=Arp(
            operation=operation,
            sender_mac=header[8:14],
            sender=IPv4Address(header[14:18]),
            target_mac=header[18:24],
            target=IPv4Address(header[24:28]),
        ),
    )
    is_arp = reading.packet.ethertype == ETHERTYPE_ARP
    operations = {ARP_REQUEST, ARP_REPLY} if is_arp else {RARP_REQUEST}
    over_ethernet_for_ipv4 = header[:6] == bytes.fromhex("000108000604")
    if not over_ethernet_for_ipv4 or operation not in operations:
        raise UnreadableError(Reason.ARP_INVALID)


def _read_ipv4(reading: Reading, content: Span) -> None:
    header = content.require(20)
    if header[0] >> 4 != 4:
        raise UnreadableError(Reason.BAD_VERSION)
    header_length = (header[0] & 0x0F) * 4
    if header_length < 20:
        raise UnreadableError(Reason.BAD_HEADER)
    if header_length > len(content):
        raise UnreadableError(Reason.TRUNCATED)
    protocol = header[9]
    reading.packet = replace(
        reading.packet,
        source=IPv4Address(header[12:16]),
        destination=IPv4Address(header[16:20]),
        hop_limit=header[8],
        protocol=protocol,
    )
    total = number(header, 2)
    if total == 0 and reading.gso:
        total = len(content)
    if not header_length <= total <= len(content):
        raise UnreadableError(Reason.BAD_LENGTH)
    options = content.require(header_length)[20:]
    if options and not (protocol == IGMP and options == IGMP_ROUTER_ALERT):
        raise UnreadableError(Reason.IP_OPTIONS)
    payload = Span(content.frame, content.start + header_length, content.start + total)
    flags = number(header, 6)
    if flags & (MORE_FRAGMENTS | OFFSET_MASK):
        more = bool(flags & MORE_FRAGMENTS)
        if more and flags & DONT_FRAGMENT:
            raise UnreadableError(Reason.FRAGMENT)
        offset = (flags & OFFSET_MASK) * FRAGMENT_UNIT
        fragment = Fragment(number(header, 4), offset, len(payload), protocol)
        _note_fragment(reading, fragment, more)
    _read_payload(reading, payload)


def _read_ipv6(reading: Reading, content: Span) -> None:
    header = content.require(40)
    if header[0] >> 4 != 6:
        raise UnreadableError(Reason.BAD_VERSION)
    next_header = header[6]
    reading.packet = replace(
        reading.packet,
        source=IPv6Address(header[8:24]),
        destination=IPv6Address(header[24:40]),
        hop_limit=header[7],
        protocol=next_header,
    )
    if is_mapped(reading.packet.source) or is_mapped(reading.packet.destination):
        raise UnreadableError(Reason.BAD_ADDRESS)
    after_header = content.after(40)
    length = number(header, 4)
    if length == 0 and reading.gso:
        length = len(after_header)
    if length == 0 or length > len(after_header):
        raise UnreadableError(Reason.BAD_LENGTH)
    payload = Span(content.frame, after_header.start, after_header.start + length)
    if next_header == HOP_BY_HOP:
        next_header, payload = _read_hop_by_hop(reading, payload, is_jumbo=number(header, 4) == 0)
    elif next_header == FRAGMENT:
        next_header, payload = _read_fragment(reading, payload)
    reading.packet = replace(reading.packet, protocol=next_header)
    if next_header in EXTENSIONS and not reading.packet.is_later_fragment:
        raise UnreadableError(Reason.EXTENSION_HEADER)
    _read_payload(reading, payload)


def _read_hop_by_hop(reading: Reading, payload: Span, *, is_jumbo: bool) -> tuple[int, Span]:
    """Read a hop-by-hop header: a router alert, which ICMPv6 must follow, or a jumbo length.

    That what follows an alert is MLD is checked where the ICMPv6 type is known. The length is that
    of a super-frame of the kernel above 64 KiB (RFC 2675, BIG TCP).
    """
    header = _extension(payload)
    jumbo = JUMBO_OPTION + len(payload).to_bytes(4, "big")
    if is_jumbo and header[1] == 0 and header[2:] == jumbo:
        return header[0], payload.after(8)
    if header[0] != ICMPV6 or header[1] != 0 or header[2:] not in ROUTER_ALERT_OPTIONS:
        raise UnreadableError(Reason.EXTENSION_HEADER)
    reading.packet = replace(reading.packet, router_alert=True)
    return header[0], payload.after(8)


def _read_fragment(reading: Reading, payload: Span) -> tuple[int, Span]:
    """Read a fragment header; an atomic fragment (RFC 6946) is a whole packet all the same."""
    header = _extension(payload)
    next_header, position, rest = header[0], number(header, 2), payload.after(8)
    reading.packet = replace(reading.packet, fragment_header=True)
    offset, more = position & 0xFFF8, bool(position & 1)
    if offset or more:
        fragment = Fragment(number(header, 4, 4), offset, len(rest), next_header)
        _note_fragment(reading, fragment, more)
    return next_header, rest


def _note_fragment(reading: Reading, fragment: Fragment, more: bool) -> None:
    """Take note of a part of a datagram; refuse what could never be put together."""
    reading.packet = replace(reading.packet, fragment=fragment)
    is_ragged = more and fragment.length % FRAGMENT_UNIT != 0
    if fragment.length == 0 or is_ragged or fragment.offset + fragment.length > DATAGRAM_MAX:
        raise UnreadableError(Reason.FRAGMENT)


def _read_payload(reading: Reading, payload: Span) -> None:
    """Read the upper header of a packet, which a first fragment must have to its end.

    A later one could bring the rest of it unseen (RFC 1858, RFC 7112).
    """
    reading.upper = payload
    if reading.packet.is_later_fragment:
        return
    try:
        read_upper(reading, payload)
    except UnreadableError as error:
        if reading.packet.fragment is not None and error.reason in CUT_SHORT:
            raise UnreadableError(Reason.FRAGMENT) from None
        raise


def _extension(payload: Span) -> bytes:
    if len(payload) < 8:
        raise UnreadableError(Reason.TRUNCATED)
    return payload.require(8)
