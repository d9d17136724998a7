# SPDX-License-Identifier: Apache-2.0
"""The VM's side of a TAP: frames as a VMM writes them, and what a guest claims of them beside."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE = 0x400454CA, 0x400454D0, 0x400454D9
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
IFF_NAPI, IFF_NAPI_FRAGS = 0x0010, 0x0020
IFF_MULTI_QUEUE, IFF_VNET_HDR = 0x0100, 0x4000
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
VNET_HEADER_SIZE: Final = 10
LARGEST_FRAME: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class VnetHeader:
    """struct virtio_net_hdr: what a guest claims of a frame beside its bytes."""

    flags: int = 0
    gso_type: int = 0
    header_length: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def encode(self) -> bytes:
        return struct.pack(
            "=BBHHHH",
            self.flags,
            self.gso_type,
            self.header_length,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        )


NEEDS_CSUM = 1
GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4 = 1, 3, 4, 5
PLAIN = VnetHeader()


class Queue:
    """The VM's side of a TAP, or of one of its queues."""

    def __init__(self, name: str, flags: int = 0, *, blocking: bool = False) -> None:
        self.name = name
        self._flags = flags | IFF_TAP | IFF_NO_PI
        self.fd = os.open("/dev/net/tun", os.O_RDWR | (0 if blocking else os.O_NONBLOCK))
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), self._flags))

    def close(self) -> None:
        os.close(self.fd)

    def send(self, frame: bytes, header: VnetHeader = PLAIN) -> None:
        """Send a frame as the VM does; OSError when the kernel does not take it."""
        head = header.encode() if self._flags & IFF_VNET_HDR else b""
        os.write(self.fd, head + frame)

    def send_parts(self, parts: Sequence[bytes]) -> None:
        """Send a frame whose parts lie apart; with IFF_NAPI_FRAGS they stay apart in the kernel."""
        os.writev(self.fd, parts)

    def received(self) -> list[tuple[bytes, bytes]]:
        """Return virtio header (empty without) and bytes of each frame that waits."""
        size = VNET_HEADER_SIZE if self._flags & IFF_VNET_HDR else 0
        frames: list[tuple[bytes, bytes]] = []
        while True:
            try:
                data = os.read(self.fd, LARGEST_FRAME)
            except BlockingIOError:
                return frames
            frames.append((data[:size], data[size:]))

    def set_attached(self, attached: bool) -> None:
        """Switch one queue of a multi-queue TAP on or off, as a guest does."""
        flag = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
        fcntl.ioctl(self.fd, TUNSETQUEUE, struct.pack("16sH22x", b"", flag))

    def set_offloads(self, bits: int) -> None:
        """Say what the VM takes: TUN_F_* bits."""
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, bits)
