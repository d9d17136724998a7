# SPDX-License-Identifier: Apache-2.0
"""What an endpoint's maps say of the packets, flows and events it had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vgw.abi import Path, Reason, Verdict
from vgw.controller.reconcile import Host


@dataclass(frozen=True, slots=True)
class Account:
    """The counters of a VM's one endpoint at a moment; `memory` is in bytes, of all its maps.

    `half_open` is by who opened the flows.
    """

    packets: Mapping[tuple[Path, Verdict, Reason], int]
    entries: int
    limit: int
    created: Mapping[Path, int]
    half_open: Mapping[Path, int]
    sent: int
    suppressed: int
    lost: int
    memory: int

    def by_reason(self, before: Account, verdict: Verdict) -> Counter[Reason]:
        """Return how many packets of both paths got a verdict since `before`, by reason."""
        found: Counter[Reason] = Counter()
        for (path, given, reason), packets in self.packets.items():
            if given is verdict:
                found[reason] += packets - before.packets.get((path, given, reason), 0)
        return +found

    def opened(self, before: Account) -> int:
        """Return how many flows were opened since `before`."""
        return sum(self.created.values()) - sum(before.created.values())

    def events(self, before: Account) -> int:
        """Return how many events were due since `before`."""
        due = (one.sent + one.suppressed + one.lost for one in (self, before))
        return next(due) - next(due)


def read_account(host: Host, vm: str) -> Account:
    """Return the counters of an attached VM that has one interface."""
    (endpoint,) = host.open_endpoints(vm)
    with endpoint:
        maps = endpoint.maps
        meta, meter = maps.meta(), maps.event_meter()
        return Account(
            packets={key: counter.packets for key, counter in maps.stats().items()},
            entries=meta.entries,
            limit=maps.conntrack_max(),
            created={path: meta.created[path] for path in Path},
            half_open={path: meta.half_open[path] for path in Path},
            sent=meter.sent,
            suppressed=meter.suppressed,
            lost=meter.lost,
            memory=maps.memory(),
        )


def half_open_flows(host: Host, vm: str) -> Mapping[Path, int]:
    """Return how many flows in the table of such a VM are half open, by who opened them."""
    (endpoint,) = host.open_endpoints(vm)
    with endpoint:
        found = Counter(Path(flow.opener) for _, flow in endpoint.maps.flows() if flow.half_open)
    return {path: found[path] for path in Path}
