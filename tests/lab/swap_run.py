# SPDX-License-Identifier: Apache-2.0
"""A run of policy swaps under traffic, and what about it is not as it has to be.

Four accounts of the same packets are compared: what the traffic sent and saw arrive, the counters
of reasons, the counters of rules over all generations, and an event for each packet that a rule
decided, with generation, rule number and verdict.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from scripts.lab.wire import arp_request
from tests.lab.swap_policies import (
    KIND_OF,
    KINDS,
    PEER_ADDRESSES,
    PEER_MAC,
    POLICIES,
    VMS,
    Kind,
    Vm,
)
from tests.lab.swap_traffic import PATIENCE, Ends, Tally, Traffic
from vgw import abi, libbpf
from vgw.controller.reconcile import Host
from vgw.libbpf.perf import PerfReader
from vgw.policy.model import DIRECTION_OF_PATH, PolicyDocument

#: Pages of a CPU's event buffer: enough for what comes while a policy is changed.
_PAGES = 2048
_ANSWERS = {abi.Verdict.ACCEPT: True, abi.Verdict.DROP: False}


class Seen(NamedTuple):
    """What an event says of a packet."""

    generation: int
    path: int
    rule_path: int
    rule: int
    verdict: int
    reason: int
    protocol: int
    value: int


class Events:
    """The events of a host, counted by endpoint and what they say; use as a context manager."""

    def __init__(self, host: Host) -> None:
        self.seen: defaultdict[int, Counter[Seen]] = defaultdict(Counter)
        self._latest: dict[tuple[int, int], int] = {}
        fd = libbpf.get_pinned(host.paths.events)
        try:
            self._reader = PerfReader(fd, self._take, lambda *_: None, _PAGES, wakeup_events=1)
        finally:
            os.close(fd)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def until(self, endpoint: int, generation: int) -> bool:
        """Take events until a generation judged packets of both paths; False: it did in vain."""
        deadline = time.monotonic() + PATIENCE
        while min(self._latest.get((endpoint, path), 0) for path in abi.Path) < generation:
            if time.monotonic() > deadline:
                return False
            self._reader.poll(100)
        return True

    def rest(self) -> None:
        """Take what waits."""
        self._reader.consume()

    def _take(self, _cpu: int, record: bytes) -> None:
        event = abi.Event.from_buffer_copy(record)
        where = event.endpoint, event.path
        self._latest[where] = max(self._latest.get(where, 0), event.generation)
        self.seen[event.endpoint][
            Seen(
                event.generation,
                event.path,
                event.rule_path,
                event.rule,
                event.verdict,
                event.reason,
                event.protocol,
                abi.be16(event.destination_port) or event.icmp_type,
            )
        ] += 1


@dataclass
class Run:
    """What was found out about a VM; `policy_of` says which policy a generation has."""

    vm: str
    endpoint: int
    policy_of: dict[int, str] = field(default_factory=dict)
    #: Names of rules by number, by policy and path.
    names: dict[tuple[str, abi.Path], list[str]] = field(default_factory=dict)
    tallies: dict[abi.Path, Tally] = field(default_factory=dict)
    seen: Counter[Seen] = field(default_factory=Counter)
    #: What rules have counted, by path and name.
    rules: dict[tuple[abi.Path, str], int] = field(default_factory=dict)
    stats: dict[tuple[abi.Path, abi.Verdict, abi.Reason], int] = field(default_factory=dict)
    meter: abi.EventMeter = field(default_factory=abi.EventMeter)
    #: Swaps after which no packet was judged by the new policy.
    unseen: int = 0

    def packets(self) -> int:
        """Return how many packets were sent."""
        return sum(sum(tally.sent.values()) for tally in self.tallies.values())

    def note_names(self, host: Host, policy: str) -> None:
        """Note that a policy is in force, and what its rule numbers stand for."""
        manifest = host.manifest(self.vm)
        self.policy_of[manifest.generation] = policy
        for path in abi.Path:
            labels = host.store.labels(manifest.digest(manifest.generation, path) or "")
            assert labels is not None
            self.names[policy, path] = [label.name for label in labels]

    def read_counters(self, host: Host) -> None:
        """Read what the endpoint counted."""
        path_of = {str(direction): path for path, direction in DIRECTION_OF_PATH.items()}
        for row in host.rules(self.vm)["rules"]:
            self.rules[path_of[row["direction"]], row["rule"]] = row["packets"]
        (endpoint,) = host.open_endpoints(self.vm)
        with endpoint:
            self.stats = {key: count.packets for key, count in endpoint.maps.stats().items()}
            self.meter = endpoint.maps.event_meter()


def swap(
    host: Host, documents: Sequence[PolicyDocument], swaps: int, ends: Mapping[str, Ends]
) -> list[Run]:
    """Apply the other of two policies, the first of which is in force, again and again.

    All VMs swap at the same time; nothing was sent before. Return what was found out about each.
    """
    runs = {vm: Run(vm, _endpoint(host, vm)) for vm in ends}
    for run in runs.values():
        run.note_names(host, POLICIES[0])
    with Events(host) as events, ExitStack() as stack:
        running = {vm: _traffic(stack, VMS[vm], ends[vm]) for vm in ends}
        for number in range(1, swaps + 1):
            which = number % 2
            for result in host.apply(documents[which]).vms:
                run = runs[result.vm]
                run.policy_of[result.generation] = POLICIES[which]
                if number == 1:
                    run.note_names(host, POLICIES[which])
                run.unseen += not events.until(run.endpoint, result.generation)
            if any(run.unseen for run in runs.values()):
                break
        for vm, ways in running.items():
            runs[vm].tallies = {path: each.stop() for path, each in ways.items()}
        events.rest()
    for run in runs.values():
        run.seen = events.seen[run.endpoint]
        run.read_counters(host)
    return list(runs.values())


def _endpoint(host: Host, vm: str) -> int:
    (entry,) = host.manifest(vm).endpoints.values()
    return entry.endpoint


def _traffic(stack: ExitStack, vm: Vm, ends: Ends) -> dict[abi.Path, Traffic]:
    """Send both ways between the host's end and the VM's until the stack is closed."""
    near, far = ends
    from_peer = arp_request(PEER_MAC, PEER_ADDRESSES[0], vm.address)
    from_vm = arp_request(vm.mac, vm.address, PEER_ADDRESSES[0])
    running: dict[abi.Path, Traffic] = {}
    for path in abi.Path:
        inbound = path is abi.Path.TO_VM
        frames = {kind.name: list(kind.frames(vm)) for kind in KINDS if kind.path is path}
        mark, way = (from_peer, (near, far)) if inbound else (from_vm, (far, near))
        running[path] = stack.enter_context(Traffic(frames, mark, way, path))
    return running


# --- what is wrong ------------------------------------------------------------------------------


def problems(run: Run) -> list[str]:
    """Return what contradicts that each packet was judged by one policy, the old or the new."""
    found = ["effect: a swap changed nothing for packets"] if run.unseen else []
    for part in (_verdicts, _reasons, _counts, _events):
        found += part(run)
    return found


def _verdicts(run: Run) -> Iterator[str]:
    """Compare what arrived with what both policies, one or none accepts."""
    for kind in KINDS:
        sent, arrived = _fate(run, kind)
        if kind.accepted_by == POLICIES and arrived != sent:
            yield f"verdict: {sent - arrived} of {sent} {kind.name} dropped that both accept"
        if not kind.accepted_by and arrived:
            yield f"verdict: {arrived} of {sent} {kind.name} passed that both drop"
        if len(kind.accepted_by) == 1 and not 0 < arrived < sent:
            yield f"verdict: {arrived} of {sent} {kind.name} passed, which one policy accepts"
    for path, tally in run.tallies.items():
        if tally.strange:
            yield f"verdict: late, twice or foreign on {path.name}: {tally.strange}"


def _fate(run: Run, kind: Kind) -> tuple[int, int]:
    tally = run.tallies[kind.path]
    return tally.sent[kind.name], tally.arrived.get(kind.name, 0)


def _reasons(run: Run) -> Iterator[str]:
    """Compare the counters of reasons with what was sent and what arrived."""
    answers: Counter[tuple[abi.Path, bool]] = Counter()
    for (path, verdict, reason), count in run.stats.items():
        accepted = verdict is abi.Verdict.ACCEPT
        if reason is abi.Reason.ARP:
            continue
        if reason is abi.Reason.RULE or (accepted and reason is abi.Reason.CT_ESTABLISHED):
            answers[path, accepted] += count
        else:
            yield f"reason: {count} times {verdict.name} {reason.name} on {path.name}"
    for path, tally in run.tallies.items():
        arrived = sum(tally.arrived.values())
        for accepted, count in ((True, arrived), (False, sum(tally.sent.values()) - arrived)):
            if answers[path, accepted] != count:
                what = "passed" if accepted else "were dropped"
                yield f"reason: {count} {what} on {path.name}, counted {answers[path, accepted]}"


def _counts(run: Run) -> Iterator[str]:
    """Compare the counters of rules, carried over all swaps, with what was sent and arrived."""
    expected = {(kind.path, kind.rule(policy)) for kind in KINDS for policy in POLICIES}
    for (path, name), count in run.rules.items():
        if count and (path, name) not in expected:
            yield f"count: {count} for {name} on {path.name}, which matches nothing sent"
    for kind in KINDS:
        sent, arrived = _fate(run, kind)
        counted = {policy: run.rules[kind.path, kind.rule(policy)] for policy in POLICIES}
        accepted = sum(counted[policy] for policy in kind.accepted_by)
        if sum(counted.values()) - accepted != sent - arrived:
            yield f"count: {counted} drops for {kind.name}, of which {sent - arrived} were dropped"
        if accepted > arrived or (not kind.has_flows and accepted != arrived):
            yield f"count: {counted} accepted of {kind.name}, of which {arrived} arrived"


def _events(run: Run) -> Iterator[str]:
    """Look at generation, rule and verdict of every packet that a rule decided."""
    wrong: Counter[str] = Counter()
    for seen, count in run.seen.items():
        text = _contradiction(run, seen)
        if text is not None:
            wrong[text] += count
    yield from (f"event: {count} times {text}" for text, count in sorted(wrong.items()))
    delivered, due = sum(run.seen.values()), run.meter.sent + run.meter.lost
    decided = sum(n for (_, _, why), n in run.stats.items() if why is abi.Reason.RULE)
    if delivered != run.meter.sent or due != decided or run.meter.suppressed:
        yield f"event: {delivered} delivered of {run.meter.sent} sent, {due} due, {decided} judged"


def _contradiction(run: Run, seen: Seen) -> str | None:
    """Return what an event says that the policy of its generation does not."""
    kind = KIND_OF.get((abi.Path(seen.path), seen.protocol, seen.value))
    policy = run.policy_of.get(seen.generation)
    if kind is None or policy is None:
        return f"a packet {seen} that was not sent"
    names = run.names[policy, abi.Path(seen.rule_path)]
    name = names[seen.rule] if seen.rule < len(names) else f"no rule {seen.rule}"
    verdict, reason = abi.Verdict(seen.verdict), abi.Reason(seen.reason)
    if (
        name == kind.rule(policy)
        and reason is abi.Reason.RULE
        and _ANSWERS.get(verdict) == (policy in kind.accepted_by)
    ):
        return None
    return f"{kind.name} by policy {policy}: {verdict.name} {reason.name} {name}"
