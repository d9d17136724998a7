# SPDX-License-Identifier: Apache-2.0
"""The thread that brings events from the perf buffer to the log, and the count of those lost.

Programs never wait for this thread: what it is too slow for is lost, and each loss is counted by
its cause. `suppressed` (over a VM's budget) and `buffer` (no reader, or its buffer was full) are
counted by the programs in each endpoint's event_meter. `reader` is what the perf buffer told this
thread about gaps, which are in `buffer` too. `malformed` are records that are none of this ABI
(event_decoder.py), `lease` leases that nobody takes, or that whoever takes them failed at.
`log_file`, `log_journal` and `log_syslog` are what each sink of the log lost; others may have it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from vgw import abi, libbpf
from vgw.controller.event_decoder import Lease, decode
from vgw.controller.events import LogWriter, Names, Record, control_record, event_record
from vgw.errors import VgwError

TICK_MS: Final = 100
#: The longest that catch_up() waits.
CATCH_UP_SECONDS: Final = 2.0
WAKEUP_EVENTS: Final = 64
REPORT_SECONDS: Final = 5.0
CAUSES: Final = (
    *("suppressed", "buffer", "reader", "malformed", "lease"),
    *("log_file", "log_journal", "log_syslog"),
)

_logger = logging.getLogger(__name__)

#: Takes a LEASE event and what was captured of the frame it is about.
LeaseHandler = Callable[[abi.Event, bytes], None]
#: Takes the identity, the VM and the interface of an endpoint that floods.
FloodHandler = Callable[[int, str, str], None]


class Meter(NamedTuple):
    """What the event_meter of one endpoint lost by now; `made` differs when it was made anew."""

    vm: str
    interface: str
    made: int
    suppressed: int
    lost: int


class EventLosses:
    """Counts lost events by cause; safe to use from several threads.

    The totals go on when an endpoint goes, and begin with what the endpoints of a host had
    counted before the controller started.
    """

    def __init__(self, meters: Callable[[], Iterable[Meter]]) -> None:
        """Count what `meters` shows, which gives those of all endpoints, and what is added."""
        self._meters = meters
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))
        self._unreported: Counter[tuple[str, str | None, str | None]] = Counter()
        self._seen: dict[tuple[str, str, int], tuple[int, int]] | None = None

    def add(self, cause: str, count: int) -> None:
        """Count losses that no endpoint's meter knows of."""
        with self._lock:
            self._count(cause, None, None, count)

    def totals(self) -> dict[str, int]:
        """Return how many events were lost by now, by cause."""
        with self._lock:
            self._observe()
            return dict(self._totals)

    def known(self, cause: str) -> int:
        """Return how many were lost by a cause when that was last looked at."""
        with self._lock:
            return self._totals[cause]

    def records(self) -> list[Record]:
        """Return a record for each count that moved since the last call."""
        with self._lock:
            self._observe()
            moved, self._unreported = self._unreported, Counter()
        return [
            control_record("lost", vm=vm, interface=interface, cause=cause, count=count)
            for (cause, vm, interface), count in moved.items()
        ]

    def _observe(self) -> None:
        """Count what the meters show since they were last observed."""
        before = self._seen
        seen: dict[tuple[str, str, int], tuple[int, int]] = {}
        for vm, interface, made, suppressed, lost in self._meters():
            key, now = (vm, interface, made), (suppressed, lost)
            seen[key] = now
            then = (0, 0) if before is None else before.get(key, (0, 0))
            if now == then:
                continue
            for cause, count, old in zip(("suppressed", "buffer"), now, then, strict=True):
                if before is None:
                    self._totals[cause] += count
                else:
                    self._count(cause, vm, interface, max(0, count - old))
        self._seen = seen

    def _count(self, cause: str, vm: str | None, interface: str | None, count: int) -> None:
        if count:
            self._totals[cause] += count
            self._unreported[cause, vm, interface] += count


class EventReader:
    """Reads the host's events map while it runs; opens it when it is made, and made anew."""

    def __init__(
        self,
        pin: Path,
        names: Names,
        log: LogWriter,
        losses: EventLosses,
        on_lease: LeaseHandler | None = None,
    ) -> None:
        """Prepare to read the map pinned at `pin`; `on_lease` is called by the reader's thread."""
        self._pin = pin
        self._pin_path = os.fspath(pin)
        self._names = names
        self._log = log
        self._losses = losses
        self._on_lease = on_lease
        self._reader: libbpf.PerfReader | None = None
        self._pin_inode: int | None = None
        self._events: list[tuple[int, abi.Event | abi.FlowEvent]] = []
        self._lost_by_sinks: dict[str, int] = {}
        #: Whether a record came since the last report, and what the programs had lost by then.
        self._heard = False
        self._buffer_losses: int | None = None
        self._stop = threading.Event()
        self._looks = 0
        self._looked = threading.Condition()
        #: Called at every turn of the thread.
        self.alive: Callable[[], None] = lambda: None
        #: Called by it with what a program tells of a flood.
        self.on_flood: FloodHandler = lambda *_: None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to read. What was lost before is found out first, for it is no news later."""
        self._losses.totals()
        self._thread.start()

    def catch_up(self) -> None:
        """Wait until what is pinned now is being read, for a bounded time if it cannot be.

        Events before that are counted as lost, since nobody reads them.
        """
        with self._looked:
            # The look under way may have been too early; the next one is not.
            target = self._looks + 2
            self._looked.wait_for(lambda: self._looks >= target, CATCH_UP_SECONDS)

    def stop(self) -> None:
        """Write what is in the buffers and end the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        report_at = time.monotonic() + REPORT_SECONDS
        stopping = False
        while not stopping:
            stopping = self._stop.is_set()
            self.alive()
            try:
                self._read()
                self._write()
                if stopping or time.monotonic() >= report_at:
                    report_at = time.monotonic() + REPORT_SECONDS
                    self._report()
                self._log.kick()
            except Exception:
                # A bug that one event meets must not end the log of all.
                _logger.exception("reading events goes on after an internal error")
                self._stop.wait(1)
        self._close()

    def _read(self) -> None:
        """Take what is in the buffers, after a wait of at most one tick."""
        try:
            self._follow_pin()
            with self._looked:
                self._looks += 1
                self._looked.notify_all()
            if self._reader is None:
                self._stop.wait(TICK_MS / 1000)
                return
            self._reader.poll(0 if self._stop.is_set() else TICK_MS)
            # The kernel wakes for WAKEUP_EVENTS at once; fewer are collected once a tick.
            self._reader.consume()
        except (VgwError, OSError) as error:
            _logger.error("cannot read events: %s; trying again", error)
            self._close()
            self._stop.wait(1)

    def _follow_pin(self) -> None:
        """Open the map that is pinned now; it goes with the last VM and comes with the next."""
        try:
            inode = os.stat(self._pin_path).st_ino  # noqa: PTH116 - at each tick
        except FileNotFoundError:
            inode = None
        if inode == self._pin_inode:
            return
        if self._reader is not None:
            self._reader.consume()
        self._close()
        if inode is not None:
            fd = libbpf.get_pinned(self._pin)
            try:
                self._reader = libbpf.PerfReader(
                    fd, self._take, self._gap, wakeup_events=WAKEUP_EVENTS
                )
            finally:
                os.close(fd)
            self._pin_inode = inode

    def _close(self) -> None:
        self._pin_inode = None
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.close()

    def _take(self, _cpu: int, data: bytes) -> None:
        self._heard = True
        match decode(data):
            case None:
                self._losses.add("malformed", 1)
            case Lease(event, frame):
                self._take_lease(event, frame)
            case abi.FlowEvent() as flow:
                self._events.append((flow.event.time_ns, flow))
            case event if event.kind == abi.EventKind.FLOOD:
                self._take_flood(event)
            case event:
                self._events.append((event.time_ns, event))

    def _take_flood(self, event: abi.Event) -> None:
        """Hand on that an endpoint floods; of one that is not known any more nothing is done."""
        named = self._names.endpoint(event.endpoint)
        if named is not None:
            self.on_flood(event.endpoint, *named)

    def _take_lease(self, event: abi.Event, frame: bytes) -> None:
        """Hand a lease on; whatever its frame does to who takes it, the log goes on."""
        if self._on_lease is not None:
            try:
                self._on_lease(event, frame)
            except Exception:
                _logger.exception("a lease is passed over after an internal error")
            else:
                return
        self._losses.add("lease", 1)

    def _gap(self, _cpu: int, count: int) -> None:
        self._losses.add("reader", count)

    def _write(self) -> None:
        """Log the events that were taken; the buffers are per CPU, the log is in order of time."""
        events, self._events = self._events, []
        if not events:
            return
        clock_offset_ns = time.time_ns() - time.monotonic_ns()
        for _, event in sorted(events, key=lambda timed: timed[0]):
            self._log.add(event_record(event, self._names, clock_offset_ns))

    def _report(self) -> None:
        before, self._lost_by_sinks = self._lost_by_sinks, self._log.losses()
        for kind, lost in self._lost_by_sinks.items():
            self._losses.add(f"log_{kind}", lost - before.get(kind, 0))
        for record in self._losses.records():
            self._log.add(record)
        self._keep_slots()

    def _keep_slots(self) -> None:
        """Open the map again when programs lose records and none comes.

        Whoever else opens it to read takes its slots, and leaves them empty when it ends.
        """
        before, losses = self._buffer_losses, self._losses.known("buffer")
        if before is not None and losses > before and not self._heard:
            self._pin_inode = None
        self._buffer_losses = losses
        self._heard = False
