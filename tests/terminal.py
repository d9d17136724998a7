# SPDX-License-Identifier: Apache-2.0
"""A command on a terminal of its own, and what a person would see there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyte

from tests.patience import PATIENCE

COLUMNS, LINES = 80, 24


class Terminal:
    """A pseudo terminal with a command on it; its screen is kept as a terminal would show it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self._screen)
        self.sent = b""
        self._master, self._slave = pty.openpty()
        self._set_size(COLUMNS, LINES)
        self.before = self.attributes()
        environment = {**(os.environ if env is None else env), "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            # What runs tests in the background may ignore the keys' signals; no terminal does.
            ["env", "--default-signal=INT,QUIT", "setsid", "--ctty", "--wait", *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=environment,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._master)  # hangs up, should it still run
        os.close(self._slave)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()

    def attributes(self) -> list[Any]:
        """Return how the terminal is set."""
        return termios.tcgetattr(self._slave)

    def lines(self) -> list[str]:
        """Return what is on the screen now."""
        while select.select([self._master], [], [], 0)[0]:
            data = os.read(self._master, 1 << 16)
            self.sent += data
            self._stream.feed(data)
        return [line.rstrip() for line in self._screen.display]

    def text(self) -> str:
        """Return the screen as a text."""
        return "\n".join(self.lines())

    def wait_for(self, what: str, seen: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the screen is as it should be, and return its lines."""
        deadline = time.monotonic() + PATIENCE
        while True:
            lines = self.lines()
            if seen(lines):
                return lines
            assert time.monotonic() < deadline, f"never seen: {what}\n" + "\n".join(lines)
            select.select([self._master], [], [], 0.05)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        self.lines()
        self._screen.resize(lines, columns)
        self._set_size(columns, lines)

    def foreground(self) -> int:
        """Return the process group that has the terminal: that of the command."""
        return os.tcgetpgrp(self._master)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command."""
        os.killpg(self.foreground(), number)

    def end(self) -> int:
        """Wait for the command to end and return its exit status."""
        status = self.process.wait(PATIENCE)
        self.lines()
        return status

    def is_restored(self) -> bool:
        """Tell whether the terminal is set as before, shows its first page and has a cursor."""
        self.lines()
        alternate = self.sent.rfind(b"\x1b[?1049h"), self.sent.rfind(b"\x1b[?1049l")
        hidden = self.sent.rfind(b"\x1b[?25l"), self.sent.rfind(b"\x1b[?25h")
        on_off = (off > on for on, off in (alternate, hidden))
        return self.attributes() == self.before and all(on_off)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
