# SPDX-License-Identifier: Apache-2.0
"""Who orders a change: the user and the process, as the kernel and the process itself say it."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: The login user of a process that nobody's login began.
_NO_LOGIN: Final = 0xFFFFFFFF
_LONGEST: Final = 200


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did something: `via` is cli, controller or guardian, whichever process did the work.

    `login` is the user whose login session it was, `sudo` the one that sudo says it was called by;
    None where nobody knows.
    """

    uid: int
    user: str
    via: str
    host: str
    pid: int
    command: str
    login: str | None = None
    sudo: str | None = None

    def text(self) -> str:
        """Return who it was in one or two words: `alice` or `root (alice)`."""
        behind = self.login or self.sudo
        return self.user if behind in (None, self.user) else f"{self.user} ({behind})"


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a unix socket, as the kernel says it was on connecting."""

    pid: int
    uid: int


def this_process(via: str) -> Actor:
    """Return this process as the one who orders."""
    return peer_process(Peer(os.getpid(), os.getuid()), via)


def peer_process(peer: Peer, via: str) -> Actor:
    """Return the process at the other end of a socket as the one who orders.

    What is read of it in /proc may be lost: the process may have ended. Only the user id and the
    login come from the kernel; the rest is what the process says of itself, in one short line.
    """
    process = Path("/proc") / str(peer.pid)
    login = _read(process / "loginuid").decode(errors="replace").strip()
    sudo = _variable(_read(process / "environ"), b"SUDO_USER")
    command = _read(process / "cmdline").rstrip(b"\0").replace(b"\0", b" ")
    return Actor(
        uid=peer.uid,
        user=_user_name(peer.uid),
        via=via,
        host=socket.gethostname(),
        pid=peer.pid,
        command=one_line(command.decode(errors="replace")),
        login=_user_name(int(login)) if login.isdecimal() and int(login) != _NO_LOGIN else None,
        sudo=one_line(sudo.decode(errors="replace")) if sudo else None,
    )


def actor_from_json(body: dict[str, Any]) -> Actor:
    """Return the actor that dataclasses.asdict() described; raises TypeError for another."""
    return Actor(**body)


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Return a text on one line, with what cannot be printed escaped, cut where it is too long."""
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[: longest + 1]
    )
    return escaped if len(escaped) <= longest else f"{escaped[: longest - 3]}..."


def _user_name(uid: int) -> str:
    try:
        return one_line(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _variable(environment: bytes, name: bytes) -> bytes | None:
    for line in environment.split(b"\0"):
        key, equals, value = line.partition(b"=")
        if equals and key == name:
            return value
    return None


def _read(file: Path) -> bytes:
    with contextlib.suppress(OSError):
        return file.read_bytes()
    return b""
