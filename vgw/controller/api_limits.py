# SPDX-License-Identifier: Apache-2.0
"""Who may be a client of the socket, how many there may be, and how long one may take to ask.

A client that is connected and has not asked holds a thread. The number of these is bounded: the one
that waits longest gives way to the next, so a client that asks at once is always heard.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Final

from vgw.controller.actor import Peer
from vgw.errors import VgwError

#: Clients that are connected and have not asked yet.
MAX_WAITING: Final = 64
#: Requests that are being served.
MAX_SERVED: Final = 64
#: Seconds that a client has to ask, from its first byte to the last.
REQUEST_SECONDS: Final = 10.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


def peer(connection: socket.socket) -> Peer:
    """Return the process at the other end of a unix socket, as it was when it connected."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    return Peer(pid, uid)


def require_own(directory: Path) -> None:
    """Raise VgwError when others than this user may replace what is in a directory."""
    facts = directory.stat()
    open_to = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if facts.st_uid not in {0, os.geteuid()} or (open_to and not facts.st_mode & stat.S_ISVTX):
        raise VgwError(
            f"other users could put a socket of theirs into {directory}: run "
            f"`chown {os.geteuid()} {directory}` and `chmod 755 {directory}`"
        )


class Waiting:
    """The clients that have not asked yet, in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}

    def add(self, connection: socket.socket) -> None:
        """Take one in; where there are too many, the one that waits longest is given up."""
        with self._lock:
            while len(self._deadlines) >= MAX_WAITING:
                _give_up(self._remove(next(iter(self._deadlines))))
            self._deadlines[connection] = time.monotonic() + REQUEST_SECONDS

    def discard(self, connection: socket.socket) -> None:
        """Forget one that has asked, or is gone."""
        with self._lock:
            self._deadlines.pop(connection, None)

    def give_up_late(self) -> None:
        """Give up those whose time is over."""
        self._give_up_until(time.monotonic())

    def give_up_all(self) -> None:
        """Give up all, for nobody will be served any more."""
        self._give_up_until(math.inf)

    def _give_up_until(self, now: float) -> None:
        with self._lock:
            for connection in [each for each, end in self._deadlines.items() if end <= now]:
                _give_up(self._remove(connection))

    def _remove(self, connection: socket.socket) -> socket.socket:
        del self._deadlines[connection]
        return connection


def _give_up(connection: socket.socket) -> None:
    """Read no more from a client: its thread finds the end of what it sends, and answers that."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
