# SPDX-License-Identifier: Apache-2.0
"""Which interfaces somebody changed: the kernel's own notes of links, qdiscs and tc filters.

The kernel tells of XDP programs and clsact filters that come and go, of names and of departures. It
does not tell of bpf_links; those have to be looked at.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from typing import Final

from vgw.controller.interfaces import messages

_RTMGRP_LINK: Final = 1
_RTMGRP_TC: Final = 8
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
#: Of links, qdiscs, classes and filters: the index is at the same place in all.
_CHANGES: Final = frozenset((_RTM_NEWLINK, _RTM_DELLINK, 36, 37, 40, 41, 44, 45))
_INDEX: Final = struct.Struct("=4xi")
_RECEIVE_BUFFER: Final = 1 << 20
#: Departures that are kept apart; with more the oldest knowledge is given up.
_REMEMBERED: Final = 10_000

#: What is the same at two moments if an interface was there all the time between them.
Presence = tuple[int, int]


class ChangeFeed:
    """Notes of changes in the network namespace of the thread that makes it; for several threads.

    Messages that were lost for want of room count as changes of everything.
    """

    def __init__(self, receive_buffer: int = _RECEIVE_BUFFER) -> None:
        """Begin to listen. Raises OSError."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.bind((0, _RTMGRP_LINK | _RTMGRP_TC))
        self._lock = threading.Lock()
        self._changed: set[int] = set()
        self._all = False
        self._losses = 0
        self._departures: dict[int, int] = {}

    def fileno(self) -> int:
        """Return the socket, which is readable when something changed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()

    def take(self) -> set[int] | None:
        """Return the indices of what changed since the last call; None: anything may have."""
        with self._lock:
            self._receive()
            changed, self._changed = self._changed, set()
            everything, self._all = self._all, False
        return None if everything else changed

    def presence(self, ifindex: int) -> Presence:
        """Return what stays the same for as long as an interface is not removed.

        The kernel notes a departure before the index can be had by another interface, so what is
        equal before and after is of the same interface.
        """
        with self._lock:
            self._receive()
            return self._losses, self._departures.get(ifindex, 0)

    def _receive(self) -> None:
        while True:
            try:
                datagram = self._sock.recv(_RECEIVE_BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lose()
                continue
            for kind, _, _, body in messages(datagram):
                if kind in _CHANGES and len(body) >= _INDEX.size:
                    self._note(kind, body)

    def _note(self, kind: int, body: bytes) -> None:
        (ifindex,) = _INDEX.unpack_from(body)
        self._changed.add(ifindex)
        # A bridge sends messages of its own family when a port leaves it.
        if kind == _RTM_DELLINK and body[0] == socket.AF_UNSPEC:
            self._departures[ifindex] = self._departures.get(ifindex, 0) + 1
            if len(self._departures) > _REMEMBERED:
                self._lose()

    def _lose(self) -> None:
        self._losses += 1
        self._all = True
        self._changed.clear()
        self._departures.clear()
