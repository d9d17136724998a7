# SPDX-License-Identifier: Apache-2.0
"""The host's network interfaces: what one is, and which come and go.

Everything is asked of the kernel in the network namespace of the calling thread, by ioctl and by
a netlink socket of our own: a look at an interface must not cost the start of a library.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from vgw.errors import VgwError
from vgw.policy.model import Hook

_SIOCGIFNAME: Final = 0x8910
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFINDEX: Final = 0x8933
_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GDRVINFO: Final = 0x3
_DRVINFO_SIZE: Final = 196
_IFREQ_SIZE: Final = 40
_NAME_SIZE: Final = 16
#: struct ifreq with an index.
_IFREQ_INDEX: Final = struct.Struct(f"={_NAME_SIZE}xi{_IFREQ_SIZE - _NAME_SIZE - 4}x")
_ARPHRD_ETHER: Final = 1

_RTMGRP_LINK: Final = 1
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x1
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLMSGHDR: Final = struct.Struct("=IHHII")
_IFINFOMSG: Final = struct.Struct("=BxHiII")
_NLATTR: Final = struct.Struct("=HH")
_IFLA_IFNAME: Final = 3
_RECEIVE_BUFFER: Final = 1 << 20
#: Seconds within which `watch_links` notices that it shall stop.
_STOP_PERIOD: Final = 0.25

OnLink = Callable[[str, str, int], None]


@dataclass(frozen=True, slots=True)
class InterfaceFacts:
    """An interface of this network namespace; `kind` is the name of its driver."""

    name: str
    ifindex: int
    kind: str


def find_interface(name: str) -> InterfaceFacts:
    """Return what the kernel says of an interface.

    Raises VgwError when there is none of that name here, or one that carries no Ethernet frames.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            ifindex = _index(sock, name)
        except (OSError, ValueError):
            raise VgwError(
                f"interface {name} does not exist in this network namespace; create it first, or "
                "correct its name in the policy (`ip link` lists what there is)"
            ) from None
        if _hardware_type(sock, name) != _ARPHRD_ETHER:
            raise VgwError(
                f"interface {name} carries no Ethernet frames and cannot be protected; "
                "use a TAP or veth interface"
            )
        return InterfaceFacts(name, ifindex, _driver(sock, name))


class InterfaceNames:
    """Says what interfaces are called now, for many questions; use as a context manager.

    It asks in the network namespace of the thread that makes it. Python's own functions open a
    socket for each interface, or have the kernel describe all of them.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __enter__(self) -> InterfaceNames:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def of(self, ifindex: int) -> str | None:
        """Return the name of the interface with an index, None when there is none."""
        try:
            answer = fcntl.ioctl(self._socket, _SIOCGIFNAME, _IFREQ_INDEX.pack(ifindex))
        except OSError:
            return None
        return os.fsdecode(answer[:_NAME_SIZE].split(b"\0", 1)[0])


def choose_hook(wanted: Hook) -> Hook:
    """Return where a from_vm program goes when `wanted` is asked for.

    tc sees what XDP does not, checksum requests of a guest and tags beside a frame, and is as fast;
    on a veth XDP would take segmentation offload away from the peer.
    """
    return Hook.TC if wanted is Hook.AUTO else wanted


def _index(sock: socket.socket, name: str) -> int:
    """Return the index of an interface.

    As socket.if_nametoindex(), which opens a socket for it. Raises OSError, or ValueError when no
    interface can have such a name.
    """
    if len(os.fsencode(name)) >= _NAME_SIZE or "\0" in name:
        raise ValueError(name)
    request = struct.pack(f"{_IFREQ_SIZE}s", os.fsencode(name))
    return int(_IFREQ_INDEX.unpack(fcntl.ioctl(sock, _SIOCGIFINDEX, request))[0])


def _hardware_type(sock: socket.socket, name: str) -> int:
    request = struct.pack(f"16s{_IFREQ_SIZE - 16}x", os.fsencode(name))
    try:
        answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
    except OSError as error:
        raise VgwError(f"interface {name}: {error.strerror}") from error
    return int(struct.unpack_from("=H", answer, 16)[0])


def _driver(sock: socket.socket, name: str) -> str:
    info = ctypes.create_string_buffer(_DRVINFO_SIZE)
    struct.pack_into("=I", info, 0, _ETHTOOL_GDRVINFO)
    request = struct.pack("16sP", os.fsencode(name), ctypes.addressof(info))
    request = request.ljust(_IFREQ_SIZE, b"\0")
    try:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    except OSError:
        return "other"
    return info.raw[4:36].split(b"\0", 1)[0].decode(errors="replace") or "other"


def watch_links(
    on_event: OnLink,
    stop: threading.Event,
    alive: Callable[[], None] = lambda: None,
    *,
    receive_buffer: int = _RECEIVE_BUFFER,
) -> None:
    """Report interfaces until `stop` is set: ("new" or "gone", name, ifindex).

    `alive` is called at every turn, several times a second.
    Starts with a "new" for each interface that exists. A renamed one is gone under its old name
    and new under its new one. When the kernel had to drop messages everything is listed again, and
    what was missed is reported then.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((0, _RTMGRP_LINK))
        watcher = LinkWatcher(sock, on_event)
        watcher.start_listing()
        poll = select.poll()  # select() takes no file beyond the 1,024th
        poll.register(sock, select.POLLIN)
        while not stop.is_set():
            alive()
            if poll.poll(_STOP_PERIOD * 1000):
                watcher.receive()
            else:
                watcher.ask_again()


def wait_for(names: Iterable[str], seconds: float) -> list[str]:
    """Wait until there are interfaces of these names; return which are not when the time is over.

    Raises OSError when interfaces cannot be watched.
    """
    wanted = set(names)
    missing = wanted.difference(name for _, name in socket.if_nameindex())
    deadline = time.monotonic() + seconds
    stop = threading.Event()

    def note(event: str, name: str, _: int) -> None:
        if event == "new":
            missing.discard(name)
        elif name in wanted:
            missing.add(name)
        if not missing:
            stop.set()

    def look_at_the_clock() -> None:
        if time.monotonic() >= deadline:
            stop.set()

    if missing and seconds > 0:
        watch_links(note, stop, look_at_the_clock)
    return sorted(missing)


class LinkWatcher:
    """What `watch_links` knows: the interfaces reported, and the listing under way."""

    def __init__(self, sock: socket.socket, on_event: OnLink) -> None:
        self._sock = sock
        self._on_event = on_event
        self._known: dict[int, str] = {}
        self._listed: set[int] = set()
        self._sequence = 0
        #: Whether a listing is under way, and whether another has to follow it.
        self._listing = self._list_again = False

    def start_listing(self) -> None:
        """Ask the kernel for all interfaces, at once or when it has answered the last time.

        It refuses a second question while it answers one.
        """
        if self._listing:
            self._list_again = True
            return
        self._listing, self._list_again = True, False
        self._sequence += 1
        self._listed.clear()
        body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        header = _NLMSGHDR.pack(
            _NLMSGHDR.size + len(body),
            _RTM_GETLINK,
            _NLM_F_REQUEST | _NLM_F_DUMP,
            self._sequence,
            0,
        )
        self._sock.send(header + body)

    def ask_again(self) -> None:
        """Ask for what the kernel still owes, after a time in which it said nothing.

        An answer that finds the buffer full is given up by the kernel without another word.
        """
        if self._listing:
            self._listing = False
            self.start_listing()

    def receive(self) -> None:
        """Take one datagram and report what it says."""
        try:
            datagram = self._sock.recv(_RECEIVE_BUFFER)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.start_listing()
            return
        for kind, flags, sequence, body in messages(datagram):
            self._take(kind, flags, sequence, body)

    def _take(self, kind: int, flags: int, sequence: int, body: bytes) -> None:
        if sequence not in (0, self._sequence):
            return
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) and sequence:
            self._listing = False
            if kind == _NLMSG_ERROR or flags & _NLM_F_DUMP_INTR or self._list_again:
                self.start_listing()
            else:
                self._finish_listing()
        elif kind in (_RTM_NEWLINK, _RTM_DELLINK):
            family, _, ifindex, _, _ = _IFINFOMSG.unpack_from(body)
            # A bridge sends messages of its own family when a port joins or leaves it.
            if family == socket.AF_UNSPEC and kind == _RTM_NEWLINK:
                self._appeared(ifindex, _interface_name(body))
            elif family == socket.AF_UNSPEC:
                self._disappeared(ifindex)

    def _finish_listing(self) -> None:
        for ifindex in [index for index in self._known if index not in self._listed]:
            self._disappeared(ifindex)

    def _appeared(self, ifindex: int, name: str) -> None:
        self._listed.add(ifindex)
        if self._known.get(ifindex) == name:
            return
        self._disappeared(ifindex)
        self._listed.add(ifindex)
        self._known[ifindex] = name
        self._on_event("new", name, ifindex)

    def _disappeared(self, ifindex: int) -> None:
        self._listed.discard(ifindex)
        name = self._known.pop(ifindex, None)
        if name is not None:
            self._on_event("gone", name, ifindex)


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and body of each netlink message."""
    offset = 0
    while offset + _NLMSGHDR.size <= len(datagram):
        length, kind, flags, sequence, _ = _NLMSGHDR.unpack_from(datagram, offset)
        yield kind, flags, sequence, datagram[offset + _NLMSGHDR.size : offset + length]
        offset += max((length + 3) & ~3, _NLMSGHDR.size)


def _interface_name(body: bytes) -> str:
    offset = _IFINFOMSG.size
    while offset + _NLATTR.size <= len(body):
        length, kind = _NLATTR.unpack_from(body, offset)
        if kind == _IFLA_IFNAME:
            return os.fsdecode(body[offset + _NLATTR.size : offset + length].rstrip(b"\0"))
        offset += max((length + 3) & ~3, _NLATTR.size)
    return ""
