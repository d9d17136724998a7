# SPDX-License-Identifier: Apache-2.0
"""The log in systemd's journal, by its native protocol.

A record is a message of fields: MESSAGE for people, PRIORITY, and each key as `VGW_` and its name
in upper case. Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

from vgw.controller.log_severity import severity
from vgw.controller.log_sink import Entry
from vgw.controller.log_socket import SocketSink, unix_socket
from vgw.controller.log_text import record_text

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
_IDENTIFIER: Final = "vgw"
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0x01 | 0x02 | 0x04 | 0x08  # no more seals, no other size, no other content


class JournalSink(SocketSink):
    """Sends records to journald; what is too large for a datagram goes in a sealed memfd."""

    kind = "journal"

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        """Send to the socket at `path`."""
        super().__init__(f"journal {path}")
        self._path = path

    def _connect(self) -> socket.socket:
        return unix_socket(socket.SOCK_DGRAM, self._path)

    def _send(self, sock: socket.socket, entry: Entry) -> None:
        message = journal_message(entry)
        try:
            sock.send(message)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            _send_memfd(sock, message)


def journal_message(entry: Entry) -> bytes:
    """Return a record as the journal's native protocol has it."""
    fields = {
        "MESSAGE": record_text(entry.record),
        "PRIORITY": int(severity(entry.record)),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
    }
    fields |= {f"VGW_{_field_name(key)}": value for key, value in entry.record.items()}
    return b"".join(_field(name, str(value)) for name, value in fields.items())


def _field_name(key: str) -> str:
    """Return a key as a field may be named: upper case letters, digits and underscores."""
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in key).upper()[:60]


def _field(name: str, value: str) -> bytes:
    """Return a field. One with a line end has its length before it, so it can begin no other."""
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _send_memfd(sock: socket.socket, message: bytes) -> None:
    fd = os.memfd_create("vgw-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(message)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        socket.send_fds(sock, [b""], [fd])
    finally:
        os.close(fd)
