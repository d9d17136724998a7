# SPDX-License-Identifier: Apache-2.0
"""Flows leave the table without user space: dead ones go, live ones stay, a full table heals.

The invariant behind it: each flow in the table has its key exactly once in the expiry queue or in a
CPU's buffer.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cases.fixtures import ALL_ACCEPTED, GUARDED
from tests.cases.table import Fixture
from tests.frames import IPV4, PEER4, UDP, VM4, ethernet, ipv4, udp
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import Mode, Path, Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

LIMIT = 1024
#: Keys of the batches that the queue keeps, and of what CPUs buffer.
KEPT = (abi.EXPIRY_MARGIN + libbpf.possible_cpus()) * abi.QUEUE_BATCH


@pytest.fixture
def engine(artefact: loader.Artefact) -> Iterator[ProgramEngine]:
    fixture = Fixture("expiry", GUARDED, ALL_ACCEPTED, Mode.ENFORCE)
    engine = ProgramEngine(artefact, Hook.TC, fixture.facts, fixture.policy, LIMIT)
    yield engine
    engine.close()


def datagram(number: int) -> bytes:
    """A datagram of the VM; each number is a flow of its own."""
    return ethernet(ipv4(udp(1024 + number), UDP, VM4, PEER4), IPV4)


def send(engine: ProgramEngine, numbers: range) -> Counter[Reason]:
    return Counter(engine.judge(Path.FROM_VM, datagram(n)).reason for n in numbers)


def keys_in_table(engine: ProgramEngine) -> Counter[bytes]:
    return Counter(bytes(key) for key, _ in engine.maps.flows())


def keys_in_queue(engine: ProgramEngine) -> Counter[bytes]:
    size = ctypes.sizeof(abi.QueueBatch)
    found: Counter[bytes] = Counter()
    for _, value in libbpf.map_entries(engine.fd("expiry_queue"), 8, size):
        batch = abi.QueueBatch.from_buffer_copy(value)
        found.update(bytes(key) for key in batch.keys)
    cpus, stride = libbpf.possible_cpus(), ctypes.sizeof(abi.QueueBuffer)
    buffers = libbpf.map_lookup(engine.fd("expiry_buffer"), bytes(4), stride * cpus)
    assert buffers is not None
    for cpu in range(cpus):
        buffer = abi.QueueBuffer.from_buffer_copy(buffers, cpu * stride)
        found.update(bytes(buffer.batch.keys[n]) for n in range(buffer.count))
    return found


def check_invariant(engine: ProgramEngine) -> None:
    table = keys_in_table(engine)
    assert keys_in_queue(engine) == table
    assert engine.maps.meta().entries == len(table)


def test_each_flow_is_queued_once(engine: ProgramEngine) -> None:
    assert send(engine, range(500)) == {Reason.DEFAULT: 500}
    check_invariant(engine)
    assert len(keys_in_table(engine)) == 500


def test_packets_of_open_flows_queue_nothing(engine: ProgramEngine) -> None:
    send(engine, range(100))
    assert send(engine, range(100)) == {Reason.CT_ESTABLISHED: 100}
    check_invariant(engine)


def test_catalogue_L6_live_flows_survive_any_number_of_looks(engine: ProgramEngine) -> None:
    """Flows in use are put back each time they are looked at, while others come and go."""
    send(engine, range(100))
    for turn in range(20):
        engine.advance(20)
        assert send(engine, range(100)) == {Reason.CT_ESTABLISHED: 100}
        start = 1000 + turn * 300
        assert send(engine, range(start, start + 300)) == {Reason.DEFAULT: 300}
        check_invariant(engine)
    live = {bytes(key) for key, _ in engine.maps.flows()}
    assert len(live) < 100 + 3 * 300 + KEPT


def test_dead_flows_make_room(engine: ProgramEngine) -> None:
    """A table full of dead flows takes new ones at once, and the dead ones go."""
    send(engine, range(LIMIT))
    engine.advance(31)
    reasons = send(engine, range(2000, 2000 + 400))
    assert reasons[Reason.DEFAULT] >= 399
    check_invariant(engine)
    assert len(keys_in_table(engine)) <= LIMIT - 400


def test_full_of_live_flows_refuses_new_ones_only(engine: ProgramEngine) -> None:
    assert send(engine, range(LIMIT + 100)) == {Reason.DEFAULT: LIMIT, Reason.CT_FULL: 100}
    assert send(engine, range(LIMIT)) == {Reason.CT_ESTABLISHED: LIMIT}
    refused = engine.judge(Path.FROM_VM, datagram(LIMIT + 5))
    assert refused == (Verdict.DROP, Reason.CT_FULL, None)
    check_invariant(engine)


def test_a_dead_flow_is_replaced_in_place(engine: ProgramEngine) -> None:
    """The same ports again after the timeout: a new flow, judged anew, with the key queued once."""
    send(engine, range(10))
    engine.advance(31)
    assert send(engine, range(10)) == {Reason.DEFAULT: 10}
    check_invariant(engine)
    assert engine.maps.meta().created[Path.FROM_VM] == 20


def test_reaping_by_hand_empties_an_idle_table(engine: ProgramEngine) -> None:
    """conntrack_reap deletes dead flows batch by batch, and nothing that lives."""
    send(engine, range(600))
    engine.advance(20)
    send(engine, range(50))
    engine.advance(15)
    with engine.reaper() as reap:
        turns = 0
        while reap() and turns < 2 * LIMIT:
            turns += 1
            if turns % 50 == 0:
                check_invariant(engine)
            if turns >= LIMIT // abi.QUEUE_BATCH:
                break
    check_invariant(engine)
    live = [key for key, flow in engine.maps.flows() if engine.is_live(flow)]
    assert len(live) == 50
    assert len(keys_in_table(engine)) <= 50 + KEPT


def test_a_flushed_table_reads_as_empty(engine: ProgramEngine) -> None:
    """Another epoch: every flow is a miss at its next packet."""
    send(engine, range(50))
    engine.flush()
    assert send(engine, range(50)) == {Reason.DEFAULT: 50}
    check_invariant(engine)
