# SPDX-License-Identifier: Apache-2.0
"""Whether the controller is alive: each of its threads has to show that it makes progress.

A thread that shows none for STUCK_SECONDS is stuck, and so is a change of the host of which no part
was done for CHANGE_SECONDS. Then there is an alarm, /healthz says 503, and the service manager is
not told any more that all is well, so that its watchdog starts the controller again. Packets do not
notice any of this.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vgw.controller.alarms import Alarms

#: A thread that goes round at least every IDLE_SECONDS is stuck after this time.
STUCK_SECONDS: Final = 60.0
#: A change goes on VM by VM; the largest policy of one takes a tenth of this on a busy machine.
CHANGE_SECONDS: Final = 300.0
#: How often the watchdog looks at the others.
CHECK_SECONDS: Final = 1.0
#: How often the service manager is asked for more time for the start.
_EXTEND_SECONDS: Final = 5.0

MAIN: Final = "main"
_CHANGE: Final = "change"
_ALARM: Final = "stuck"

Notify = Callable[[str], None]


class Health:
    """When each part of the controller last made progress; safe to use from several threads."""

    def __init__(
        self, stuck_seconds: float | None = None, change_seconds: float | None = None
    ) -> None:
        """Know of no part yet; the limits are those of this module unless given."""
        self._stuck = STUCK_SECONDS if stuck_seconds is None else stuck_seconds
        self._change = CHANGE_SECONDS if change_seconds is None else change_seconds
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._changes = 0

    def part(self, name: str) -> Callable[[], None]:
        """Return what a part of the controller calls whenever it makes progress."""

        def alive() -> None:
            self._last[name] = time.monotonic()

        alive()
        return alive

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Work on a change for a block; who waits for it is not stuck."""
        with self._lock:
            self._changes += 1
            self._last[_CHANGE] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._changes -= 1
                now = time.monotonic()
                # The main thread may have waited for it and gets its turn now.
                self._last |= dict.fromkeys({MAIN} & self._last.keys(), now)
                if self._changes == 0:
                    self._last.pop(_CHANGE, None)

    def change_goes_on(self) -> None:
        """Note that a part of the change under way is done."""
        with self._lock:
            if self._changes:
                self._last[_CHANGE] = time.monotonic()

    def stuck(self) -> dict[str, float]:
        """Return the parts that are stuck, and for how many seconds they have made no progress."""
        with self._lock:
            last, changing = dict(self._last), self._changes > 0
        now = time.monotonic()
        limits = {name: self._change if name == _CHANGE else self._stuck for name in last}
        if changing:
            # They wait for the change, which has its own limit.
            for name in limits.keys() & {MAIN, "watch", "floods"}:
                limits[name] = self._change + self._stuck
        return {name: now - at for name, at in last.items() if now - at > limits[name]}

    def report(self) -> dict[str, Any]:
        """Return {"ok", "stuck": {part: seconds}}, as JSON."""
        stuck = {name: round(seconds, 1) for name, seconds in sorted(self.stuck().items())}
        return {"ok": not stuck, "stuck": stuck}


class Watchdog:
    """A thread that looks at the others: raises the alarm, and tells the service manager."""

    def __init__(self, health: Health, alarms: Alarms, notify: Notify, environ: Mapping[str, str]):
        """Look at what `health` says; `notify` speaks to the service manager."""
        self._health = health
        self._alarms = alarms
        self._notify = notify
        seconds = watchdog_seconds(environ)
        self._period = CHECK_SECONDS if seconds is None else min(CHECK_SECONDS, seconds / 3)
        self._wanted = seconds is not None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            stuck = self._health.stuck()
            if stuck:
                self._alarms.set(_ALARM, _text(stuck))
            else:
                self._alarms.clear(_ALARM)
                if self._wanted:
                    self._notify("WATCHDOG=1")
            self._stop.wait(self._period)


def watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Return within how many seconds the service manager wants to hear of this process, or None."""
    try:
        seconds = int(environ.get("WATCHDOG_USEC", "")) / 1e6
        for_me = int(environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except ValueError:
        return None
    return seconds if seconds > 0 and for_me else None


def extending_start(notify: Notify, alive: Callable[[], None]) -> Callable[[], None]:
    """Return `alive` that also asks the service manager for more time, as often as is needed.

    The start protects every VM first, which takes as long as there are VMs.
    """
    asked_at = 0.0

    def extended() -> None:
        nonlocal asked_at
        alive()
        if time.monotonic() - asked_at >= _EXTEND_SECONDS:
            asked_at = time.monotonic()
            notify(f"EXTEND_TIMEOUT_USEC={int(CHANGE_SECONDS * 1e6)}")

    return extended


def notify(state: str) -> None:
    """Tell the service manager about a state, by sd_notify's protocol, if it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def _text(stuck: Mapping[str, float]) -> str:
    parts = ", ".join(sorted(stuck))
    return (
        f"these parts of the controller make no progress: {parts}; VMs stay protected; its log "
        "may say why, restart it"
    )
