# SPDX-License-Identifier: Apache-2.0
"""The controller as a process: its lock, its threads, its signals, its start and its end.

Nothing that filters packets depends on it. It may be stopped, killed or replaced at any moment;
the next one adopts what is pinned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from vgw.controller import api, fitness, links
from vgw.controller.alarms import Alarms
from vgw.controller.allocator import give_back, share_one_pool
from vgw.controller.changes import Changes
from vgw.controller.event_names import EventNames
from vgw.controller.event_reader import EventLosses, EventReader
from vgw.controller.events import LogWriter, control_record
from vgw.controller.facts import Facts
from vgw.controller.flood_watch import FloodWatch
from vgw.controller.health import MAIN, Health, Watchdog, extending_start, notify
from vgw.controller.host_policy import START
from vgw.controller.last_flows import LastFlows
from vgw.controller.lock import controller_lock
from vgw.controller.log_choice import LogOptions, open_sinks
from vgw.controller.metrics import DEFAULT_LISTEN, ApplyTimes, HostCollector
from vgw.controller.metrics_server import MetricsServer, Tls
from vgw.controller.operations import Operations
from vgw.controller.paths import Paths
from vgw.controller.policy_watch import policy_watch
from vgw.controller.readings import read_endpoints, read_meters
from vgw.controller.reconcile import Host
from vgw.controller.rule_readings import RuleReadings
from vgw.controller.shield import Shields
from vgw.controller.verbs import Verbs
from vgw.controller.watch import AttachmentWatch

#: Seconds without a message after which the controller tidies up and tries again what failed.
IDLE_SECONDS: Final = 10.0
_STOP: Final = (signal.SIGTERM, signal.SIGINT)

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class LinkEvent:
    """An interface that came ("new") or went ("gone")."""

    kind: str
    name: str
    ifindex: int


#: What the main thread is told about: signals, interfaces, and work that others have for it.
Message = signal.Signals | LinkEvent | Callable[[], None]
Messages = queue.SimpleQueue[Message]


def run(  # noqa: PLR0913 (what the verb has options for)
    paths: Paths,
    listen: tuple[str, int] = DEFAULT_LISTEN,
    *,
    log_file: Path | None = None,
    log_options: LogOptions | None = None,
    rule_metrics: bool = False,
    tls: Tls | None = None,
) -> None:
    """Run the controller in the foreground until SIGTERM or SIGINT; SIGHUP reloads.

    `listen` is the address and port of the metrics, `tls` how they are kept from others, `log_file`
    overrides that of `paths`, `log_options` say where the log goes (None: to that file),
    `rule_metrics` adds a series for every rule. What is attached stays attached at the end. To be
    called in the main thread. Raises VgwError when this process may not load programs, when there
    is no bpffs, when another controller runs, or when a file or socket cannot be opened.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    share_one_pool()
    fitness.require_capabilities()
    fitness.require_programs()
    fitness.require_host_clock()
    fitness.require_bpffs(paths.bpffs)
    if log_file is not None:
        paths = dataclasses.replace(paths, log_file=log_file)
    messages: Messages = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(messages))
        stack.enter_context(controller_lock(paths))
        log = LogWriter(*open_sinks(log_options or LogOptions(), paths.log_file))
        stack.callback(log.close)
        losses = EventLosses(lambda: read_meters(host))
        health, applies, alarms, shields = Health(), ApplyTimes(), Alarms(log), Shields()
        facts = Facts(paths, log, alarms)
        host = Host(
            paths,
            overlay=facts.overlay,
            last_flows=LastFlows(paths, log, losses),
            alive=extending_start(notify, health.change_goes_on),
            shields=shields,
        )
        changes = Changes(host, log, applies, alarms, health, facts=facts)
        operations = Operations(changes)
        # Whatever can fail comes before the reader, which takes the events from any other.
        server = api.Server(paths.socket, Verbs(changes).by_name(), health.part("socket"))
        stack.callback(server.close)
        rules = RuleReadings(paths) if rule_metrics else None
        metrics = MetricsServer(
            listen,
            HostCollector(
                lambda: read_endpoints(host, rules),
                losses.totals,
                applies,
                alarms=alarms.current,
                rules=rule_metrics,
            ),
            tls,
            health.report,
        )
        stack.callback(metrics.close)
        floods = FloodWatch(changes, shields, health.part("floods"))
        names = EventNames(paths)
        operations.on_rename = names.outdated
        reader = EventReader(paths.events, names, log, losses, on_lease=facts.learner.heard)
        reader.on_flood = floods.heard
        reader.alive = health.part("events")
        stack.enter_context(_running(reader))
        log.add(control_record("start"))
        stack.callback(lambda: log.add(control_record("stop")))
        stack.enter_context(facts.followed(lambda: messages.put(operations.facts_changed)))
        operations.reload(START)
        reader.catch_up()
        stack.enter_context(policy_watch(paths, operations.look_after_policy))
        stack.enter_context(_link_watcher(messages, health.part("links")))
        server.start()
        stack.enter_context(_running(floods))
        stack.enter_context(
            _running(AttachmentWatch(paths, operations.inspect, health.part("watch")))
        )
        stack.callback(changes.finish)
        stack.enter_context(_running(Watchdog(health, alarms, notify, os.environ)))
        notify("READY=1")
        stack.callback(notify, "STOPPING=1")
        _work(messages, operations, log, health.part(MAIN))


class _Thread(Protocol):
    """A part of the controller that runs in a thread of its own."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


@contextlib.contextmanager
def _running(part: _Thread) -> Iterator[None]:
    """Have a part of the controller run during the block."""
    part.start()
    try:
        yield
    finally:
        part.stop()


def _work(
    messages: Messages, operations: Operations, log: LogWriter, alive: Callable[[], None]
) -> None:
    """Do what the messages ask for until one asks to stop; call `alive` at every turn."""
    while True:
        alive()
        batch = _next_batch(messages)
        if any(message in _STOP for message in batch):
            return
        try:
            if signal.SIGHUP in batch:
                log.reopen()
                operations.reload()
            came, gone = _net_changes(
                message for message in batch if isinstance(message, LinkEvent)
            )
            if came or gone:
                operations.links_changed(came, gone)
            # Asked for by many, the same work is done once.
            for work in dict.fromkeys(each for each in batch if callable(each)):
                work()
            if not batch:
                operations.idle()
                give_back()
        except Exception:
            # A bug here must not end the logs, metrics and socket of every VM.
            _logger.exception("the controller goes on after an internal error")


def _next_batch(messages: Messages) -> list[Message]:
    """Wait for a message, IDLE_SECONDS at most, and return it with those that came meanwhile.

    Interfaces come in bursts, and protecting many at once is much quicker than one by one.
    """
    batch: list[Message] = []
    with contextlib.suppress(queue.Empty):
        batch.append(messages.get(timeout=IDLE_SECONDS))
        while True:
            batch.append(messages.get_nowait())
    return batch


def _net_changes(events: Iterable[LinkEvent]) -> tuple[dict[str, int], set[str]]:
    """Return which interfaces are there now (name: index) and which went, if only for a moment."""
    came: dict[str, int] = {}
    gone: set[str] = set()
    for event in events:
        if event.kind == "new":
            came[event.name] = event.ifindex
        else:
            came.pop(event.name, None)
            gone.add(event.name)
    return came, gone


@contextlib.contextmanager
def _signals(messages: Messages) -> Iterator[None]:
    """Have the signals that concern the controller sent as messages."""
    handled = (*_STOP, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda number, _: messages.put(signal.Signals(number)))
        for number in handled
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _link_watcher(messages: Messages, alive: Callable[[], None]) -> Iterator[None]:
    """Have interfaces that come and go sent as messages by a thread; first those that are there."""

    def watch() -> None:
        while not stop.is_set():
            try:
                links.watch_links(lambda *event: messages.put(LinkEvent(*event)), stop, alive)
            except OSError as error:
                _logger.error("cannot follow interfaces: %s; trying again", error)
                stop.wait(1)

    stop = threading.Event()
    thread = threading.Thread(target=watch, name="links", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
