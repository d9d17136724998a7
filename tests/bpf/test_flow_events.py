# SPDX-License-Identifier: Apache-2.0
"""Each flow leaves one record when it begins and one when it ends, however it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.bpf.event_tap import EventTap
from tests.cases.fixtures import ALL_ACCEPTED, GUARDED, NOTHING_ACCEPTED, SERVICES
from tests.frames import ICMP, IN, OUT, PEER4, TCP, UDP, VM4, echo, tcp, udp
from tests.fuzz.compare import pinned
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import EventKind, FlowEnd, FlowState, Mode, Path, Reason, Verdict
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import EffectivePolicy, Hook, Logging, Tracking

pytestmark = pytest.mark.bpf

#: Bytes in front of the key in the frame of flow_report.
KEY_OFFSET = 16
#: Keys of the batches that the queue keeps, and of what CPUs buffer.
KEPT = (abi.EXPIRY_MARGIN + libbpf.possible_cpus()) * abi.QUEUE_BATCH
LOGGED = Logging(flows=True, per_second=1_000_000)
HOOKS = (Hook.XDP, Hook.TC)

MakeEngine = Callable[..., ProgramEngine]


@pytest.fixture(params=HOOKS, ids=str)
def make_engine(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    made: list[ProgramEngine] = []

    def make(
        policy: EffectivePolicy = ALL_ACCEPTED,
        *,
        log: Logging = LOGGED,
        mode: Mode = Mode.ENFORCE,
        **tracking: int,
    ) -> ProgramEngine:
        interface = replace(GUARDED, tracking=Tracking(**tracking))  # type: ignore[arg-type]
        facts = endpoint_facts(interface, mode)
        made.append(ProgramEngine(artefact, request.param, facts, policy, 1024, log=log))
        return made[-1]

    with pinned():  # each CPU holds some keys back until it has more of its own
        yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> ProgramEngine:
    return make_engine()


@pytest.fixture
def tap(engine: ProgramEngine) -> Iterator[EventTap]:
    with EventTap(engine) as opened:
        yield opened


def send(engine: ProgramEngine, numbers: range) -> Counter[Reason]:
    """Have the VM send a datagram of each of some flows."""
    frames = (OUT.wrap4(udp(1024 + number, 53), UDP) for number in numbers)
    return Counter(engine.judge(Path.FROM_VM, frame).reason for frame in frames)


def connect(engine: ProgramEngine, port: int = 40000) -> None:
    """Open a TCP connection from the VM, with one segment of data."""
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port, 443), TCP))
    engine.judge(Path.TO_VM, IN.wrap4(tcp(443, port, "SA", seq=5000, ack=1001), TCP))
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port, 443, "A", seq=1001, ack=5001), TCP))


def ends(flows: list[abi.FlowEvent]) -> Counter[FlowEnd]:
    return Counter(
        FlowEnd(each.event.end) for each in flows if each.event.kind == EventKind.FLOW_END
    )


def starts(flows: list[abi.FlowEvent]) -> int:
    return sum(each.event.kind == EventKind.FLOW_START for each in flows)


def ports(flow: abi.FlowEvent) -> tuple[int, int]:
    return abi.be16(flow.event.source_port), abi.be16(flow.event.destination_port)


def push(engine: ProgramEngine) -> None:
    """Open so many other flows that the queue comes to all that were there before."""
    send(engine, range(5000, 5000 + 4 * KEPT))


def report(engine: ProgramEngine, ask: int = 1) -> list[int]:
    """Have the program look at every flow of the table."""
    with engine.beside("flow_report") as run:
        return [
            run(bytes(KEY_OFFSET) + bytes(key))
            for key, _ in list(engine.maps.flows())
            for _ in range(ask)
        ]


def test_a_flow_that_begins_is_recorded_as_its_first_packet_was(
    engine: ProgramEngine, tap: EventTap
) -> None:
    engine.judge(Path.TO_VM, IN.wrap4(tcp(40112, 443), TCP))
    (flow,) = tap.flows()
    event = flow.event

    assert (event.kind, event.end, event.state) == (
        EventKind.FLOW_START,
        FlowEnd.NONE,
        FlowState.TCP_SYN,
    )
    assert (event.path, event.verdict, event.reason) == (
        Path.TO_VM,
        Verdict.ACCEPT,
        Reason.DEFAULT,
    )
    assert str(abi.unpack_address(event.source)) == PEER4
    assert str(abi.unpack_address(event.destination)) == VM4
    assert ports(flow) == (40112, 443)
    assert (event.endpoint, event.rule, event.generation) == (1, abi.NO_RULE, 1)
    assert flow.packets[Path.TO_VM] == 1


def test_a_rule_that_accepts_is_in_both_records(make_engine: MakeEngine) -> None:
    engine = make_engine(SERVICES)
    with EventTap(engine) as tap:
        engine.judge(Path.TO_VM, IN.wrap4(tcp(40112, 443), TCP))
        engine.advance(31)
        report(engine)
        start, end = tap.flows()

    assert start.event.reason == end.event.reason == Reason.RULE
    assert start.event.rule == end.event.rule == 0
    assert start.event.rule_path == end.event.rule_path == Path.TO_VM


def test_packets_and_bytes_of_both_directions_are_counted(
    engine: ProgramEngine, tap: EventTap
) -> None:
    question, answer = OUT.wrap4(udp(4000, 53), UDP), IN.wrap4(udp(53, 4000, b"x" * 200), UDP)
    for _ in range(3):
        engine.judge(Path.FROM_VM, question)
        engine.judge(Path.TO_VM, answer)
    engine.judge(Path.FROM_VM, question)
    engine.advance(121)
    report(engine)
    _, flow = tap.flows()

    assert list(flow.packets) == [3, 4]
    assert list(flow.bytes) == [3 * len(answer), 4 * len(question)]
    assert (flow.event.path, ports(flow)) == (Path.FROM_VM, (4000, 53))
    assert flow.event.state == FlowState.UDP_REPLIED


def test_packets_of_an_open_flow_leave_no_record(engine: ProgramEngine, tap: EventTap) -> None:
    send(engine, range(20))
    assert starts(tap.flows()) == 20
    assert send(engine, range(20)) == {Reason.CT_ESTABLISHED: 20}
    assert tap.flows() == []


def test_without_the_switch_there_is_no_record(make_engine: MakeEngine) -> None:
    """The control: nothing but the configuration makes the difference."""
    engine = make_engine(log=Logging(flows=False, per_second=1_000_000))
    with EventTap(engine) as tap:
        send(engine, range(300))
        engine.advance(31)
        push(engine)
        report(engine)
        assert tap.flows() == []
    meter = engine.maps.event_meter()
    assert (meter.sent, meter.suppressed, meter.lost) == (0, 0, 0)


def test_idle_flows_end_by_timeout_as_others_begin(engine: ProgramEngine, tap: EventTap) -> None:
    send(engine, range(200))
    engine.advance(31)
    assert starts(tap.flows()) == 200
    push(engine)
    flows = tap.flows()

    assert ends(flows) == {FlowEnd.TIMEOUT: 200}
    ended = [each for each in flows if each.event.kind == EventKind.FLOW_END]
    assert {ports(each)[0] for each in ended} == set(range(1024, 1224))


def test_idle_flows_end_by_timeout_in_the_reaper(engine: ProgramEngine, tap: EventTap) -> None:
    send(engine, range(200))
    engine.advance(31)
    tap.flows()
    with engine.reaper() as reap:
        while reap():
            pass
    reaped = ends(tap.flows())[FlowEnd.TIMEOUT]

    assert reaped >= 200 - KEPT
    assert set(report(engine)) == {1}
    assert ends(tap.flows()) == {FlowEnd.TIMEOUT: 200 - reaped}


def test_a_flow_is_reported_once_and_not_again_when_it_is_deleted(
    engine: ProgramEngine, tap: EventTap
) -> None:
    send(engine, range(40))
    tap.flows()
    engine.advance(31)
    assert set(report(engine, ask=3)) == {1}
    assert ends(tap.flows()) == {FlowEnd.TIMEOUT: 40}
    push(engine)
    assert not ends(tap.flows())


def test_flows_that_live_are_not_reported(engine: ProgramEngine, tap: EventTap) -> None:
    send(engine, range(10))
    assert set(report(engine)) == {0}
    assert ends(tap.flows()) == {}
    assert send(engine, range(10)) == {Reason.CT_ESTABLISHED: 10}


def test_nothing_is_left_to_report_of_a_flow_that_is_not_there(engine: ProgramEngine) -> None:
    with engine.beside("flow_report") as run:
        assert run(bytes(KEY_OFFSET + 40)) == 1
        assert run(bytes(KEY_OFFSET + 39)) == 0  # that is no key


def test_a_closed_connection_ends_as_closed(engine: ProgramEngine, tap: EventTap) -> None:
    connect(engine, 40000)
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(40000, 443, "FA", seq=1001, ack=5001), TCP))
    engine.judge(Path.TO_VM, IN.wrap4(tcp(443, 40000, "FA", seq=5001, ack=1002), TCP))
    connect(engine, 40001)
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(40001, 443, "RA", seq=1001, ack=5001), TCP))
    engine.advance(31)
    report(engine)
    flows = tap.flows()

    assert ends(flows) == {FlowEnd.CLOSED: 2}
    states = {each.event.state for each in flows if each.event.end}
    assert states == {FlowState.TCP_FIN, FlowState.TCP_CLOSED}


def test_ports_used_again_end_the_closed_connection_and_begin_another(
    engine: ProgramEngine, tap: EventTap
) -> None:
    connect(engine)
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(40000, 443, "RA", seq=1001, ack=5001), TCP))
    tap.flows()
    engine.judge(Path.FROM_VM, OUT.wrap4(tcp(40000, 443, seq=900_000), TCP))
    end, start = tap.flows()

    assert (end.event.kind, end.event.end) == (EventKind.FLOW_END, FlowEnd.CLOSED)
    assert sum(end.packets) == 4
    assert start.event.kind == EventKind.FLOW_START
    assert sum(start.packets) == 1


def test_a_flow_in_the_place_of_a_reported_one_ends_anew(
    engine: ProgramEngine, tap: EventTap
) -> None:
    send(engine, range(1))
    for _ in range(3):
        engine.advance(31)
        report(engine)
        send(engine, range(1))
    flows = tap.flows()

    assert starts(flows) == 4
    assert ends(flows) == {FlowEnd.TIMEOUT: 3}


def test_a_revoked_flow_ends_with_the_packet_that_finds_out(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    with EventTap(engine) as tap:
        send(engine, range(5))
        tap.flows()
        engine.set_policy(NOTHING_ACCEPTED)
        assert tap.flows() == []
        assert send(engine, range(5)) == {Reason.DEFAULT: 5}
        flows = tap.flows()
        assert ends(flows) == {FlowEnd.REVOKED: 5}
        assert {each.event.generation for each in flows} == {1}
        assert {sum(each.packets) for each in flows} == {1}
        report(engine)
        send(engine, range(5))
        assert tap.flows() == []


def test_a_revoked_flow_goes_on_in_monitor_mode(make_engine: MakeEngine) -> None:
    engine = make_engine(mode=Mode.MONITOR)
    with EventTap(engine) as tap:
        send(engine, range(5))
        engine.set_policy(NOTHING_ACCEPTED)
        send(engine, range(5))
        assert not ends(tap.flows())


def test_flushed_flows_end_as_flushed(engine: ProgramEngine, tap: EventTap) -> None:
    send(engine, range(100))
    connect(engine)
    tap.flows()
    engine.flush()
    with engine.reaper() as reap:
        while reap():
            pass
    report(engine)

    assert ends(tap.flows()) == {FlowEnd.FLUSHED: 101}


def test_half_open_flows_that_make_room_end_as_displaced(make_engine: MakeEngine) -> None:
    engine = make_engine(half_open_max=200)
    with EventTap(engine) as tap:
        for port in range(1, 600):
            engine.judge(Path.FROM_VM, OUT.wrap4(tcp(port, 443), TCP))
        flows = tap.flows()

    assert starts(flows) == 599
    assert ends(flows) == {FlowEnd.DISPLACED: 599 - engine.maps.meta().entries}


def test_a_flow_that_finds_no_room_does_not_begin(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with EventTap(engine, pages=128) as tap:
        reasons = send(engine, range(1100))
        assert starts(tap.flows()) == reasons[Reason.DEFAULT] == 1024


def test_a_taken_over_connection_begins_and_a_ping_has_its_identifier(
    engine: ProgramEngine, tap: EventTap
) -> None:
    engine.set_grace(60)
    engine.judge(Path.TO_VM, IN.wrap4(tcp(443, 40000, "A", seq=7, ack=8), TCP))
    engine.judge(Path.FROM_VM, OUT.wrap4(echo(8, 77), ICMP))
    taken, ping = tap.flows()

    assert (taken.event.path, ports(taken)) == (Path.FROM_VM, (40000, 443))
    assert (taken.event.state, ping.event.state) == (FlowState.TCP_ESTABLISHED, FlowState.ICMP)
    assert ports(ping) == (77, 77)


def test_records_over_the_budget_are_counted_and_change_no_flow(make_engine: MakeEngine) -> None:
    engine = make_engine(log=Logging(flows=True, per_second=50))
    with EventTap(engine) as tap:
        assert send(engine, range(500)) == {Reason.DEFAULT: 500}
        engine.flush()
        push(engine)
        report(engine)  # of a key that waits in the buffer of another CPU
        got = len(tap.flows())
    meter = engine.maps.event_meter()
    made = sum(engine.maps.meta().created)

    assert meter.sent == got
    assert meter.sent + meter.suppressed == made + 500
    assert meter.suppressed > 0
    assert len(list(engine.maps.flows())) == 4 * KEPT


def test_records_that_nobody_reads_are_counted_and_change_no_flow(engine: ProgramEngine) -> None:
    assert send(engine, range(100)) == {Reason.DEFAULT: 100}
    assert engine.maps.event_meter().lost == 100
    assert send(engine, range(100)) == {Reason.CT_ESTABLISHED: 100}
