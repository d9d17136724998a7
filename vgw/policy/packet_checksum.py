# SPDX-License-Identifier: Apache-2.0
"""Judges a checksum request: which bytes of a frame somebody behind the hooks will write.

Beside a frame its sender may say where a checksum has to be put in: over all bytes from one place
on, so many bytes behind it. Whoever does that believes what is said. So it must be the checksum of
the header that was read, or be behind everything that was.
"""

from __future__ import annotations

from ipaddress import IPv4Address

from vgw.abi import Reason
from vgw.policy.model import ICMP, ICMPV6, SCTP, TCP, UDP
from vgw.policy.packet_fields import Packet, Reading, Span, UnreadableError
from vgw.policy.packet_upper import IGMP

#: Protocol -> where its header has the checksum; that of SCTP is another, and is asked for as well.
CHECKSUM_FIELDS = {TCP: 16, UDP: 6, SCTP: 8, ICMP: 2, ICMPV6: 2, IGMP: 2}
UDP_HEADER, SCTP_HEADER = 8, 12
#: Protocol, type and code of "administratively prohibited" (RFC 1812, 5.2.7.1; RFC 4443, 3.1).
PROHIBITED = frozenset({(ICMP, 3, 13), (ICMPV6, 1, 1)})


def check_request(reading: Reading, start: int, offset: int) -> None:
    """Refuse a request that would change what was read; raises UnreadableError.

    `start` is a place in the frame, `offset` counts from there, as in parse_frame.
    """
    packet, upper = reading.packet, reading.upper
    if upper is None or packet.protocol is None:
        raise UnreadableError(Reason.CHECKSUM_REQUEST)
    if packet.is_later_fragment or not _is_read(packet):
        allowed = start >= upper.start
    else:
        judged = _judged_part(packet, upper)
        is_behind = judged is not None and start >= upper.start + judged
        fields = {CHECKSUM_FIELDS[packet.protocol]}
        icmp = packet.icmp
        if icmp is not None and (packet.protocol, icmp.type, icmp.code) in PROHIBITED:
            # An answer of vgw to a UDP packet has that packet's request, which does no harm here.
            fields.add(CHECKSUM_FIELDS[UDP])
        allowed = is_behind or (start == upper.start and offset in fields)
    if not allowed:
        raise UnreadableError(Reason.CHECKSUM_REQUEST)


def _is_read(packet: Packet) -> bool:
    """Tell whether a packet is of a protocol whose header is read in its IP version."""
    over_ipv4 = isinstance(packet.source, IPv4Address)
    return packet.protocol in ({TCP, UDP, SCTP} | ({ICMP, IGMP} if over_ipv4 else {ICMPV6}))


def _judged_part(packet: Packet, upper: Span) -> int | None:
    """Return how many bytes of the upper header are judged; None: the payload is as well."""
    if packet.protocol == TCP:
        return (upper.content()[12] >> 4) * 4
    if packet.protocol == UDP and packet.bootp is None:
        return UDP_HEADER
    return SCTP_HEADER if packet.protocol == SCTP else None
