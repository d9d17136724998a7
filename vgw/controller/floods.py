# SPDX-License-Identifier: Apache-2.0
"""When a VM's packets are a flood that is worth a shield, and when it is over.

A shield saves most of what a dropped packet costs, and costs what passes a second look, so it
goes up where it saves more than it costs, and comes down when it has not for some time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from vgw.abi import Path, Reason, Verdict
from vgw.maps import Counter
from vgw.policy.model import Hook

#: Drops of one CPU in a window (bpf/floods.h) of which the controller is told.
FLOOD_DROPS: Final = 20_000
#: Drops a second of all CPUs below which a flood is over.
CALM_DROPS: Final = 5_000
#: A look sooner than that after the one before says nothing of a rate.
SHORTEST_SECONDS: Final = 0.5
#: How long it has to be over, or a shield of no use, until that is taken off.
CALM_SECONDS: Final = 10.0
#: What a shield saves of each packet it drops, and costs each that passes and each of its bytes, in
#: ns of one machine, where only their proportion counts: a drop at XDP took 470 and one at tc 970
#: (`python -m bench --only denied`), and a frame of 64 KiB, which is copied for XDP, 3,600 more.
SAVED_NS: Final = 500.0
COST_NS: Final = 300.0
COST_BYTE_NS: Final = 0.06

#: The kind of interface where a frame is judged at XDP before a socket buffer is made of it. On a
#: veth XDP takes segmentation offload away, and saves nothing.
_EARLY_KIND: Final = "tun"

Stats = Mapping[tuple[Path, Verdict, Reason], Counter]


def flood_drops(wanted: Hook, kind: str) -> int:
    """Return EndpointConfig.flood_drops for an interface of a kind where a hook is asked for."""
    return FLOOD_DROPS if wanted is Hook.AUTO and kind == _EARLY_KIND else 0


class Traffic(NamedTuple):
    """What a VM has sent by now: packets that were dropped, those that passed, and their bytes."""

    dropped: int
    passed: int
    passed_bytes: int

    def since(self, before: Traffic) -> Traffic:
        """Return what came after another moment."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


def traffic_from_vm(stats: Stats) -> Traffic:
    """Return what counters say of the path from the VM; rejected packets are none of either."""
    sums = dict.fromkeys(Verdict, Counter(0, 0))
    for (path, verdict, _), counter in stats.items():
        if path is Path.FROM_VM:
            before = sums[verdict]
            sums[verdict] = Counter(before.packets + counter.packets, before.bytes + counter.bytes)
    passed = sums[Verdict.ACCEPT]
    return Traffic(sums[Verdict.DROP].packets, passed.packets, passed.bytes)


class Step(enum.Enum):
    """What is to be done about a VM whose packets are watched."""

    WAIT = enum.auto()
    RAISE = enum.auto()
    LOWER = enum.auto()
    FORGET = enum.auto()
    """There is no flood any more, or none that a shield would help against."""


@dataclass(slots=True)
class FloodJudge:
    """Looks at the packets of one VM from when a flood was reported on."""

    last: Traffic
    last_seconds: float
    up: bool = False
    #: Since when the shield has been of no use; None: it is.
    useless_since: float | None = None

    def look(self, now: Traffic, seconds: float) -> Step:
        """Return what is to be done; `seconds` is the time, by a clock that nobody sets."""
        traffic, elapsed = now.since(self.last), seconds - self.last_seconds
        if elapsed < SHORTEST_SECONDS:
            return Step.WAIT
        self.last, self.last_seconds = now, seconds
        if not self.up:
            flood = traffic.dropped >= FLOOD_DROPS * elapsed
            return Step.RAISE if flood and saves(traffic) else Step.FORGET
        if traffic.dropped >= CALM_DROPS * elapsed and saves(traffic):
            self.useless_since = None
            return Step.WAIT
        if self.useless_since is None:
            self.useless_since = seconds
        return Step.LOWER if seconds - self.useless_since >= CALM_SECONDS else Step.WAIT


def saves(traffic: Traffic) -> bool:
    """Tell whether a shield saves more of such packets than it costs."""
    cost = traffic.passed * COST_NS + traffic.passed_bytes * COST_BYTE_NS
    return traffic.dropped * SAVED_NS > cost
