# SPDX-License-Identifier: Apache-2.0
"""What the sinks share that send each record as a message over a socket."""

from __future__ import annotations

import abc
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from vgw.controller.log_sink import Entry, Written

#: The longest that a receiver may keep a message waiting before it counts as away.
SEND_SECONDS: Final = 1.0
#: The message itself is at fault: it cannot be sent however often it is tried.
_REFUSED: Final = frozenset({errno.EMSGSIZE, errno.EINVAL})


class SocketSink(abc.ABC):
    """Sends records to a receiver that may be away and come back.

    A record that could not be sent stays the first of those that wait, unless it is at fault.
    """

    def __init__(self, place: str) -> None:
        """Send nothing yet; `place` is where to, for messages."""
        self._place = place
        self._socket: socket.socket | None = None
        self._anew = False

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self._place

    def write(self, entries: Sequence[Entry]) -> Written:
        """Send entries until one cannot be; connects where that is not done."""
        lost = 0
        if self._anew:
            self._anew = False
            self._disconnect()
        for done, entry in enumerate(entries):
            try:
                self._send(self._connected(), entry)
            except OSError as error:
                if error.errno in _REFUSED:
                    lost += 1
                    continue
                self._disconnect()
                return Written(done, lost, _reason(error))
        return Written(len(entries), lost)

    def reopen(self) -> None:
        """Connect anew before the next record."""
        self._anew = True

    def close(self) -> None:
        """Close the socket."""
        self._disconnect()

    def _disconnect(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = self._connect()
            self._socket.settimeout(SEND_SECONDS)
        return self._socket

    @abc.abstractmethod
    def _connect(self) -> socket.socket:
        """Return a socket that is connected to the receiver. Raises OSError."""

    @abc.abstractmethod
    def _send(self, sock: socket.socket, entry: Entry) -> None:
        """Send one record. Raises OSError."""


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it does not take messages"
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))


def unix_socket(kind: socket.SocketKind, path: str) -> socket.socket:
    """Return a socket of the kind that is connected to a path. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.settimeout(SEND_SECONDS)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
