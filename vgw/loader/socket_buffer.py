# SPDX-License-Identifier: Apache-2.0
"""How tc programs read this kernel's socket buffers: constants for the compiler.

As constants they cost a packet nothing, and the name that a compiled program has in the cache
covers them: under another kernel with another layout it is compiled again.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import sys
from collections.abc import Mapping
from typing import Final

from vgw.errors import KernelError, VgwError
from vgw.libbpf import ProgType, TypeKind, prog_load, struct_members, type_numbers
from vgw.loader.compiler import KERNEL_FUNCTION, link_kernel_functions

_STRUCTURE: Final = "sk_buff"
#: From Linux 6.2 on; with it the fields need no helper to be read.
_CAST: Final = "bpf_rdonly_cast"
_MEMBERS: Final = ("ip_summed", "csum_start", "csum_offset", "mac_header")
#: Members are read as a row of words of this size, and are at their alignment in it.
_WORD: Final = 8


@functools.cache
def socket_buffer_options() -> tuple[str, ...]:
    """Return the compiler's options that bpf/socket_buffer.h wants.

    Raises VgwError when the kernel does not say what is needed: without it nobody could tell which
    bytes of a frame change after they were judged.
    """
    members = struct_members(_STRUCTURE, _MEMBERS)
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
    return tuple(f"-D{name}={value}" for name, value in (constants | _cast()).items())


@functools.cache
def _cast() -> dict[str, int]:
    """Return what a program needs to read a socket buffer directly, nothing where it cannot.

    Whether it can depends on more than that the function is there: on the JIT, for one. So the
    kernel is asked to load a program. Raises KernelError when this process may not load any.
    """
    numbers = type_numbers({_STRUCTURE: TypeKind.STRUCT, _CAST: TypeKind.FUNCTION})
    if _CAST not in numbers:
        return {}
    try:
        os.close(prog_load(ProgType.SCHED_CLS, "vgw_probe", _casting_program(numbers)))
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise
        return {}
    return {"SKB_TYPE": numbers[_STRUCTURE], "SKB_CAST": KERNEL_FUNCTION + numbers[_CAST]}


def reads_directly() -> bool:
    """Tell whether programs read socket buffers without a helper. Raises KernelError."""
    return bool(_cast())


def _casting_program(numbers: Mapping[str, int]) -> bytes:
    """Return a program that casts its context and does nothing else."""
    words = (
        (0xB7, 0x02, 0, numbers[_STRUCTURE]),  # mov r2, type; the context is in r1
        (0x85, 0x00, 0, KERNEL_FUNCTION + numbers[_CAST]),
        (0xB7, 0x00, 0, 0),  # mov r0, 0
        (0x95, 0x00, 0, 0),  # exit
    )
    return link_kernel_functions(b"".join(struct.pack("=BBhi", *word) for word in words))
