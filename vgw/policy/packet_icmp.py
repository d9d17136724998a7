# SPDX-License-Identifier: Apache-2.0
"""Reads ICMP and ICMPv6: echo, errors with the packet they quote, neighbour discovery, MLD."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from vgw.abi import Reason
from vgw.policy.model import ICMP, ICMPV6, PORT_PROTOCOLS
from vgw.policy.packet_fields import (
    NEIGHBOUR_ADVERTISEMENT,
    NEIGHBOUR_SOLICITATION,
    ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION,
    Icmp,
    Membership,
    Neighbour,
    Quoted,
    Reading,
    Span,
    UnreadableError,
    echo_kind,
    is_mapped,
    number,
)

ICMP_REDIRECT, ICMPV6_REDIRECT = 5, 137
ICMP_ERRORS = frozenset({3, 11, 12})
ICMPV6_ERRORS = frozenset({1, 2, 3, 4})
#: Type and code of ICMP, type of ICMPv6, that announce the MTU of a path, and the least there is.
FRAGMENTATION_NEEDED, IPV4_MTU_MIN = (3, 4), 68
PACKET_TOO_BIG, IPV6_MTU_MIN = 2, 1280

#: Neighbour discovery type -> length of its part before the options.
ND_FIXED_PART = {
    ROUTER_SOLICITATION: 8,
    ROUTER_ADVERTISEMENT: 16,
    NEIGHBOUR_SOLICITATION: 24,
    NEIGHBOUR_ADVERTISEMENT: 24,
}
#: Neighbour discovery type -> number of the option that holds the sender's link-layer address.
ND_LINK_LAYER_OPTION = {
    ROUTER_SOLICITATION: 1,
    NEIGHBOUR_SOLICITATION: 1,
    NEIGHBOUR_ADVERTISEMENT: 2,
}
ND_HOP_LIMIT = 255
ND_MAX_OPTIONS = 8

MLD_QUERY, MLDV2_REPORT = 130, 143
#: MLD type -> length of its fixed part.
MLD_FIXED_PART = {MLD_QUERY: 24, 131: 24, 132: 24, MLDV2_REPORT: 8}
MLD_HOP_LIMIT = 1

#: Next headers in a quoted IPv6 packet behind which its ports cannot be found.
QUOTED_EXTENSIONS = frozenset({0, 43, 44, 60, 59, 135, 139, 140})


def read_icmp(reading: Reading, payload: Span) -> None:
    """Read ICMP over IPv4; raises UnreadableError with the reason when it makes no sense."""
    header = payload.require(8)
    kind = _note_header(reading, ICMP, header)
    if kind == ICMP_REDIRECT:
        raise UnreadableError(Reason.REDIRECT)
    if kind in ICMP_ERRORS:
        code, mtu = header[1], number(header, 6)
        _refuse_fragment(reading)
        if (kind, code) == FRAGMENTATION_NEEDED and 0 < mtu < IPV4_MTU_MIN:
            raise UnreadableError(Reason.BAD_MTU)
        quoted = _read_quoted_ipv4(payload.after(8).content())
        reading.packet = replace(reading.packet, quoted=quoted)


def read_icmpv6(reading: Reading, payload: Span) -> None:
    """Read ICMPv6 over IPv6; raises UnreadableError with the reason when it makes no sense."""
    header = payload.require(8)
    kind = _note_header(reading, ICMPV6, header)
    if kind == ICMPV6_REDIRECT:
        raise UnreadableError(Reason.REDIRECT)
    if reading.packet.router_alert and kind not in MLD_FIXED_PART:
        raise UnreadableError(Reason.EXTENSION_HEADER)
    if kind in ND_FIXED_PART:
        _read_neighbour_discovery(reading, kind, payload)
    elif kind in MLD_FIXED_PART:
        _read_mld(reading, kind, payload)
    elif kind in ICMPV6_ERRORS:
        _refuse_fragment(reading)
        if kind == PACKET_TOO_BIG and number(header, 4, 4) < IPV6_MTU_MIN:
            raise UnreadableError(Reason.BAD_MTU)
        quoted = _read_quoted_ipv6(payload.after(8).content())
        reading.packet = replace(reading.packet, quoted=quoted)


def _note_header(reading: Reading, protocol: int, header: bytes) -> int:
    kind = header[0]
    icmp = Icmp(
        type=kind,
        code=header[1],
        identifier=number(header, 4),
        echo=echo_kind(protocol, kind),
    )
    reading.packet = replace(reading.packet, icmp=icmp)
    return kind


def _refuse_fragment(reading: Reading) -> None:
    """Raise UnreadableError for an error in fragments: no host sends one that is so long."""
    if reading.packet.fragment is not None:
        raise UnreadableError(Reason.FRAGMENT)


def _read_neighbour_discovery(reading: Reading, kind: int, payload: Span) -> None:
    packet = reading.packet
    code = payload.require(8)[1]
    if packet.hop_limit != ND_HOP_LIMIT or code != 0 or packet.fragment_header:
        raise UnreadableError(Reason.ND_INVALID)
    fixed = payload.require(ND_FIXED_PART[kind])
    target = IPv6Address(fixed[8:24]) if len(fixed) == 24 else None
    if is_mapped(target):
        raise UnreadableError(Reason.ND_INVALID)
    link_layer = None
    if kind in ND_LINK_LAYER_OPTION:
        options = payload.after(len(fixed)).content()
        link_layer = _link_layer_option(options, ND_LINK_LAYER_OPTION[kind])
    reading.packet = replace(packet, neighbour=Neighbour(target, link_layer))


def _link_layer_option(options: bytes, wanted: int) -> bytes | None:
    """Return the address in the option `wanted`; raises UnreadableError ND_INVALID."""
    found: bytes | None = None
    count = 0
    while options:
        size = options[1] * 8 if len(options) >= 2 else 0
        count += 1
        if size == 0 or size > len(options) or count > ND_MAX_OPTIONS:
            raise UnreadableError(Reason.ND_INVALID)
        if options[0] == wanted:
            if found is not None or size != 8:
                raise UnreadableError(Reason.ND_INVALID)
            found = options[2:8]
        options = options[size:]
    return found


def _read_mld(reading: Reading, kind: int, payload: Span) -> None:
    packet = reading.packet
    is_link_local = packet.router_alert and packet.hop_limit == MLD_HOP_LIMIT
    to_group = packet.destination is not None and packet.destination.is_multicast
    if not is_link_local or packet.fragment_header or not to_group:
        raise UnreadableError(Reason.MEMBERSHIP_INVALID)
    payload.require(MLD_FIXED_PART[kind])
    membership = Membership.QUERY if kind == MLD_QUERY else Membership.REPORT
    reading.packet = replace(packet, membership=membership)


def _read_quoted_ipv4(inner: bytes) -> Quoted:
    if len(inner) < 20 or inner[0] >> 4 != 4:
        raise UnreadableError(Reason.ICMP_INNER)
    header_length = (inner[0] & 0x0F) * 4
    later_fragment = number(inner, 6) & 0x1FFF != 0
    if header_length < 20 or later_fragment:
        raise UnreadableError(Reason.ICMP_INNER)
    source, destination = IPv4Address(inner[12:16]), IPv4Address(inner[16:20])
    quoted = Quoted(source, destination, protocol=inner[9])
    return _with_quoted_ports(quoted, ICMP, inner[header_length:])


def _read_quoted_ipv6(inner: bytes) -> Quoted:
    if len(inner) < 40 or inner[0] >> 4 != 6 or inner[6] in QUOTED_EXTENSIONS:
        raise UnreadableError(Reason.ICMP_INNER)
    source, destination = IPv6Address(inner[8:24]), IPv6Address(inner[24:40])
    if is_mapped(source) or is_mapped(destination):
        raise UnreadableError(Reason.ICMP_INNER)
    quoted = Quoted(source, destination, protocol=inner[6])
    return _with_quoted_ports(quoted, ICMPV6, inner[40:])


def _with_quoted_ports(quoted: Quoted, icmp_of_family: int, upper: bytes) -> Quoted:
    """Add the ports or the echo identifier from the eight bytes that every error quotes."""
    if len(upper) < 8:
        raise UnreadableError(Reason.ICMP_INNER)
    if quoted.protocol in PORT_PROTOCOLS:
        return replace(
            quoted,
            source_port=number(upper, 0),
            destination_port=number(upper, 2),
            tcp_sequence=number(upper, 4, 4),
        )
    if quoted.protocol != icmp_of_family:
        return quoted
    echo = echo_kind(icmp_of_family, upper[0])
    if echo is None:
        raise UnreadableError(Reason.ICMP_INNER)
    identifier = number(upper, 4)
    return replace(quoted, source_port=identifier, destination_port=identifier, echo=echo)
