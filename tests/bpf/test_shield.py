# SPDX-License-Identifier: Apache-2.0
"""The shield in front of tc: what it drops, what it hands on, and when a flood is told of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path as File

import pytest

from tests.bpf.event_tap import EventTap
from tests.cases import TABLES
from tests.cases.fixtures import GUARDED, OPEN, egress, policy, ports
from tests.cases.table import Case, Send
from tests.catalogue.mutant import Mutant
from tests.catalogue.test_mutants import build
from tests.engines import CannotRunError, play
from tests.frames import OUT, STRANGER4, TCP, UDP, tcp, udp
from tests.fuzz.compare import pinned
from tests.program_engine import ProgramEngine
from tests.shielded_engine import ShieldedEngine
from vgw import abi, libbpf, loader
from vgw.abi import Action, EventKind, FloodDrop, Mode, Path, Reason, Verdict
from vgw.controller.clock import coarse_now_ns
from vgw.loader.artefact import merge
from vgw.maps import Counter
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import UDP as UDP_NUMBER
from vgw.policy.model import Hook, Logging

pytestmark = pytest.mark.bpf

FACTS = endpoint_facts(GUARDED, Mode.ENFORCE)
NO_DNS = policy(
    egress("dns", Action.DROP, services=(ports(UDP_NUMBER, 53),)),
    egress("log", Action.DROP, services=(ports(UDP_NUMBER, 54),), log=True),
    egress("told", Action.REJECT, services=(ports(UDP_NUMBER, 55),)),
    ingress=Action.ACCEPT,
    egress=Action.ACCEPT,
)
DENIED = OUT.wrap4(udp(4000, 53), UDP)
SPOOFED = OUT.wrap4(tcp(), TCP, local=STRANGER4)
SYN, SEGMENT = OUT.wrap4(tcp(), TCP), OUT.wrap4(tcp(flags="A", seq=1001), TCP)
REJECTED = OUT.wrap4(udp(4000, 55), UDP)
CUT = SYN[:-3]
DATAGRAM = OUT.wrap4(udp(4000, 80), UDP)


@pytest.fixture
def engine(artefact: loader.Artefact) -> Iterator[ShieldedEngine]:
    made = ShieldedEngine(artefact, FACTS, NO_DNS)
    yield made
    made.close()


def fate(engine: ProgramEngine, frame: bytes) -> tuple[Verdict, Reason]:
    return engine.judge(Path.FROM_VM, frame)[:2]


DROPPED = {
    "by a rule": (DENIED, Reason.RULE),
    "by a rule that logs": (OUT.wrap4(udp(4000, 54), UDP), Reason.RULE),
    "by a guard": (SPOOFED, Reason.SPOOF_ADDRESS),
    "unreadable": (SYN[:20], Reason.TRUNCATED),
    "without a connection": (SEGMENT, Reason.NO_STATE),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_to_be_dropped_is_dropped_early(engine: ShieldedEngine, name: str) -> None:
    frame, reason = DROPPED[name]
    for _ in range(5):  # of which the last are remembered
        assert fate(engine, frame) == (Verdict.DROP, reason)
    assert engine.met == 5


WHOLE = udp(4000, 53, bytes(64))
FIRST_OF_OPEN, SECOND_OF_OPEN, OVERLAP = (
    OUT.wrap4(part, UDP, fragment=field)
    for whole in (udp(4000, 80, bytes(64)),)
    for part, field in ((whole[:40], 0x2000), (whole[40:], 5), (whole[8:40], 0x2001))
)
#: Of a datagram that a rule denies; nothing is known of the second one.
FIRST, LATER = (OUT.wrap4(WHOLE[:40], UDP, fragment=0x2000), OUT.wrap4(WHOLE[40:], UDP, fragment=5))

HANDED_ON = {
    "passes": (SYN, (Verdict.ACCEPT, Reason.DEFAULT)),
    "gets an answer": (REJECTED, (Verdict.REJECT, Reason.RULE)),
    "has lengths that only tc can judge": (CUT, (Verdict.DROP, Reason.BAD_LENGTH)),
    "is the first fragment": (FIRST, (Verdict.DROP, Reason.RULE)),
    "is a later fragment": (LATER, (Verdict.DROP, Reason.FRAGMENT)),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_is_for_tc_to_judge_is_handed_on(engine: ShieldedEngine, name: str) -> None:
    frame, expected = HANDED_ON[name]
    assert fate(engine, frame) == expected
    assert engine.met == 0


def test_a_shield_ends_no_datagram(engine: ShieldedEngine) -> None:
    """One that overlaps the first fragment ends it, but others may be on their way to tc before."""
    assert fate(engine, FIRST_OF_OPEN)[0] is Verdict.ACCEPT
    assert not engine.is_met(OVERLAP)
    assert fate(engine, SECOND_OF_OPEN)[0] is Verdict.ACCEPT


def test_open_connections_pass_untouched(engine: ShieldedEngine) -> None:
    fate(engine, DATAGRAM)
    for _ in range(3):
        assert fate(engine, DATAGRAM) == (Verdict.ACCEPT, Reason.CT_ESTABLISHED)
    ((_, flow),) = engine.maps.flows()
    assert flow.packets[Path.FROM_VM] == 4


def test_monitor_mode_drops_nothing(engine: ShieldedEngine) -> None:
    engine.set_facts(endpoint_facts(GUARDED, Mode.MONITOR))
    assert fate(engine, DENIED) == (Verdict.WOULD_DROP, Reason.RULE)
    assert engine.met == 0


def test_quarantine_drops_early(engine: ShieldedEngine) -> None:
    engine.set_facts(endpoint_facts(GUARDED, Mode.QUARANTINE))
    assert fate(engine, SYN) == (Verdict.DROP, Reason.QUARANTINE)
    assert engine.met == 1


# --- what is counted of floods ------------------------------------------------------------------


def test_what_is_dropped_is_counted_by_where(engine: ShieldedEngine) -> None:
    for frame in (DENIED, DENIED, SPOOFED, SYN, REJECTED, FIRST, LATER, CUT):
        fate(engine, frame)
    drops = engine.maps.flood_drops()
    assert {where: counter.packets for where, counter in drops.items()} == {
        FloodDrop.AT_TC: 0,
        FloodDrop.AT_SHIELD: 3,
    }


def test_what_a_shield_would_drop_is_counted_at_tc(artefact: loader.Artefact) -> None:
    engine = flooding(artefact)
    try:
        for frame in (DENIED, DENIED, SPOOFED, SYN, REJECTED, FIRST, LATER, CUT):
            fate(engine, frame)
        drops = engine.maps.flood_drops()
        assert drops[FloodDrop.AT_TC] == Counter(3, 2 * len(DENIED) + len(SPOOFED))
        assert drops[FloodDrop.AT_SHIELD].packets == 0
    finally:
        engine.close()


def test_a_flood_of_connections_is_nothing_for_a_shield(artefact: loader.Artefact) -> None:
    """The policy accepts them, and that there are too many turns out as they are opened."""
    engine = flooding(artefact)
    try:
        frames = (OUT.wrap4(tcp(1000 + number, 80), TCP) for number in range(1500))
        assert Verdict.DROP in {fate(engine, frame)[0] for frame in frames}
        assert engine.maps.flood_drops()[FloodDrop.AT_TC].packets == 0
    finally:
        engine.close()


# --- when a flood is told of ----------------------------------------------------------------------

FLOOD = 20
WINDOW_BITS = 30


def flooding(artefact: loader.Artefact, hook: Hook = Hook.TC, drops: int = FLOOD) -> ProgramEngine:
    log = Logging(per_second=1)
    return ProgramEngine(artefact, hook, FACTS, NO_DNS, flood_drops=drops, log=log)


def told(engine: ProgramEngine, frame: bytes, times: int) -> list[abi.Event]:
    """Send a frame so many times within one window; return the floods that are told of."""
    program = engine.program(Path.FROM_VM)
    with pinned():
        while True:
            size = libbpf.map_info(engine.fd("scratch")).value_size
            nothing = bytes(size * libbpf.possible_cpus())
            libbpf.map_update(engine.fd("scratch"), bytes(4), nothing)
            with EventTap(engine) as tap:
                window = coarse_now_ns() >> WINDOW_BITS
                libbpf.prog_test_run(program, frame, repeat=times)
                if coarse_now_ns() >> WINDOW_BITS == window:
                    return [each for each in tap.packets() if each.kind == EventKind.FLOOD]


def test_a_flood_is_told_of_once_a_window(artefact: loader.Artefact) -> None:
    engine = flooding(artefact)
    try:
        assert told(engine, DENIED, FLOOD - 1) == []
        (event,) = told(engine, DENIED, 3 * FLOOD)
        assert (event.endpoint, event.path, event.generation) == (1, Path.FROM_VM, 1)
        assert (event.verdict, event.reason) == (Verdict.DROP, Reason.RULE)
    finally:
        engine.close()


def test_it_is_told_of_where_the_budget_of_events_is_used_up(artefact: loader.Artefact) -> None:
    engine = flooding(artefact)
    try:
        assert len(told(engine, DROPPED["by a rule that logs"][0], 3 * FLOOD)) == 1
        assert engine.maps.event_meter().suppressed
    finally:
        engine.close()


NO_FLOODS = {
    "passes": (Hook.TC, FLOOD, SYN),
    "is in fragments": (Hook.TC, FLOOD, FIRST),
    "has lengths that only tc can judge": (Hook.TC, FLOOD, CUT),
    "gets answers": (Hook.TC, FLOOD, REJECTED),
    "is at XDP": (Hook.XDP, 0, DENIED),
    "is not asked for": (Hook.TC, 0, DENIED),
}


@pytest.mark.parametrize("name", NO_FLOODS)
def test_nothing_is_told_of_what(artefact: loader.Artefact, name: str) -> None:
    hook, drops, frame = NO_FLOODS[name]
    engine = flooding(artefact, hook, drops)
    try:
        assert told(engine, frame, 3 * FLOOD) == []
    finally:
        engine.close()


# --- builds that are wrong ------------------------------------------------------------------------

WRONG = {
    "follows connections": (
        "pipeline.h",
        "if (who == SHIELD)",
        "if (0)",
        (DATAGRAM, DATAGRAM),
    ),
    "settles what passes": (
        "shield.h",
        "if (!is_surely_dropped(judged))\n\t\treturn XDP_PASS;",
        "if (finish(ctx, judged, VGW_PATH_FROM_VM))\n\t\treturn XDP_PASS;",
        (SYN,),
    ),
    "drops what gets an answer": (
        "shield.h",
        "work->decision.verdict == VGW_VERDICT_DROP",
        "work->decision.verdict != VGW_VERDICT_ACCEPT",
        (REJECTED,),
    ),
    "judges lengths": (
        "floods.h",
        "case VGW_REASON_BAD_LENGTH:\n\tcase VGW_REASON_CHECKSUM_REQUEST:",
        "case VGW_REASON_CHECKSUM_REQUEST:",
        (CUT,),
    ),
    "judges fragments": (
        "pipeline.h",
        "if (who == SHIELD && is_fragment(&work->packet))",
        "if (0)",
        (FIRST_OF_OPEN, OVERLAP),
    ),
    "does not count": (
        "shield.h",
        "\tfinish(ctx, judged, VGW_PATH_FROM_VM);\n\tcount",
        "\tcount",
        (DENIED,),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shield_is_noticed(artefact: loader.Artefact, tmp_path: File, name: str) -> None:
    header, old, new, frames = WRONG[name]
    built = build(Mutant("", "", header, old, new, "xdp_shield"), tmp_path)
    right = ShieldedEngine(artefact, FACTS, NO_DNS)
    wrong = ShieldedEngine(merge([artefact, built]), FACTS, NO_DNS)
    try:
        assert _fates(right, frames) != _fates(wrong, frames)
    finally:
        right.close()
        wrong.close()


def _fates(engine: ShieldedEngine, frames: Sequence[bytes]) -> list[object]:
    """Return what frames get, and whether the shield dropped them; the last is what went wrong."""
    found: list[object] = []
    for frame in frames:
        try:
            found.append((fate(engine, frame), engine.met))
        except AssertionError as error:
            return [*found, str(error)]
    return found


def test_the_tables_notice_a_shield_that_drops_all(
    artefact: loader.Artefact, tmp_path: File
) -> None:
    old = "work->decision.verdict == VGW_VERDICT_DROP"
    built = build(Mutant("", "", "shield.h", old, "1", "xdp_shield"), tmp_path)
    engine = ShieldedEngine(merge([artefact, built]), OPEN.facts, OPEN.policy)
    try:
        assert any(_fails(engine, case) for case in _accepted())
    finally:
        engine.close()


def _accepted() -> list[Case]:
    cases = (case for case in chain(*TABLES.values()) if case.fixture is OPEN)
    return [case for case in cases if len(case.steps) == 1 and _is_accepted(case)][:20]


def _is_accepted(case: Case) -> bool:
    step = case.steps[0]
    return (
        isinstance(step, Send)
        and step.path is Path.FROM_VM
        and step.expected.verdict is Verdict.ACCEPT
    )


def _fails(engine: ShieldedEngine, case: Case) -> bool:
    try:
        return bool(play(engine, case))
    except CannotRunError:
        return False
    except AssertionError:
        return True
