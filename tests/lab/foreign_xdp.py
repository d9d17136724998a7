# SPDX-License-Identifier: Apache-2.0
"""The XDP program of somebody else who takes an interface's packets by AF_XDP sockets."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vgw import libbpf

_XSKMAP = 17
_PSEUDO_MAP_FD = 1
_REDIRECT_MAP = 51
_LD_IMM64, _MOV64_IMM, _CALL, _EXIT = 0x18, 0xB7, 0x85, 0x95


def _instruction(opcode: int, destination: int = 0, source: int = 0, number: int = 0) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | destination, 0, number)


@contextmanager
def redirecting_program(ifindex: int) -> Iterator[int]:
    """Have such a program on an interface for the length of the block; yield its id."""
    sockets = libbpf.map_create(_XSKMAP, "xsks", 4, 4, 4)
    code = (
        _instruction(_LD_IMM64, 1, _PSEUDO_MAP_FD, sockets)
        + bytes(8)
        + _instruction(_MOV64_IMM, 2)
        + _instruction(_MOV64_IMM, 3)
        + _instruction(_CALL, number=_REDIRECT_MAP)
        + _instruction(_EXIT)
    )
    program = libbpf.prog_load(libbpf.ProgType.XDP, "af_xdp", code)
    try:
        link = libbpf.link_create(program, ifindex, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
        try:
            yield libbpf.prog_info(program).id
        finally:
            os.close(link)
    finally:
        os.close(program)
        os.close(sockets)
