# SPDX-License-Identifier: Apache-2.0
"""The terminal of `vgw top`: its keys, and that it is as before whatever ends the screen."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console

from vgw.cli_top_looks import Looker, Watcher
from vgw.cli_top_view import State, picture

_KEYS: Final = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[C": "right", b"\x1bOC": "right", b"l": "right",
    b"\x1b[D": "left", b"\x1bOD": "left", b"h": "left",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down",
    b"\x1b[H": "home", b"\x1b[F": "end", b"\x1b[1~": "home", b"\x1b[4~": "end",
    b"\r": "enter", b"\n": "enter", b"\x1b": "back", b"\x7f": "back", b"\b": "back",
    b"s": "s", b"r": "r", b"q": "q", b"Q": "q",
}  # fmt: skip
#: Signals that end the screen, and those that only wake it up.
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_STOP_KEY: Final = "stop"
#: Puts the cursor where the first character goes.
_HOME: Final = "\x1b[H"


def show(looker: Looker, interval: float, state: State) -> None:
    """Show the screen on stdin's and stdout's terminal until the user quits.

    Ctrl-C raises KeyboardInterrupt and the signals that end a process SystemExit, each when the
    terminal is as it was before.
    """
    console = Console(highlight=False, emoji=False, markup=False)
    with _woken() as (wake_fd, wake):
        watcher = Watcher(looker, interval, wake)
        watcher.start()
        try:
            while True:
                with _screen(console) as draw:
                    state, suspended = _work(watcher, state, wake_fd, draw)
                if not suspended:
                    return
                os.kill(os.getpid(), signal.SIGSTOP)  # until the shell goes on with it
        finally:
            watcher.stop()


def _work(
    watcher: Watcher, state: State, wake_fd: int, draw: Callable[[State, Watcher], None]
) -> tuple[State, bool]:
    """Draw and obey keys; return the state and whether to suspend, or else to quit."""
    while True:
        watcher.focus(state.focus(watcher.look), rules=state.opened)
        draw(state, watcher)
        ready, _, _ = select.select([sys.stdin.fileno(), wake_fd], [], [])
        if wake_fd in ready and _STOP_KEY in _drained(wake_fd):
            return state, True
        if sys.stdin.fileno() in ready:
            data = os.read(sys.stdin.fileno(), 256)
            if not data:  # the terminal is gone
                return state, False
            for key in keys_in(data):
                if key == "q":
                    return state, False
                state = state.pressed(key, watcher.look)


def keys_in(data: bytes) -> Iterator[str]:
    """Yield the keys that a terminal sent; what is none is passed over."""
    while data:
        length = next((n for n in (4, 3, 1) if data[:n] in _KEYS), 0)
        if data[:1] == b"\x1b" and length <= 1 and len(data) > 1 and data[1:2] in b"[O":
            # A key that is not known: its name ends with a letter or a tilde.
            end = next(
                (
                    n
                    for n in range(2, len(data))
                    if data[n : n + 1].isalpha() or data[n : n + 1] == b"~"
                ),
                len(data) - 1,
            )
            data = data[end + 1 :]
            continue
        if length:
            yield _KEYS[data[:length]]
        data = data[max(length, 1) :]


def _drained(wake_fd: int) -> set[str]:
    """Read what woke the screen up; return what it asks for."""
    numbers = os.read(wake_fd, 4096)
    return {_STOP_KEY} if signal.SIGTSTP in numbers else set()


@contextlib.contextmanager
def _woken() -> Iterator[tuple[int, Callable[[], None]]]:
    """Give a descriptor that is readable when a signal or the watcher has something to say."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake() -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it is over
            os.write(write_fd, b"\0")

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    def nothing(_number: int, _frame: FrameType | None) -> None:
        """Do nothing but to have the descriptor written."""

    handlers: dict[signal.Signals, Callable[..., Any]] = dict.fromkeys(_ENDS, end)
    handlers |= dict.fromkeys((signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT), nothing)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    woken = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    try:
        yield read_fd, wake
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read_fd)
        os.close(write_fd)


@contextlib.contextmanager
def _screen(console: Console) -> Iterator[Callable[[State, Watcher], None]]:
    """Take over the terminal for a block; gives what draws on it."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        with console.screen(hide_cursor=True):

            def draw(state: State, watcher: Watcher) -> None:
                with console.capture() as drawn:
                    width, height = console.size
                    text = picture(watcher.look, state, width, height)
                    console.print(text, end="", no_wrap=True, overflow="crop")
                console.file.write(_HOME + drawn.get())
                console.file.flush()

            yield draw
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
