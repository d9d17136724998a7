# SPDX-License-Identifier: Apache-2.0
"""XDP programs of somebody else: one takes all packets by AF_XDP sockets, one takes none."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vgw import libbpf

_PASS = 2
_XSKMAP = 17
_PSEUDO_MAP_FD = 1
_REDIRECT_MAP = 51
_LD_IMM64, _MOV64_IMM, _CALL, _EXIT = 0x18, 0xB7, 0x85, 0x95


def _instruction(opcode: int, destination: int = 0, source: int = 0, number: int = 0) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | destination, 0, number)


@contextmanager
def passing_program(ifindex: int) -> Iterator[int]:
    """Have a program that hands every packet on, for the length of the block; yield its id."""
    code = _instruction(_MOV64_IMM, number=_PASS) + _instruction(_EXIT)
    with _attached(ifindex, "pass", code) as number:
        yield number


@contextmanager
def redirecting_program(ifindex: int) -> Iterator[int]:
    """Have one that takes every packet, for the length of the block; yield its id."""
    sockets = libbpf.map_create(_XSKMAP, "xsks", 4, 4, 4)
    code = (
        _instruction(_LD_IMM64, 1, _PSEUDO_MAP_FD, sockets)
        + bytes(8)
        + _instruction(_MOV64_IMM, 2)
        + _instruction(_MOV64_IMM, 3)
        + _instruction(_CALL, number=_REDIRECT_MAP)
        + _instruction(_EXIT)
    )
    try:
        with _attached(ifindex, "af_xdp", code) as number:
            yield number
    finally:
        os.close(sockets)


@contextmanager
def _attached(ifindex: int, name: str, code: bytes) -> Iterator[int]:
    program = libbpf.prog_load(libbpf.ProgType.XDP, name, code)
    try:
        link = libbpf.link_create(program, ifindex, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
        try:
            yield libbpf.prog_info(program).id
        finally:
            os.close(link)
    finally:
        os.close(program)
