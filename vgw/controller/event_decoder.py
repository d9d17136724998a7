# SPDX-License-Identifier: Apache-2.0
"""Bytes of the perf buffer as events: each record is checked before anything believes it.

Anybody who may write to the host's events map can put bytes there, so nothing but None comes of
those that are no record of this ABI: of another size, version or kind, or with a number that no
enumeration has.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from vgw import abi

#: Bytes that the kernel may append, to make the size of a record a multiple of eight.
LONGEST_PADDING: Final = 7
#: The longest frame behind a lease that is taken: no DHCP message is longer than a jumbo frame.
LONGEST_FRAME: Final = 9216
_EVENT_BYTES: Final = ctypes.sizeof(abi.Event)
_FLOW_BYTES: Final = ctypes.sizeof(abi.FlowEvent)
_KINDS: Final = len(abi.EventKind)
_FLOW_KINDS: Final = (abi.EventKind.FLOW_START, abi.EventKind.FLOW_END)
#: Field of an event -> how many values its enumeration has.
_ENUMERATED: Final = (
    ("path", len(abi.Path)),
    ("rule_path", len(abi.Path)),
    ("verdict", len(abi.Verdict)),
    ("reason", len(abi.Reason)),
    ("end", len(abi.FlowEnd)),
    ("state", len(abi.FlowState)),
)


class Lease(NamedTuple):
    """An event of the kind LEASE and what was captured of the frame it is about."""

    event: abi.Event
    frame: bytes


Decoded = abi.Event | abi.FlowEvent | Lease


def decode(data: bytes) -> Decoded | None:
    """Return the event that a record of the perf buffer is, None when it is none of this ABI.

    An abi.Event that comes back alone is of the kind PACKET or FLOOD. Raises nothing, whatever the
    bytes.
    """
    if len(data) < _EVENT_BYTES:
        return None
    event = abi.Event.from_buffer_copy(data)
    if event.abi != abi.ABI_VERSION or event.kind >= _KINDS:
        return None
    if any(getattr(event, field) >= count for field, count in _ENUMERATED):
        return None
    if event.kind == abi.EventKind.LEASE:
        frame = data[_EVENT_BYTES:][: event.length]
        return Lease(event, frame) if 0 < len(frame) <= LONGEST_FRAME else None
    if event.kind in _FLOW_KINDS:
        return abi.FlowEvent.from_buffer_copy(data) if _is_size(data, _FLOW_BYTES) else None
    return event if _is_size(data, _EVENT_BYTES) else None


def _is_size(data: bytes, size: int) -> bool:
    return size <= len(data) <= size + LONGEST_PADDING
