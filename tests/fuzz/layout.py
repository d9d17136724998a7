# SPDX-License-Identifier: Apache-2.0
"""Where the headers of a frame are, for whoever changes them: a reader that refuses nothing."""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.frames import ICMP, ICMPV6, IPV4, IPV6

TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100})
#: IPv6 next headers that are walked over: hop-by-hop, routing, fragment, destination options.
EXTENSIONS: Final = frozenset({0, 43, 44, 60})
FRAGMENT: Final = 44
ERRORS: Final = {ICMP: frozenset({3, 5, 11, 12}), ICMPV6: frozenset({1, 2, 3, 4})}


class Layout(NamedTuple):
    """Offsets in a frame. 0 where there is no such thing.

    `kind` is the EtherType in force and stands at `kind_at`; `protocol` is that of the upper
    header and stands at `protocol_at`, -1 when it is not IP.
    """

    kind: int
    kind_at: int
    network: int
    protocol: int = -1
    protocol_at: int = 0
    upper: int = 0

    @property
    def version(self) -> int:
        """The IP version, 0 for another protocol."""
        return {IPV4: 4, IPV6: 6}.get(self.kind, 0)


def layout_of(frame: bytes | bytearray) -> Layout:
    """Find the headers of a frame of 14 bytes at least."""
    at = 12
    kind = frame[12] << 8 | frame[13]
    while kind in TAGS and len(frame) >= at + 6:
        at += 4
        kind = frame[at] << 8 | frame[at + 1]
    return ip_layout(frame, kind, at, at + 2)


def ip_layout(frame: bytes | bytearray, kind: int, kind_at: int, network: int) -> Layout:
    """Find the upper header behind a network header."""
    if kind == IPV4 and len(frame) >= network + 20:
        upper = network + max((frame[network] & 15) * 4, 20)
        return Layout(kind, kind_at, network, frame[network + 9], network + 9, upper)
    if kind == IPV6 and len(frame) >= network + 40:
        protocol_at, upper = network + 6, network + 40
        while frame[protocol_at] in EXTENSIONS and len(frame) >= upper + 8:
            size = 8 if frame[protocol_at] == FRAGMENT else (frame[upper + 1] + 1) * 8
            protocol_at, upper = upper, upper + size
        return Layout(kind, kind_at, network, frame[protocol_at], protocol_at, upper)
    return Layout(kind, kind_at, network)


def quoted_layout(frame: bytes | bytearray, layout: Layout) -> Layout | None:
    """Find the headers of the packet that an ICMP error quotes."""
    errors = ERRORS.get(layout.protocol)
    if errors is None or len(frame) < layout.upper + 9 or frame[layout.upper] not in errors:
        return None
    start = layout.upper + 8
    kind = {4: IPV4, 6: IPV6}.get(frame[start] >> 4, layout.kind)
    return ip_layout(frame, kind, layout.kind_at, start)
