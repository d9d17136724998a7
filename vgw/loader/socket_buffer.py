# SPDX-License-Identifier: Apache-2.0
"""Where this kernel keeps what tc programs read of a socket buffer: constants for the compiler.

As constants they cost a packet nothing, and the name that a compiled program has in the cache
covers them: under another kernel with another layout it is compiled again.
"""

from __future__ import annotations

import functools
import sys
from typing import Final

from vgw.errors import VgwError
from vgw.libbpf import struct_members

_MEMBERS: Final = ("ip_summed", "csum_start", "csum_offset", "mac_header")
#: Members are read as a row of words of this size, and are at their alignment in it.
_WORD: Final = 8


@functools.cache
def socket_buffer_options() -> tuple[str, ...]:
    """Return the compiler's options that bpf/socket_buffer.h wants.

    Raises VgwError when the kernel does not say what is needed: without it nobody could tell which
    bytes of a frame change after they were judged.
    """
    members = struct_members("sk_buff", _MEMBERS)
    missing = [name for name in _MEMBERS if name not in members]
    if missing:
        raise VgwError(
            f"this kernel's socket buffers have no {missing[0]}, so checksum requests of guests "
            "cannot be judged; use a kernel that vgw was tested with"
        )
    places = {name: member.first_bit // 8 for name, member in members.items()}
    first = min(places.values()) // _WORD * _WORD
    size = -(-(max(places.values()) + 2 - first) // _WORD) * _WORD
    summed = members["ip_summed"]
    shift = summed.first_bit % 8
    if sys.byteorder == "big":  # bit fields are counted from the other end there
        shift = 8 - shift - summed.bits
    constants = {
        "SKB_FIRST": first,
        "SKB_SIZE": size,
        "SKB_IP_SUMMED_SHIFT": shift,
        **{f"SKB_{name.upper()}": place - first for name, place in places.items()},
    }
    return tuple(f"-D{name}={value}" for name, value in constants.items())
