# SPDX-License-Identifier: Apache-2.0
"""Reads the frames of a classic pcap file: either byte order, micro- or nanoseconds, Ethernet."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from vgw.errors import VgwError

_MAGICS: Final = {0xA1B2C3D4, 0xA1B23C4D}
_PCAPNG_MAGIC: Final = 0x0A0D0D0A
_ETHERNET: Final = 1
_HEADER_BYTES: Final = 24
_RECORD_BYTES: Final = 16
#: Longest frame that a capture may hold; a larger number says that the file is damaged.
_MAX_FRAME_BYTES: Final = 1 << 18


def read_pcap(path: Path) -> Iterator[bytes]:
    """Yield the frames of a capture in file order.

    Raises VgwError when the file cannot be read, is no such capture or is damaged, or when a frame
    was cut by the capture's snapshot length.
    """
    try:
        with path.open("rb") as file:
            order = _read_header(path, file)
            number = 0
            while record := file.read(_RECORD_BYTES):
                number += 1
                yield _read_frame(path, number, record, order, file)
    except OSError as error:
        raise VgwError(f"cannot read the capture {path}: {error.strerror}") from error


def _read_header(path: Path, file: BinaryIO) -> str:
    """Return the byte order of a capture, as struct writes it."""
    header = file.read(_HEADER_BYTES)
    for order in "<>":
        if len(header) < _HEADER_BYTES:
            break
        magic, link_type = struct.unpack_from(f"{order}I16xI", header)
        if magic == _PCAPNG_MAGIC:
            raise VgwError(
                f"{path} is a pcapng file; convert it by `editcap -F pcap {path} FILE.pcap`"
            )
        if magic not in _MAGICS:
            continue
        if link_type & 0xFFFF != _ETHERNET:
            raise VgwError(
                f"{path} holds frames of link type {link_type & 0xFFFF}, not of Ethernet; "
                "capture on the interface itself, not on `any`"
            )
        return order
    raise VgwError(f"{path} is not a pcap file; make one by `tcpdump -w {path}`")


def _read_frame(path: Path, number: int, record: bytes, order: str, file: BinaryIO) -> bytes:
    damaged = VgwError(f"{path} is damaged at frame {number}; capture it again")
    if len(record) < _RECORD_BYTES:
        raise damaged
    captured, length = struct.unpack_from(f"{order}8xII", record)
    if captured > _MAX_FRAME_BYTES:
        raise damaged
    frame = file.read(captured)
    if len(frame) < captured:
        raise damaged
    if captured < length:
        raise VgwError(
            f"{path} has only {captured} of the {length} bytes of frame {number}; capture whole "
            "frames by `tcpdump -s 0`"
        )
    return frame
