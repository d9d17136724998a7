# SPDX-License-Identifier: Apache-2.0
"""The parts `flood` and `full`: a VM under a SYN flood, and one whose table is full."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bench.attacked import (
    CLIENT,
    OTHER,
    SPARE,
    STRANGERS,
    VM,
    Attacked,
    attacked,
    connections,
    throughput,
)
from bench.flood import Flood, Sent, Side, handshake, outcome
from bench.lab import BenchError
from bench.live import Pair
from bench.options import Progress
from bench.report import Fact, Row, ratio
from bench.scale import Scale
from vgw.abi import Reason, Verdict

FLOOD_PART: Final = "flood"
FULL_PART: Final = "full"
#: A new connection is to work again within the longest half-open timeout; twice that is enough.
_RECOVERY: Final = 90.0
_SAMPLE_PAUSE: Final = 0.25
_TRIES: Final = 10
#: Connections beyond the limit, for those that did not come about.
_MORE: Final = 8192
_WHILE: Final = ("nothing", "flood elsewhere", "flood")


# --- the part flood -------------------------------------------------------------------------------


@dataclass
class _Watched:
    """What was seen of the VM while something went on, `seconds` long.

    The lists are of samples; `exchanges` are those of its open connections. Of `tried` new
    connections `opened` came about within the time that the first SYN has.
    """

    entries: list[int] = field(default_factory=list)
    half_open: list[int] = field(default_factory=list)
    tried: int = 0
    opened: int = 0
    memory: list[int] = field(default_factory=list)
    exchanges: int = 0
    longest: float = 0.0
    seconds: float = 0.0

    def rows(self, when: str, connections: int) -> list[Row]:
        """Return what the open connections had of it."""
        facts: dict[str, Fact] = {"connections": connections, "when": when}
        rate = self.exchanges / self.seconds
        return [
            Row(FLOOD_PART, "exchanges", "exchanges/s", (rate,), facts),
            Row(FLOOD_PART, "longest exchange", "ms", (self.longest * 1e3,), facts),
        ]


def run_flood(scale: Scale, progress: Progress) -> list[Row]:
    """Flood a VM and return what it, its connections and the other VM had of it."""
    with attacked(scale) as at:
        fresh = at.account()
        progress("a short flood, and new connections after it")
        at.flooder.run(at.flood(scale.sample))
        recoveries = {scale.sample: _recovery(at)}
        rows = _beside(at, scale, progress)
        with at.live:
            progress("open connections before the flood")
            calm = _watch(at, lambda: not at.live.proceed(5))
            before = at.account()
            sent, watched = _long_flood(at, scale, progress)
            after = at.account()
            recoveries[scale.seconds] = _recovery(at)
            at.live.proceed(2)
        lost = len(at.live.problems)
    dropped = after.by_reason(before, Verdict.DROP)
    half = len(watched.memory) // 2
    flat = max(watched.memory[half:]) / max(watched.memory[: half + 1])
    limit = f"of {after.limit}"
    return [
        *rows,
        _row("SYNs sent", "packets/s", sent.rate),
        _row("half-open flows that gave way", "flows", after.opened(before) - after.entries),
        _row("dropped as CT_HALF_OPEN", "packets", dropped[Reason.CT_HALF_OPEN]),
        _row("dropped as CT_FULL", "packets", dropped[Reason.CT_FULL]),
        _row("half-open flows, at most", "flows", max(watched.half_open)),
        _row("flows, at most", "flows", max(watched.entries), limit),
        _row("memory before", "MiB", fresh.memory / (1 << 20)),
        _row("memory during, at most", "MiB", max(watched.memory) / (1 << 20)),
        _row("memory, second half by first half", "ratio", flat),
        *calm.rows("before", scale.live),
        *watched.rows("during", scale.live),
        _row("open connections lost or stalled", "connections", lost),
        _row("new connections during the flood", "of all tried", watched.opened / watched.tried),
        *(
            Row(FLOOD_PART, "until a new connection", "s", (value,), {"after a flood of": seconds})
            for seconds, value in recoveries.items()
        ),
    ]


def _row(what: str, unit: str, value: float, note: str = "") -> Row:
    return Row(FLOOD_PART, what, unit, (value,), note=note)


def _watch(at: Attacked, goes_on: Callable[[], bool]) -> _Watched:
    """Sample the VM for as long as something goes on, which is asked between samples."""
    watched = _Watched()
    at.live.reset_longest()
    started, exchanges = time.monotonic(), at.live.exchanges
    while True:
        account = at.account()
        watched.entries.append(account.entries)
        watched.half_open.append(sum(account.half_open.values()))
        watched.memory.append(account.memory)
        if not goes_on():
            break
    watched.seconds = time.monotonic() - started
    watched.exchanges = at.live.exchanges - exchanges
    watched.longest = at.live.longest
    return watched


def _long_flood(at: Attacked, scale: Scale, progress: Progress) -> tuple[Sent, _Watched]:
    """Flood at full length."""
    end = time.monotonic() + scale.seconds

    results: list[bool] = []

    def goes_on() -> bool:
        progress(f"the flood, {max(end - time.monotonic(), 0):.0f} s left")
        time.sleep(_SAMPLE_PAUSE)
        results.append(at.connects(VM))
        return process.poll() is None

    with at.flooder.running(at.flood(scale.seconds)) as process:
        watched = _watch(at, goes_on)
        sent = outcome(process)
    watched.tried, watched.opened = len(results), sum(results)
    return sent, watched


def _beside(at: Attacked, scale: Scale, progress: Progress) -> list[Row]:
    """Measure the other VM's throughput: beside nothing, a flood elsewhere, and the flood."""
    _make_sink(at)
    (pair,) = connections(at.stack, at.nodes, OTHER, 1)
    here, away = _two_cpus()
    samples: dict[str, list[float]] = {name: [] for name in _WHILE}
    for number in range(scale.rounds):
        for name in _WHILE:
            progress(f"round {number + 1} of {scale.rounds}: the other VM beside {name}")
            samples[name].append(_throughput_beside(at, name, scale, pair, here, away))
    rows = []
    for name, values in samples.items():
        quotients = {base: ratio(values, samples[base]) for base in _WHILE[:2]}
        ratios = {base: value for base, value in quotients.items() if value is not None}
        facts: dict[str, Fact] = {"beside": name}
        rows.append(Row(FLOOD_PART, "other VM", "Gbit/s", tuple(values), facts, ratios))
    return rows


def _throughput_beside(  # noqa: PLR0913, PLR0917 - who, what, how long, where
    at: Attacked, name: str, scale: Scale, pair: Pair, here: int, away: int
) -> float:
    if name == "nothing":
        return throughput(pair, scale.sample, here)
    interface = "eth0" if name == "flood" else "sink"
    with at.flooder.running(at.flood(3600, interface), away):
        return throughput(pair, scale.sample, here)


def _make_sink(at: Attacked) -> None:
    """Give the client a card that leads nowhere."""
    namespace = at.nodes[CLIENT].namespace
    for words in (
        ("add", "sink", "type", "veth", "peer", "name", "sink-end"),
        ("set", "sink", "up"),
        ("set", "sink-end", "up"),
    ):
        subprocess.run(["ip", "-n", namespace, "link", *words], check=True)


def _two_cpus() -> tuple[int, int]:
    """Return the CPU for what is measured and that for the flood."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise BenchError("a flood beside something needs two processors")
    return cpus[0], cpus[1]


def _recovery(at: Attacked) -> float:
    """Return the seconds until a new connection to the VM comes about."""
    started = time.monotonic()
    while not at.connects(VM):
        if time.monotonic() - started > _RECOVERY:
            raise BenchError(f"no new connection within {_RECOVERY} s after the flood")
    return time.monotonic() - started


# --- the part full --------------------------------------------------------------------------------


def run_full(scale: Scale, progress: Progress) -> list[Row]:
    """Fill the VM's table with open connections and return what then works and what does not."""
    with attacked(scale) as at:
        with at.live:
            progress("filling the table")
            filled = _fill(at)
            before = at.account()
            progress("new connections to the full table, and to the other VM")
            new = sum(at.connects(VM) for _ in range(_TRIES))
            dropped = at.account().by_reason(before, Verdict.DROP)
            other = sum(at.connects(OTHER) for _ in range(_TRIES))
            at.live.proceed(2)
            after = at.account()
        lost = len(at.live.problems)
    note = f"of {_TRIES}"
    return [
        Row(FULL_PART, "filled in", "s", (filled,)),
        Row(FULL_PART, "flows", "flows", (after.entries,), note=f"of {after.limit}"),
        Row(FULL_PART, "memory", "MiB", (after.memory / (1 << 20),)),
        Row(FULL_PART, "open connections lost or stalled", "connections", (lost,)),
        Row(FULL_PART, "new connections to the VM", "connections", (new,), note=note),
        Row(FULL_PART, "dropped as CT_FULL meanwhile", "packets", (dropped[Reason.CT_FULL],)),
        Row(FULL_PART, "new connections to the other VM", "connections", (other,), note=note),
    ]


def _fill(at: Attacked) -> float:
    """Open connections until no more fit and return how many seconds it took."""
    near = Side(at.nodes[CLIENT].mac, STRANGERS, 1)
    far = Side(at.nodes[VM].mac, SPARE, 443)
    steps = handshake(at.card(CLIENT), at.card(VM), near, far)
    started = time.monotonic()
    limit = at.account().limit
    while at.account().entries < limit:
        if time.monotonic() - started > _RECOVERY:
            raise BenchError(f"{at.account().entries} of {limit} connections in {_RECOVERY} s")
        at.flooder.run(Flood(steps, limit + _MORE, 30, distinct=8))
    return time.monotonic() - started
