# SPDX-License-Identifier: Apache-2.0
"""When a VM's packets are a flood that is worth a shield, and when it is over.

A shield saves most of what a packet costs that it drops, and costs the others a second look, so it
goes up where it saves more than it costs, and comes down when it has not for some time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from vgw.abi import FloodDrop, Path
from vgw.maps_stats import Counter, Stats
from vgw.policy.model import Hook

#: Drops of one CPU in a window (bpf/floods.h) of which the controller is told, and a second of all
#: that make a flood.
FLOOD_DROPS: Final = 20_000
#: Drops a second by the shield below which a flood is over.
CALM_DROPS: Final = 5_000
#: A look sooner than that after the one before says nothing of a rate.
SHORTEST_SECONDS: Final = 0.5
#: How long it has to be over, or a shield of no use, until that is taken off.
CALM_SECONDS: Final = 10.0
#: What a shield saves of each packet it drops, and costs each other one and each of its bytes, in
#: ns of one machine, where only their proportion counts: a drop at XDP took 470 and one at tc 970
#: (`python -m bench --only denied`), and a frame of 64 KiB, which is copied for XDP, 3,600 more.
SAVED_NS: Final = 500.0
COST_NS: Final = 300.0
COST_BYTE_NS: Final = 0.06

#: The kind of interface where a frame is judged at XDP before a socket buffer is made of it. On a
#: veth XDP takes segmentation offload away, and saves nothing.
_EARLY_KIND: Final = "tun"

#: What a counter has that has not counted.
NOTHING: Final = Counter(0, 0)


def flood_drops(wanted: Hook, kind: str) -> int:
    """Return EndpointConfig.flood_drops for an interface of a kind where a hook is asked for."""
    return FLOOD_DROPS if wanted is Hook.AUTO and kind == _EARLY_KIND else 0


class Traffic(NamedTuple):
    """What a VM has sent by now: all of it, and what a shield would have dropped and has."""

    sent: Counter
    at_tc: Counter = NOTHING
    at_shield: Counter = NOTHING

    def since(self, before: Traffic) -> Traffic:
        """Return what came after another moment."""
        return Traffic(*(_minus(now, then) for now, then in zip(self, before, strict=True)))


def traffic_from_vm(stats: Stats, drops: Mapping[FloodDrop, Counter]) -> Traffic:
    """Return what an endpoint's counters say of the path from the VM."""
    sent = [counter for (path, _, _), counter in stats.items() if path is Path.FROM_VM]
    total = Counter(sum(each.packets for each in sent), sum(each.bytes for each in sent))
    return Traffic(total, drops[FloodDrop.AT_TC], drops[FloodDrop.AT_SHIELD])


def _minus(first: Counter, second: Counter) -> Counter:
    return Counter(first.packets - second.packets, first.bytes - second.bytes)


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
        met = traffic.at_shield if self.up else traffic.at_tc
        worth_it = saves(met, _minus(traffic.sent, met))
        if not self.up:
            flood = met.packets >= FLOOD_DROPS * elapsed
            return Step.RAISE if flood and worth_it else Step.FORGET
        if met.packets >= CALM_DROPS * elapsed and worth_it:
            self.useless_since = None
            return Step.WAIT
        if self.useless_since is None:
            self.useless_since = seconds
        return Step.LOWER if seconds - self.useless_since >= CALM_SECONDS else Step.WAIT


def saves(met: Counter, others: Counter) -> bool:
    """Tell whether a shield saves more of what it meets than it costs of the other packets."""
    cost = others.packets * COST_NS + others.bytes * COST_BYTE_NS
    return met.packets * SAVED_NS > cost
