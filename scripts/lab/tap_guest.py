# SPDX-License-Identifier: Apache-2.0
"""A stand-in for QEMU: moves frames between a TAP on the host and the network card of a guest.

Opens TAP HOST_IF in the network namespace HOST_NS, as QEMU would, and a second TAP GUEST_IF in
GUEST_NS, which is what the guest's kernel sees as its card. Returns once both exist and are up;
a background process, its number in PID_FILE, then copies frames until it is killed. Both devices
live as long as that process, as a VM's TAP lives as long as its QEMU.

Needs only the standard library: the lab runs before anything is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUNSETOFFLOAD = 0x400454D0
#: What a guest's virtio card negotiates: checksums and segmentation left to whoever is next.
OFFLOADS = 0x01 | 0x02 | 0x04
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
SIOCSIFHWADDR = 0x8924
IFF_UP = 0x1
ARPHRD_ETHER = 1
CLONE_NEWNET = 0x40000000
LARGEST_FRAME = 65536 + 10 + 14  # with virtio header and link header
FRAMES_PER_TURN = 64


def enter_namespace(name: str) -> None:
    """Move this process into the named network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open("rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)


def open_tap(name: str, mac: str | None, *, offload: bool) -> int:
    """Create a TAP in the current namespace, set it up and return its file descriptor.

    With `offload` frames have a virtio header in front, and checksums may be left out.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    ifname = name.encode()
    kind = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if offload else 0)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", ifname, kind))
    if offload:
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mac is not None:
            address = bytes.fromhex(mac.replace(":", ""))
            fcntl.ioctl(
                control, SIOCSIFHWADDR, struct.pack("16sH6s16x", ifname, ARPHRD_ETHER, address)
            )
        # Duplicate address detection would only keep the lab's fixed addresses waiting.
        detection = Path("/proc/sys/net/ipv6/conf", name, "accept_dad")
        if detection.exists():
            detection.write_text("0")
        request = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH22x", ifname, 0))
        (flags,) = struct.unpack_from("H", request, 16)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", ifname, flags | IFF_UP))
    return fd


def move_frames(source: int, destination: int) -> None:
    """Copy what waits; at most FRAMES_PER_TURN frames, so that the other way gets its turn."""
    for _ in range(FRAMES_PER_TURN):
        try:
            frame = os.read(source, LARGEST_FRAME)
        except BlockingIOError:
            return
        try:
            os.write(destination, frame)
        except OSError as error:
            # A network card loses frames that the other side does not take.
            if error.errno in {errno.EBADFD, errno.ENODEV}:
                raise


def pump(host: int, guest: int) -> None:
    """Move frames both ways for as long as both devices exist."""
    other = {host: guest, guest: host}
    poller = select.poll()
    for fd in other:
        poller.register(fd, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            move_frames(fd, other[fd])


def main() -> None:
    """Create both devices, go into the background and move frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", nargs=2, metavar=("NS", "IF"), required=True)
    parser.add_argument("--guest", nargs=2, metavar=("NS", "IF"), required=True)
    parser.add_argument("--mac", help="MAC address of the guest's card", required=True)
    parser.add_argument("--bridge", help="bridge in the host's namespace to join")
    parser.add_argument("--offload", action="store_true", help="leave checksums out, as QEMU does")
    parser.add_argument("--pid-file", type=Path, required=True)
    options = parser.parse_args()

    enter_namespace(options.guest[0])
    guest = open_tap(options.guest[1], options.mac, offload=options.offload)
    enter_namespace(options.host[0])
    host = open_tap(options.host[1], None, offload=options.offload)
    if options.bridge:
        join = ["ip", "link", "set", options.host[1], "master", options.bridge]
        subprocess.run(join, check=True)
    child = os.fork()
    if child:
        options.pid_file.write_text(f"{child}\n")
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        os.dup2(null, stream.fileno())
    try:
        pump(host, guest)
    except OSError as error:
        # The namespace, and with it a device, is gone: nothing is left to move.
        if error.errno not in {errno.EBADFD, errno.ENODEV, errno.EIO}:
            raise


if __name__ == "__main__":
    main()
