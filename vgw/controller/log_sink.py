# SPDX-License-Identifier: Apache-2.0
"""Between the log and one of its sinks: a queue and a thread, so that none waits for another.

Records that find the queue of a slow or dead sink full are lost to that sink alone, and counted.
A sink that is away is tried again until it is back; its queue bridges short absences.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

#: Records that wait for a sink; those that come then are lost.
MOST_WAITING: Final = 20_000
#: Records that are handed to a sink at once.
BATCH: Final = 500
#: Seconds after which waiting records are written even if nobody asks for it.
TICK_SECONDS: Final = 1.0
#: Seconds after which a sink that was away is tried again.
RETRY_SECONDS: Final = 1.0
#: The longest that drain() waits for a sink that was well before.
DRAIN_SECONDS: Final = 0.5
#: The longest that close() waits: what is left then is lost.
CLOSE_SECONDS: Final = 3.0

_logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A record, and the same as a line of JSON with its end."""

    record: Mapping[str, Any]
    line: str


class Written(NamedTuple):
    """How many of the entries given to a sink it is done with, and how many of those were lost.

    `trouble` says why the sink cannot take the others now; they are offered again.
    """

    done: int
    lost: int = 0
    trouble: str | None = None


class Sink(Protocol):
    """Where records go; used by one thread."""

    @property
    def kind(self) -> str:
        """What the losses are counted under: file, journal or syslog."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""

    def write(self, entries: Sequence[Entry]) -> Written:
        """Write entries; raises nothing. Also called with none, now and then."""

    def reopen(self) -> None:
        """Begin anew with the next write: its file was rotated away."""

    def close(self) -> None:
        """Give everything back."""


class SinkThread:
    """Feeds a sink; `add` never waits."""

    def __init__(self, sink: Sink) -> None:
        """Take over a sink and begin."""
        self._sink = sink
        self._waiting: deque[Entry] = deque()
        self._lost = 0
        self._rounds = 0
        self._wanted = 0
        #: Whether nobody shall wait for the sink: it was away, or too slow, when last asked.
        self._behind = False
        self._trouble: str | None = None
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"log-{sink.kind}", daemon=True)
        self._thread.start()

    @property
    def kind(self) -> str:
        """What the losses are counted under."""
        return self._sink.kind

    @property
    def lost(self) -> int:
        """How many records were lost to this sink."""
        with self._changed:
            return self._lost

    def add(self, entry: Entry) -> None:
        """Take a record; it is written with the next drain() or tick."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(entry)
            if len(self._waiting) == BATCH:
                self._changed.notify_all()

    def reopen(self) -> None:
        """Have the sink begin anew with what comes now."""
        self._sink.reopen()
        with self._changed:
            self._want_round()

    def kick(self) -> int:
        """Have what waits written now; return what drain() takes to wait for that."""
        with self._changed:
            if self._waiting:  # for it may be asked often, and there is mostly nothing
                self._want_round()
            return self._wanted

    def _want_round(self) -> None:
        self._wanted = self._rounds + 2  # one may be under way that has not seen the last
        self._changed.notify_all()

    def drain(self, wanted: int, deadline: float) -> None:
        """Wait until what waited at kick() is written, up to a deadline of time.monotonic().

        A sink that is away or too slow is not waited for again until it has caught up.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._behind or self._rounds >= wanted,
                max(deadline - time.monotonic(), 0),
            )
            if not done:
                self._behind = True

    def close(self) -> None:
        """Write what waits and end; what cannot be written soon is lost."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _logger.error("the log %s does not end its last write", self._sink.place)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            with self._changed:
                self._changed.wait_for(self._is_due, TICK_SECONDS)
                stopping = self._stop
            stuck = not self._write_waiting()
            with self._changed:
                self._rounds += 1
                self._behind = stuck
                self._changed.notify_all()
                if stuck:
                    # Nothing makes it quicker but the end of the process.
                    self._changed.wait_for(lambda: self._stop, RETRY_SECONDS)
        with self._changed:
            self._lost += len(self._waiting)
        self._sink.close()

    def _is_due(self) -> bool:
        return self._stop or self._rounds < self._wanted or len(self._waiting) >= BATCH

    def _write_waiting(self) -> bool:
        """Write what waits now. Return whether the sink is done with all of that."""
        with self._changed:
            left = len(self._waiting)
        while True:
            with self._changed:
                batch = list(islice(self._waiting, min(left, BATCH)))
            written = self._write(batch)
            with self._changed:
                for _ in range(written.done):
                    self._waiting.popleft()
                self._lost += written.lost
            self._tell(written.trouble)
            left -= written.done
            if written.done < len(batch) or not left:
                return not left

    def _write(self, batch: Sequence[Entry]) -> Written:
        try:
            return self._sink.write(batch)
        except Exception:
            # A bug that one record meets must not end the log.
            _logger.exception("the log %s loses records to an internal error", self._sink.place)
            return Written(len(batch), len(batch))

    def _tell(self, trouble: str | None) -> None:
        """Say once that the sink is away, and once that it is back."""
        if trouble == self._trouble:
            return
        if trouble is None:
            _logger.info("the log %s is back", self._sink.place)
        elif self._trouble is None:
            _logger.error("cannot write the log %s: %s; trying again", self._sink.place, trouble)
        self._trouble = trouble
