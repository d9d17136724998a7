# SPDX-License-Identifier: Apache-2.0
"""The log as syslog messages of RFC 5424, over a unix socket or UDP (RFC 5426).

The record is in the structured data, as parameters of the element `vgw@32473`, and as text for
people behind it. 32473 is the enterprise number of examples (RFC 5612), for vgw has none.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from vgw.controller.log_severity import severity
from vgw.controller.log_sink import Entry
from vgw.controller.log_socket import SocketSink, unix_socket
from vgw.controller.log_text import escaped, record_text

DEV_LOG: Final = "/dev/log"
_FACILITY_DAEMON: Final = 3
_ELEMENT: Final = "vgw@32473"
_NIL: Final = "-"
_LONGEST_HOST, _LONGEST_ID = 255, 32
#: What ends a parameter's value or would be taken for its end (RFC 5424, 6.3.3).
_QUOTED: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "]": "\\]"})


class SyslogSink(SocketSink):
    """Sends records to a syslog daemon on this host or another."""

    kind = "syslog"

    def __init__(self, unix: str | None = None, udp: tuple[str, int] | None = None) -> None:
        """Send to a unix socket, by default /dev/log, or to host and port by UDP."""
        super().__init__(f"syslog udp:{udp[0]}:{udp[1]}" if udp else f"syslog {unix or DEV_LOG}")
        self._unix = unix or DEV_LOG
        self._udp = udp
        self._is_stream = False

    def _connect(self) -> socket.socket:
        if self._udp is not None:
            return _udp_socket(*self._udp)
        self._is_stream = False
        try:
            return unix_socket(socket.SOCK_DGRAM, self._unix)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
        self._is_stream = True
        return unix_socket(socket.SOCK_STREAM, self._unix)

    def _send(self, sock: socket.socket, entry: Entry) -> None:
        message = syslog_message(entry, socket.gethostname(), os.getpid())
        if self._is_stream:
            sock.sendall(message + b"\n")  # a message has no line end in it
        else:
            sock.send(message)


def syslog_message(entry: Entry, host: str, pid: int) -> bytes:
    """Return a record as a message of RFC 5424, in ASCII and on one line."""
    record = entry.record
    priority = _FACILITY_DAEMON * 8 + severity(record)
    parameters = "".join(
        f' {_name(key)}="{_ascii(escaped(value)).translate(_QUOTED)}"'
        for key, value in record.items()
        if key != "ts"
    )
    header = " ".join(
        (
            f"<{priority}>1",
            _word(record.get("ts", _NIL), _LONGEST_HOST),
            _word(host, _LONGEST_HOST),
            "vgw",
            str(pid),
            _word(record.get("event", _NIL), _LONGEST_ID),
        )
    )
    return f"{header} [{_ELEMENT}{parameters}] {_ascii(record_text(record))}".encode()


def _word(value: object, longest: int) -> str:
    """Return a value as a field of the header: printable ASCII without blanks."""
    text = "".join(char if "!" <= char <= "~" else "_" for char in str(value))[:longest]
    return text or _NIL


def _name(key: str) -> str:
    """Return a key as the name of a parameter, which excludes four characters more."""
    return _word(key, _LONGEST_ID).translate(str.maketrans('=]"', "___"))


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _udp_socket(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
