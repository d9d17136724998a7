# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: read from the kernel's maps at the moment of a scrape, never from events.

Because the counters live in the maps of the endpoints, they go on over restarts of the controller
and their series go when a VM is detached. Labels are names of VMs, interfaces and rules, and words
of vgw's own: nothing that a packet brings. However many there are, a scrape has its limit.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from vgw import __version__, abi
from vgw.controller.alarms import Alarm
from vgw.controller.metrics_text import CounterFamily, GaugeFamily, keep
from vgw.maps_stats import Counter, Stats
from vgw.policy.model import DIRECTION_OF_PATH, Direction

DEFAULT_LISTEN: Final = ("127.0.0.1", 9477)
_APPLY_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Samples of a scrape; 1,000 interfaces have 30,000 without those of rules.
MAX_SAMPLES: Final = 200_000
_ENDPOINT: Final = ("vm", "interface")
_REFUSED: Final = (abi.Verdict.DROP, abi.Verdict.REJECT)
_ALWAYS_SHOWN: Final = (abi.Verdict.ACCEPT, abi.Verdict.DROP)

#: The values of labels, which an enumeration takes long to say.
_DIRECTION: Final = {path: direction.value for path, direction in DIRECTION_OF_PATH.items()}
_VERDICT_LABELS: Final = {
    (path, verdict): (_DIRECTION[path], verdict.name.lower())
    for path in abi.Path
    for verdict in abi.Verdict
}
_REASON_LABELS: Final = {
    (path, reason): (_DIRECTION[path], reason.name) for path in abi.Path for reason in abi.Reason
}
_NOTHING_YET: Final = {
    (path, verdict): Counter(0, 0) for path in abi.Path for verdict in _ALWAYS_SHOWN
}


@dataclass(frozen=True, slots=True)
class RuleReading:
    """Packets that a rule decided."""

    direction: str
    policy: str
    rule: str
    packets: int


@dataclass(frozen=True, slots=True)
class EndpointReading:
    """Everything a scrape shows of one endpoint.

    `hook` and `mode` are of its from_vm program; `vm_mode` is that of the VM's policy. `shield` is
    whether a shield is up, None for an endpoint that gets none.
    """

    vm: str
    interface: str
    generation: int
    attached: bool
    hook: str
    mode: str
    vm_mode: str
    stats: Stats
    conntrack_entries: int
    conntrack_max: int
    half_open: Mapping[Direction, int]
    half_open_max: int
    new_connections: Mapping[Direction, int]
    events: int
    reject_answers: Mapping[str, int]
    rules: Sequence[RuleReading] = ()
    shield: bool | None = None


class ApplyTimes:
    """How long changes of policy took and how many failed; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(_APPLY_BUCKETS) + 1)
        self._sum = 0.0
        self._errors = 0

    def record(self, seconds: float, failures: int = 0) -> None:
        """Count one change that took so long and failed for so many VMs."""
        with self._lock:
            self._counts[bisect.bisect_left(_APPLY_BUCKETS, seconds)] += 1
            self._sum += seconds
            self._errors += failures

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        with self._lock:
            counts, total, errors = list(self._counts), self._sum, self._errors
        buckets, seen = [], 0
        for bound, count in zip((*map(str, _APPLY_BUCKETS), "+Inf"), counts, strict=True):
            seen += count
            buckets.append((bound, float(seen)))
        yield HistogramMetricFamily(
            "vgw_policy_apply_seconds",
            "Time that changes of policy took, from the request until every VM had it.",
            buckets=buckets,
            sum_value=total,
        )
        failed = CounterFamily(
            "vgw_policy_apply_errors", "VMs and policies that could not be applied."
        )
        failed.add_metric((), errors)
        yield failed


class HostCollector(Collector):
    """Makes the families of one scrape out of readings of all endpoints."""

    def __init__(
        self,
        read: Callable[[], Iterable[EndpointReading]],
        losses: Callable[[], Mapping[str, int]],
        applies: ApplyTimes,
        *,
        alarms: Callable[[], Iterable[Alarm]] = tuple,
        rules: bool = False,
    ) -> None:
        """Remember where values come from; `rules` adds a series for every rule."""
        self._alarms = alarms
        self._read = read
        self._losses = losses
        self._applies = applies
        self._rules = rules

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registering must not read every map."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the families, as far as there is room for their samples."""
        left = MAX_SAMPLES
        omitted = 0
        for family in self._families():
            kept, cut = keep(family, left)
            left -= kept
            omitted += cut
            yield family
        missing = GaugeFamily(
            "vgw_omitted_samples",
            f"Samples that this scrape lacks because it has {MAX_SAMPLES} others.",
        )
        missing.add_metric((), omitted)
        yield missing

    def _families(self) -> Iterator[Metric]:
        """Yield all families, those first that must not be missing."""
        readings = list(self._read())
        yield from self._host_families()
        yield from _endpoint_families(readings)
        yield from _packet_families(readings)
        yield from _conntrack_families(readings)
        if self._rules:
            yield _rule_family(readings)

    def _host_families(self) -> Iterator[Metric]:
        lost = CounterFamily(
            "vgw_events_lost",
            "Events not logged: over a VM's budget (suppressed), no room in the perf buffer "
            "(buffer), gaps the reader noticed, which are in buffer too, or could not log "
            "(reader), unreadable (malformed).",
            labels=("cause",),
        )
        for cause, count in self._losses().items():
            lost.add_metric((cause,), count)
        yield lost
        yield _alarm_family(self._alarms())
        yield from self._applies.collect()
        yield InfoMetricFamily(
            "vgw_build",
            "Version of the controller and of its map ABI.",
            value={"version": __version__, "abi": str(abi.ABI_VERSION)},
        )


def _packet_families(readings: Sequence[EndpointReading]) -> Iterator[Metric]:
    labels = (*_ENDPOINT, "direction", "verdict")
    packets = CounterFamily("vgw_packets", "Packets by what they got.", labels=labels)
    octets = CounterFamily(
        "vgw_bytes", "Bytes on the wire of packets by what they got.", labels=labels
    )
    dropped = CounterFamily(
        "vgw_dropped_packets",
        "Packets dropped or rejected, by reason.",
        labels=(*_ENDPOINT, "direction", "reason"),
    )
    for reading in readings:
        where = (reading.vm, reading.interface)
        for (path, verdict), counter in _by_verdict(reading.stats).items():
            series = where + _VERDICT_LABELS[path, verdict]
            packets.add_metric(series, counter.packets)
            octets.add_metric(series, counter.bytes)
        for (path, reason), count in _by_reason(reading.stats).items():
            dropped.add_metric(where + _REASON_LABELS[path, reason], count)
    yield packets
    yield octets
    yield dropped


def _by_verdict(stats: Stats) -> dict[tuple[abi.Path, abi.Verdict], Counter]:
    """Sum over reasons; the common verdicts are there from the first scrape, with zero."""
    sums = dict(_NOTHING_YET)
    for (path, verdict, _), counter in stats.items():
        packets, octets = sums.get((path, verdict), (0, 0))
        sums[path, verdict] = Counter(packets + counter.packets, octets + counter.bytes)
    return sums


def _by_reason(stats: Stats) -> dict[tuple[abi.Path, abi.Reason], int]:
    """Sum the packets that did not pass; a monitor's would_drop passed."""
    sums: dict[tuple[abi.Path, abi.Reason], int] = {}
    for (path, verdict, reason), counter in stats.items():
        if verdict in _REFUSED:
            sums[path, reason] = sums.get((path, reason), 0) + counter.packets
    return sums


def _conntrack_families(readings: Sequence[EndpointReading]) -> Iterator[Metric]:
    entries = GaugeFamily(
        "vgw_conntrack_entries",
        "Flows in the connection table, dead ones that wait for removal included.",
        labels=_ENDPOINT,
    )
    limit = GaugeFamily(
        "vgw_conntrack_max_entries", "Flows the connection table can hold.", labels=_ENDPOINT
    )
    half_open = GaugeFamily(
        "vgw_conntrack_half_open",
        "Flows that wait for an answer, by the direction of their first packet.",
        labels=(*_ENDPOINT, "direction"),
    )
    half_open_limit = GaugeFamily(
        "vgw_conntrack_half_open_max",
        "Half-open flows that there may be in each direction.",
        labels=_ENDPOINT,
    )
    created = CounterFamily(
        "vgw_new_connections",
        "Flows created, by the direction of their first packet.",
        labels=(*_ENDPOINT, "direction"),
    )
    for reading in readings:
        where = (reading.vm, reading.interface)
        entries.add_metric(where, reading.conntrack_entries)
        limit.add_metric(where, reading.conntrack_max)
        half_open_limit.add_metric(where, reading.half_open_max)
        for direction, count in reading.half_open.items():
            half_open.add_metric((*where, direction), count)
        for direction, count in reading.new_connections.items():
            created.add_metric((*where, direction), count)
    yield from (entries, limit, half_open, half_open_limit, created)


def _rule_family(readings: Sequence[EndpointReading]) -> Metric:
    family = CounterFamily(
        "vgw_rule_packets",
        "Packets that a rule decided, not those of the flows it opened.",
        labels=(*_ENDPOINT, "direction", "policy", "rule"),
    )
    for reading in readings:
        for rule in reading.rules:
            family.add_metric(
                (reading.vm, reading.interface, rule.direction, rule.policy, rule.rule),
                rule.packets,
            )
    return family


def _endpoint_families(readings: Sequence[EndpointReading]) -> Iterator[Metric]:
    events = CounterFamily(
        "vgw_events", "Events the packet programs put into the perf buffer.", labels=_ENDPOINT
    )
    answers = CounterFamily(
        "vgw_reject_answers",
        "Answers to rejected packets: sent, over the VM's budget (suppressed), or not possible "
        "(failed).",
        labels=(*_ENDPOINT, "result"),
    )
    attached = GaugeFamily(
        "vgw_attached",
        "1 if both programs of an endpoint are attached; hook and mode are of the one that sees "
        "packets from the VM.",
        labels=(*_ENDPOINT, "hook", "mode"),
    )
    shield = GaugeFamily(
        "vgw_shield",
        "1 while packets that the VM floods with are dropped at XDP already.",
        labels=_ENDPOINT,
    )
    generation = GaugeFamily(
        "vgw_policy_generation", "Number of the policy in force.", labels=("vm",)
    )
    for reading in readings:
        where = (reading.vm, reading.interface)
        events.add_metric(where, reading.events)
        for result, count in reading.reject_answers.items():
            answers.add_metric((*where, result), count)
        attached.add_metric((*where, reading.hook, reading.mode), int(reading.attached))
        if reading.shield is not None:
            shield.add_metric(where, int(reading.shield))
    for vm, number in {reading.vm: reading.generation for reading in readings}.items():
        generation.add_metric((vm,), number)
    yield events
    yield answers
    yield attached
    yield shield
    yield generation


def _alarm_family(alarms: Iterable[Alarm]) -> Metric:
    family = GaugeFamily(
        "vgw_alarm",
        "1 for each alarm that stands; `vgw status` says what it is about.",
        labels=("alarm", *_ENDPOINT),
    )
    for alarm in alarms:
        family.add_metric((alarm.alarm, alarm.vm or "", alarm.interface or ""), 1)
    return family
