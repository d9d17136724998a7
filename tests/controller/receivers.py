# SPDX-License-Identifier: Apache-2.0
"""What receives the log in tests: real daemons, and sockets that decode what comes strictly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.controller.process import eventually
from tests.patience import PATIENCE

JOURNALD = "/lib/systemd/systemd-journald"
BUSYBOX = shutil.which("busybox")
_Value = TypeVar("_Value")

#: RFC 5424, 6: HEADER SP STRUCTURED-DATA SP MSG, with one element.
_MESSAGE = re.compile(
    rb"<(?P<priority>[1-9]?[0-9]|1[0-8][0-9]|19[01])>1 "
    rb"(?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{1,6}Z|-) "
    rb"(?P<host>[!-~]{1,255}) (?P<app>[!-~]{1,48}) (?P<process>[!-~]{1,128}) (?P<id>[!-~]{1,32}) "
    rb"\[(?P<element>[!#-<>-\\^-~]{1,32})"
    rb'(?P<parameters>(?: [!#-<>-\\^-~]{1,32}="(?:[^"\\\]\x00-\x1f]|\\["\\\]])*")*)\]'
    rb"(?: (?P<text>[ -~]*))?"
)
_PARAMETER = re.compile(rb' ([^=]+)="((?:[^"\\]|\\.)*)"')


class Syslog(NamedTuple):
    """A message of RFC 5424."""

    severity: int
    facility: int
    app: str
    id: str
    element: str
    parameters: dict[str, str]
    text: str


def parse_syslog(message: bytes) -> Syslog:
    """Return a message; fails where it is none."""
    found = _MESSAGE.fullmatch(message)
    assert found is not None, message
    facility, severity = divmod(int(found["priority"]), 8)
    parameters = {
        name.decode(): re.sub(rb'\\(["\\\]])', rb"\1", value).decode()
        for name, value in _PARAMETER.findall(found["parameters"])
    }
    return Syslog(
        severity,
        facility,
        found["app"].decode(),
        found["id"].decode(),
        found["element"].decode(),
        parameters,
        found["text"].decode(),
    )


def parse_journal(data: bytes) -> dict[str, str]:
    """Return the fields of a message of journald's native protocol; fails where it is none."""
    fields: dict[str, str] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Receiver:
    """A datagram socket at a path; decodes what comes."""

    def __init__(self, path: Path, decode: Callable[[bytes], _Value]) -> None:
        self.path = path
        self._decode = decode
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE)

    def get(self) -> Any:
        """Wait for the next message and return it."""
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        for fd in fds:
            data += os.pread(fd, os.fstat(fd).st_size, 0)
            os.close(fd)
        return self._decode(data)

    def quiet(self, seconds: float = 0.2) -> bool:
        """Tell whether nothing comes for some time."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(1)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)
        return False

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


class Daemon:
    """A process in a mount namespace of its own, which goes with it."""

    def __init__(self, script: str) -> None:
        unshare = shutil.which("unshare") or "unshare"
        self._process = subprocess.Popen(
            [unshare, "--mount", "--propagation", "private", "sh", "-ec", script],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def inside(self, path: str) -> Path:
        """Return a path of its namespace as this process sees it."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)


class Journald(Daemon):
    """A systemd-journald with a /run of its own."""

    def __init__(self) -> None:
        super().__init__(
            "mount -t tmpfs none /run && mkdir -p /run/systemd/journal /run/log/journal && "
            "if [ ! -s /etc/machine-id ]; then "
            "echo 0123456789abcdef0123456789abcdef > /run/machine-id; "
            "mount --bind /run/machine-id /etc/machine-id; fi; "
            f"exec {JOURNALD}"
        )
        self.socket = self.inside("/run/systemd/journal/socket")
        eventually("journald listens", self.socket.exists)

    def records(self, event: str) -> list[dict[str, Any]]:
        """Return what the journal has of one event, by journalctl."""
        found = subprocess.run(
            [
                *("journalctl", "-D", str(self.inside("/run/log/journal"))),
                *("-o", "json", "--no-pager", "--all", f"VGW_EVENT={event}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        return [json.loads(line) for line in found.stdout.splitlines()]


class BusyboxSyslogd(Daemon):
    """BusyBox's syslogd with a /dev of its own; what it gets is in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        super().__init__(
            f"mount -t tmpfs none /dev && mknod /dev/null c 1 3 && touch {file} && "
            f"exec {BUSYBOX} syslogd -n -O {file}"
        )
        self.socket = self.inside("/dev/log")
        eventually("syslogd listens", self.socket.exists)

    def lines(self) -> list[str]:
        return self.file.read_text().splitlines()


@contextlib.contextmanager
def running(daemon: Daemon) -> Iterator[None]:
    """End a daemon after the block."""
    try:
        yield
    finally:
        daemon.end()
