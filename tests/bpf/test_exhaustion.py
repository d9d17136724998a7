# SPDX-License-Identifier: Apache-2.0
"""A table full of flows, at both hooks: what gets in, and that nothing forged makes room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from tests.cases.fixtures import ALL_ACCEPTED, GUARDED
from tests.cases.table import Fixture
from tests.frames import IN, OUT, TCP, tcp
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import FlowState, Mode, Path, Reason
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

LIMIT = 1024
CLIENT_ISN, VM_ISN = 1000, 5000
#: Longer than a closed connection is remembered, shorter than an open one.
AFTER_CLOSE = 60
#: Numbers that are not next on either side of a connection, near and far.
WRONG = (0, 1, CLIENT_ISN, CLIENT_ISN + 70_000, VM_ISN, VM_ISN + 70_000, 1 << 31, 0xFFFFFFFF)
#: Maps of these types forget entries by themselves.
LRU_TYPES = (9, 10)
#: A map with this flag hashes in the same way each time it is made.
BPF_F_ZERO_SEED = 1 << 6


@pytest.fixture(params=[Hook.XDP, Hook.TC])
def engine(request: pytest.FixtureRequest, artefact: loader.Artefact) -> Iterator[ProgramEngine]:
    fixture = Fixture("exhaustion", GUARDED, ALL_ACCEPTED, Mode.ENFORCE)
    engine = ProgramEngine(artefact, request.param, fixture.facts, fixture.policy, LIMIT)
    yield engine
    engine.close()


def to_vm(port: int, flags: str, seq: int, ack: int = 0) -> tuple[Path, bytes]:
    """A segment of the client with that port to the VM."""
    return Path.TO_VM, IN.wrap4(tcp(port, 80, flags, seq=seq, ack=ack), TCP)


def from_vm(port: int, flags: str, seq: int, ack: int = 0) -> tuple[Path, bytes]:
    """A segment of the VM to the client with that port."""
    return Path.FROM_VM, OUT.wrap4(tcp(80, port, flags, seq=seq, ack=ack), TCP)


def judge(engine: ProgramEngine, packets: Iterable[tuple[Path, bytes]]) -> Counter[Reason]:
    return Counter(engine.judge(path, frame).reason for path, frame in packets)


def syns(ports: range) -> Iterator[tuple[Path, bytes]]:
    return (to_vm(port, "S", CLIENT_ISN) for port in ports)


def handshakes(ports: range) -> Iterator[tuple[Path, bytes]]:
    for port in ports:
        yield to_vm(port, "S", CLIENT_ISN)
        yield from_vm(port, "SA", VM_ISN, CLIENT_ISN + 1)
        yield to_vm(port, "A", CLIENT_ISN + 1, VM_ISN + 1)


def data(ports: range) -> Iterator[tuple[Path, bytes]]:
    for port in ports:
        yield to_vm(port, "A", CLIENT_ISN + 1, VM_ISN + 1)
        yield from_vm(port, "A", VM_ISN + 1, CLIENT_ISN + 1)


def fins(ports: range) -> Iterator[tuple[Path, bytes]]:
    for port in ports:
        yield to_vm(port, "FA", CLIENT_ISN + 1, VM_ISN + 1)
        yield from_vm(port, "FA", VM_ISN + 1, CLIENT_ISN + 2)
        yield to_vm(port, "A", CLIENT_ISN + 2, VM_ISN + 2)


def states(engine: ProgramEngine) -> Counter[FlowState]:
    return Counter(FlowState(flow.state) for _, flow in engine.maps.flows())


FULL = range(2000, 2000 + LIMIT)
LATE = range(5000, 5020)


@pytest.fixture
def full(engine: ProgramEngine) -> ProgramEngine:
    """The programs with a table full of open connections."""
    found = judge(engine, handshakes(FULL))
    assert found == {Reason.DEFAULT: LIMIT, Reason.CT_ESTABLISHED: 2 * LIMIT}
    assert states(engine) == {FlowState.TCP_ESTABLISHED: LIMIT}
    return engine


def test_catalogue_L4_a_full_table_refuses_new_flows_only(full: ProgramEngine) -> None:
    assert judge(full, syns(LATE)) == {Reason.CT_FULL: len(LATE)}
    assert judge(full, data(FULL)) == {Reason.CT_ESTABLISHED: 2 * LIMIT}
    assert full.maps.meta().entries == LIMIT


def test_catalogue_G7_a_forged_reset_frees_nothing(full: ProgramEngine) -> None:
    some = range(FULL.start, FULL.start + 60)
    forged = (
        segment
        for port in some
        for number in WRONG
        for segment in (to_vm(port, "R", number), to_vm(port, "RA", number, VM_ISN + 1))
    )
    assert set(judge(full, forged)) <= {Reason.CT_ESTABLISHED, Reason.NO_STATE}
    full.advance(AFTER_CLOSE)

    assert states(full) == {FlowState.TCP_ESTABLISHED: LIMIT}
    assert judge(full, syns(LATE)) == {Reason.CT_FULL: len(LATE)}
    assert judge(full, data(some)) == {Reason.CT_ESTABLISHED: 2 * len(some)}


def test_catalogue_G7_a_forged_reset_leaves_a_connection_half_open(engine: ProgramEngine) -> None:
    some = range(2000, 2040)
    judge(engine, syns(some))
    judge(engine, (to_vm(port, "R", number) for port in some for number in (0, 1, 1 << 31)))
    judge(engine, (from_vm(port, "RA", 0, number) for port in some for number in (0, 7, 1 << 31)))

    assert states(engine) == {FlowState.TCP_SYN: len(some)}


def test_catalogue_L16_forged_fins_make_no_room(full: ProgramEngine) -> None:
    """Both ends' segments are forged: the VM may be the one that wants more than its share.

    Half of them lie before what was acknowledged, half acknowledge what was never sent.
    """
    early, late = FULL[: LIMIT // 2], FULL[LIMIT // 2 :]
    for port in early:
        judge(full, [to_vm(port, "FA", CLIENT_ISN - 900, VM_ISN + 1)])
        judge(full, [from_vm(port, "FA", VM_ISN - 900, CLIENT_ISN + 1)])
    for port in late:
        judge(full, [to_vm(port, "FA", CLIENT_ISN + 1, VM_ISN + 70_000_000)])
        judge(full, [from_vm(port, "FA", VM_ISN + 1, CLIENT_ISN + 70_000_000)])
    full.advance(AFTER_CLOSE)

    assert judge(full, syns(LATE)) == {Reason.CT_FULL: len(LATE)}
    assert states(full) == {FlowState.TCP_ESTABLISHED: LIMIT}


def test_catalogue_L16_forged_resets_make_no_room(full: ProgramEngine) -> None:
    forged = (
        segment
        for port in FULL
        for number in (0, 1 << 31)
        for segment in (to_vm(port, "R", number), from_vm(port, "R", number))
    )
    judge(full, forged)
    full.advance(AFTER_CLOSE)

    assert judge(full, syns(LATE)) == {Reason.CT_FULL: len(LATE)}


def test_catalogue_L16_what_is_closed_makes_room(full: ProgramEngine) -> None:
    """The control: with the right numbers the same segments do."""
    judge(full, fins(FULL))
    assert judge(full, syns(LATE)) == {Reason.CT_FULL: len(LATE)}
    full.advance(AFTER_CLOSE)

    found = judge(full, syns(range(6000, 6400)))
    assert found[Reason.DEFAULT] >= 200
    assert full.maps.meta().entries <= LIMIT


def test_catalogue_L5_flows_are_in_no_map_that_forgets(engine: ProgramEngine) -> None:
    for name in ("conntrack", "expiry_queue"):
        info = libbpf.map_info(engine.fd(name))
        assert info.map_type == libbpf.MapType.HASH, name
        assert info.map_type not in LRU_TYPES


def test_catalogue_L7_each_table_hashes_by_a_seed_of_its_own(engine: ProgramEngine) -> None:
    """Which flows collide cannot be known from outside; and rule lookup has no hash at all."""
    hashes = {
        name
        for name in ("conntrack", "expiry_queue")
        if not libbpf.map_info(engine.fd(name)).flags & BPF_F_ZERO_SEED
    }
    assert hashes == {"conntrack", "expiry_queue"}
    for name in ("policies", "rule_counters", "configs"):
        kind = libbpf.map_info(engine.fd(name)).map_type
        assert kind in {libbpf.MapType.ARRAY, libbpf.MapType.ARRAY_OF_MAPS}, name


def test_catalogue_L7_flows_that_crowd_cost_no_more_entries(engine: ProgramEngine) -> None:
    """Neighbouring addresses and ports, as a scan has them, fill the table to its limit exactly."""
    ports = range(1024, 1024 + LIMIT + 10)
    found = judge(engine, handshakes(ports))
    assert found[Reason.DEFAULT] == LIMIT
    assert engine.maps.meta().entries == LIMIT
    assert len({bytes(key) for key, _ in engine.maps.flows()}) == LIMIT
    assert abi.queue_batches(LIMIT) * abi.QUEUE_BATCH >= LIMIT
