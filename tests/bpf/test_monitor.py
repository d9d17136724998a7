# SPDX-License-Identifier: Apache-2.0
"""Monitor mode drops nothing: whatever would be dropped, and why, passes and leaves an event.

The rows are those of the verdict tables that end in a drop, played under the mode: up to six for
each reason, path and hook, and the stories up to their first drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import pytest

from tests.bpf.event_tap import EventTap
from tests.cases import TABLES
from tests.cases.fixtures import ALL_ACCEPTED, GUARDED, OPEN, SERVER
from tests.cases.table import Case, Expected, Fixture, Reconfigure, Send, Step
from tests.engines import CannotRunError, changes_endpoint, play, report
from tests.frames import IN, OUT, TCP, UDP, tcp, udp
from tests.program_engine import ProgramEngine, why_not_run
from vgw import libbpf, loader
from vgw.abi import Mode, Path, Reason, Verdict
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import Hook, Logging, Tracking

pytestmark = pytest.mark.bpf

HOOKS = (Hook.XDP, Hook.TC)
EACH = 6
LOGGED = Logging(per_second=1_000_000)
DROPS = (Verdict.DROP, Verdict.REJECT)
#: Reasons of verdicts that are no drops, and of the mode that drops everything.
NO_DROPS = {
    Reason.NONE,
    Reason.CT_ESTABLISHED,
    Reason.CT_RELATED,
    Reason.ARP,
    Reason.RARP,
    Reason.ND,
    Reason.DHCP,
    Reason.MEMBERSHIP,
    Reason.QUARANTINE,
}
#: Reasons with a test of their own here; no test run has a checksum request.
APART = {Reason.CT_RATE, Reason.CT_BUSY, Reason.CHECKSUM_REQUEST}


def in_monitor(case: Case) -> tuple[Case, Send] | None:
    """Return a row up to its first drop as the mode has it, and that drop; None without one."""
    steps: list[Step] = []
    for step in case.steps:
        if isinstance(step, Send) and step.expected.verdict in DROPS:
            if step.expected.reason is Reason.QUARANTINE:
                return None
            steps.append(replace(step, expected=_would_drop(step.expected)))
            fixture = replace(case.fixture, name=f"{case.fixture.name} monitored")
            fixture = replace(fixture, mode=Mode.MONITOR)
            return replace(case, fixture=fixture, steps=tuple(steps)), step
        steps.append(replace(step, mode=Mode.MONITOR) if isinstance(step, Reconfigure) else step)
    return None


def _would_drop(expected: Expected) -> Expected:
    return expected._replace(verdict=Verdict.WOULD_DROP)


def rows() -> list[tuple[Case, Send]]:
    """Return some rows of each reason and path, without those a hook's test run cannot be given."""
    seen: Counter[tuple[Reason, Path, bool]] = Counter()
    found = []
    for case in chain(*TABLES.values()):
        made = in_monitor(case)
        if made is None or any(why_not_run(hook, made[1]) for hook in HOOKS):
            continue
        kind = made[1].expected.reason, made[1].path, len(made[0].steps) == 1
        seen[kind] += 1
        if seen[kind] <= EACH:
            found.append(made)
    return found


ROWS = rows()


class Monitored:
    """Engines in monitor mode, one for each fixture, with what they log."""

    def __init__(self, artefact: loader.Artefact, hook: Hook) -> None:
        self._artefact, self._hook = artefact, hook
        self._made: dict[tuple[str, int], tuple[ProgramEngine, EventTap]] = {}

    def of(self, fixture: Fixture, conntrack_max: int = 1024) -> tuple[ProgramEngine, EventTap]:
        key = fixture.name, conntrack_max
        if key not in self._made:
            what = self._hook, fixture.facts, fixture.policy, conntrack_max
            engine = ProgramEngine(self._artefact, *what, log=LOGGED)
            self._made[key] = engine, EventTap(engine).__enter__()
        return self._made[key]

    def drop(self, fixture: Fixture, conntrack_max: int = 1024) -> None:
        engine, tap = self._made.pop((fixture.name, conntrack_max))
        tap.__exit__(None, None, None)
        engine.close()

    def close(self) -> None:
        for engine, tap in self._made.values():
            tap.__exit__(None, None, None)
            engine.close()


@pytest.fixture(scope="module", params=HOOKS, ids=str)
def monitored(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[Monitored]:
    made = Monitored(artefact, request.param)
    yield made
    made.close()


def test_every_reason_of_a_drop_has_a_row() -> None:
    covered = {drop.expected.reason for _, drop in ROWS}
    assert set(Reason) - covered == NO_DROPS | APART


def test_what_would_be_dropped_passes_and_is_logged(monitored: Monitored) -> None:
    """The rule's `log` does not matter, nor whether it is a rule at all."""
    wrong: list[str] = []
    seen: set[Reason] = set()
    for case, drop in ROWS:
        engine, tap = monitored.of(case.fixture, case.conntrack_max)
        tap.packets()
        try:
            differences = play(engine, case)
        except CannotRunError:
            continue
        if differences:
            wrong.append(report(differences))
        events = tap.packets()[-1:]
        told = [(each.verdict, each.reason, each.path) for each in events]
        if told != [(Verdict.WOULD_DROP, drop.expected.reason, drop.path)]:
            wrong.append(f"{case.name}: {drop.expected.reason.name} is logged as {told}")
        seen.add(drop.expected.reason)
        if changes_endpoint(case):
            monitored.drop(case.fixture, case.conntrack_max)
    assert not wrong, "\n".join(wrong[:20])
    assert set(Reason) - seen == NO_DROPS | APART


def test_what_is_accepted_is_not_logged(monitored: Monitored) -> None:
    """The control: the mode alone leaves no event, the would-be drop does."""
    fixture = replace(OPEN, name="open monitored", mode=Mode.MONITOR)
    engine, tap = monitored.of(fixture)
    engine.reset()
    tap.packets()
    engine.judge(Path.FROM_VM, OUT.wrap4(udp(4000, 53), UDP))
    engine.judge(Path.TO_VM, IN.wrap4(udp(53, 4000), UDP))
    assert tap.packets() == []


def test_what_is_dropped_by_a_silent_rule_is_logged_in_monitor_only(
    artefact: loader.Artefact, monitored: Monitored
) -> None:
    """The control: enforced, the same packet is dropped without an event."""
    frame = IN.wrap4(tcp(40000, 3306), TCP)
    enforced = ProgramEngine(artefact, Hook.TC, SERVER.facts, SERVER.policy, log=LOGGED)
    with EventTap(enforced) as tap:
        assert enforced.judge(Path.TO_VM, frame).verdict is Verdict.REJECT
        assert tap.packets() == []
    enforced.close()
    engine, tap = monitored.of(replace(SERVER, name="server monitored", mode=Mode.MONITOR))
    engine.reset()
    tap.packets()
    assert engine.judge(Path.TO_VM, frame).verdict is Verdict.WOULD_DROP
    assert len(tap.packets()) == 1


def test_what_is_over_a_rate_passes_and_is_logged(artefact: loader.Artefact) -> None:
    interface = replace(GUARDED, tracking=Tracking(new_per_second=1))
    facts = endpoint_facts(interface, Mode.MONITOR)
    engine = ProgramEngine(artefact, Hook.TC, facts, ALL_ACCEPTED, log=LOGGED)
    with EventTap(engine) as tap:
        judged = [engine.judge(Path.FROM_VM, OUT.wrap4(udp(port, 53), UDP)) for port in range(1, 9)]
        over = [each for each in judged if each.reason is Reason.CT_RATE]
        events = [(each.verdict, each.reason) for each in tap.packets()]
    engine.close()

    assert over
    assert {each.verdict for each in over} == {Verdict.WOULD_DROP}
    assert events == [(Verdict.WOULD_DROP, Reason.CT_RATE)] * len(over)


def test_what_meets_a_claimed_flow_passes_and_is_logged(monitored: Monitored) -> None:
    """As if another CPU were replacing the dead flow at this moment."""
    engine, tap = monitored.of(replace(OPEN, name="open monitored", mode=Mode.MONITOR))
    engine.reset()
    frame = OUT.wrap4(udp(4000, 53), UDP)
    engine.judge(Path.FROM_VM, frame)
    engine.flush()
    ((key, flow),) = engine.maps.flows()
    flow.claim = 1
    libbpf.map_update(engine.fd("conntrack"), bytes(key), bytes(flow))
    tap.packets()

    assert engine.judge(Path.FROM_VM, frame) == (Verdict.WOULD_DROP, Reason.CT_BUSY, None)
    (event,) = tap.packets()
    assert (event.verdict, event.reason) == (Verdict.WOULD_DROP, Reason.CT_BUSY)


def test_would_be_drops_over_the_budget_pass_and_are_counted(artefact: loader.Artefact) -> None:
    facts = endpoint_facts(GUARDED, Mode.MONITOR)
    engine = ProgramEngine(artefact, Hook.XDP, facts, ALL_ACCEPTED, log=Logging(per_second=3))
    frame = OUT.wrap4(udp(4000, 53), UDP)
    spoofed = frame[:6] + bytes.fromhex("525400000099") + frame[12:]
    with EventTap(engine) as tap:
        verdicts = {engine.judge(Path.FROM_VM, spoofed).verdict for _ in range(50)}
        logged = len(tap.packets())
    meter = engine.maps.event_meter()
    engine.close()

    assert verdicts == {Verdict.WOULD_DROP}
    assert (meter.sent, meter.sent + meter.suppressed, meter.lost) == (logged, 50, 0)
    assert meter.suppressed > 0
