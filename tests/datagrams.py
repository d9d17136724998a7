# SPDX-License-Identifier: Apache-2.0
"""Fragments for tests: pieces cut out of whole frames."""

from __future__ import annotations

import struct

from tests.frames import IPV6, VLAN
from vgw.policy.frame import internet_checksum

IPV4_HEADER, IPV6_HEADER, FRAGMENT_HEADER = 20, 40, 44
MORE_FRAGMENTS, DONT_FRAGMENT = 0x2000, 0x4000
UNIT = 8


def piece(
    frame: bytes,
    start: int,
    end: int | None = None,
    *,
    identification: int = 77,
    place: int | None = None,
    more: bool | None = None,
    flags: int = 0,
    protocol: int | None = None,
) -> bytes:
    """Return the fragment of a frame's packet that has the bytes `start` to `end` of its payload.

    It tells the truth about itself unless `place` (the offset it claims, in bytes), `more` or
    `protocol` say otherwise. `flags` are further bits of IPv4's field of flags. The packet has
    neither IPv4 options nor IPv6 extension headers.
    """
    link = 18 if int.from_bytes(frame[12:14], "big") == VLAN else 14
    is_ipv6 = int.from_bytes(frame[link - 2 : link], "big") == IPV6
    header_size = IPV6_HEADER if is_ipv6 else IPV4_HEADER
    header, payload = frame[link : link + header_size], frame[link + header_size :]
    content = payload[start:end]
    is_last = end is None or end >= len(payload)
    field = (start if place is None else place) // UNIT, not is_last if more is None else more
    if is_ipv6:
        number = header[6] if protocol is None else protocol
        own = struct.pack("!BBHI", number, 0, field[0] << 3 | field[1], identification)
        length = struct.pack("!HB", len(own) + len(content), FRAGMENT_HEADER)
        return frame[:link] + header[:4] + length + header[7:] + own + content
    number = header[9] if protocol is None else protocol
    bits = field[0] | (MORE_FRAGMENTS if field[1] else 0) | flags
    sizes = struct.pack("!HHH", IPV4_HEADER + len(content), identification, bits)
    header = header[:2] + sizes + header[8:9] + bytes([number, 0, 0]) + header[12:]
    checksum = struct.pack("!H", internet_checksum(header))
    return frame[:link] + header[:10] + checksum + header[12:] + content
