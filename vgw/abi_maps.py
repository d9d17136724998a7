# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the maps: their sizes by the ABI's structures, and those that are numbers.

The loader compares the sizes with what was compiled, EndpointMaps with what was pinned.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

from vgw import abi

_INDEX: Final = 4
_POSITION: Final = 8
_MAP: Final = 4
_PROGRAM: Final = 4

#: Maps that only programs read, and those of one build alone.
PRIVATE_MAPS: Final = ("scratch", "denials")
#: Map -> (bytes of a key, bytes of one value), but for PRIVATE_MAPS.
MAP_SIZES: Final[dict[str, tuple[int, int]]] = {
    "active": (_INDEX, ctypes.sizeof(abi.ActiveSlot)),
    "configs": (_INDEX, ctypes.sizeof(abi.EndpointConfig)),
    "policies": (_INDEX, _MAP),
    "policies_inner": (_INDEX, ctypes.sizeof(abi.ImageChunk)),
    "policies_medium": (_INDEX, _MAP),
    "policies_medium_inner": (_INDEX, ctypes.sizeof(abi.ImageMedium)),
    "policy_parts": (_INDEX, _MAP),
    "policy_parts_inner": (_INDEX, ctypes.sizeof(abi.ImagePart)),
    "rule_counters": (_INDEX, _MAP),
    "rule_counters_inner": (_INDEX, ctypes.sizeof(abi.RuleCounter)),
    "xdp_stages": (_INDEX, _PROGRAM),
    "tc_stages": (_INDEX, _PROGRAM),
    "conntrack": (ctypes.sizeof(abi.FlowKey), ctypes.sizeof(abi.Flow)),
    "conntrack_meta": (_INDEX, ctypes.sizeof(abi.ConntrackMeta)),
    "expiry_queue": (_POSITION, ctypes.sizeof(abi.QueueBatch)),
    "expiry_buffer": (_INDEX, ctypes.sizeof(abi.QueueBuffer)),
    "fragments": (ctypes.sizeof(abi.FragmentKey), ctypes.sizeof(abi.Fragment)),
    "stats": (_INDEX, ctypes.sizeof(abi.PacketCounter)),
    "event_meter": (_INDEX, ctypes.sizeof(abi.EventMeter)),
    "reject_meter": (_INDEX, ctypes.sizeof(abi.RejectMeter)),
    "events": (_INDEX, 4),
}


def size_mismatch(name: str, key_size: int, value_size: int) -> str | None:
    """Return in what way the map's sizes in bytes differ from the ABI's, None if they do not."""
    expected = MAP_SIZES.get(name)
    if expected is None or expected == (key_size, value_size):
        return None
    return (
        f"the map {name} has keys of {key_size} and values of {value_size} bytes, "
        f"but ABI {abi.ABI_VERSION} says {expected[0]} and {expected[1]}"
    )


def packed(value: int) -> bytes:
    """Return a u32, such as an index, an id or an fd, as the kernel reads it."""
    return value.to_bytes(4, sys.byteorder)


def number(data: bytes) -> int:
    """Return the number in an unsigned integer of the host."""
    return int.from_bytes(data, sys.byteorder)
