# SPDX-License-Identifier: Apache-2.0
"""Which sinks the log has, as the controller's options say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw.controller.log_file import FileSink
from vgw.controller.log_journal import JOURNAL_SOCKET, JournalSink
from vgw.controller.log_sink import Sink
from vgw.controller.log_syslog import DEV_LOG, SyslogSink
from vgw.errors import VgwError

SYNTAX: Final = "file[:PATH], journal[:SOCKET], syslog[:SOCKET] or syslog:udp:HOST:PORT"
_PORTS: Final = range(1, 1 << 16)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """The sinks in the form of SYNTAX, and how the files among them are rotated.

    A file is rotated before it is longer than `max_bytes` (0: never); `keep` older ones stay.
    """

    sinks: Sequence[str] = ("file",)
    max_bytes: int = 100 << 20
    keep: int = 5


def open_sinks(options: LogOptions, log_file: Path) -> list[Sink]:
    """Return the sinks that the options name; a file without a path is `log_file`.

    Receivers that are away now are tried again later. Raises VgwError for a text that names no
    sink, for one that is named twice, and for a file that cannot be written.
    """
    chosen = [_split(text, log_file) for text in options.sinks]
    for number, sink in enumerate(chosen):
        if sink in chosen[:number]:
            raise VgwError(f"the log {options.sinks[number]!r} is named twice; leave one out")
    return [
        FileSink(Path(place), options.max_bytes, options.keep)
        if kind == "file"
        else _receiver(kind, place)
        for kind, place in chosen
    ]


def check_sink(text: str) -> None:
    """Raise VgwError where a text names no sink."""
    _split(text, Path("/"))


def _split(text: str, log_file: Path) -> tuple[str, str]:
    """Return kind and place of a sink."""
    kind, colon, place = text.partition(":")
    usual = {"file": str(log_file), "journal": JOURNAL_SOCKET, "syslog": DEV_LOG}
    if kind not in usual or (colon and not place):
        raise VgwError(f"{text!r} is no place for a log; write {SYNTAX}")
    if kind == "syslog" and place.startswith("udp:"):
        _host_and_port(text, place)
    elif place and not Path(place).is_absolute():
        raise VgwError(f"{text!r}: the path of a log has to be absolute; write {SYNTAX}")
    return kind, place or usual[kind]


def _receiver(kind: str, place: str) -> Sink:
    if kind == "journal":
        return JournalSink(place)
    if place.startswith("udp:"):
        return SyslogSink(udp=_host_and_port(place, place))
    return SyslogSink(place)


def _host_and_port(text: str, place: str) -> tuple[str, int]:
    host, _, port = place.removeprefix("udp:").rpartition(":")
    if not host or not port.isdecimal() or int(port) not in _PORTS:
        raise VgwError(f"{text!r} has no HOST:PORT, for example syslog:udp:192.0.2.1:514")
    return host.strip("[]"), int(port)
