# SPDX-License-Identifier: Apache-2.0
"""Nothing but an event of this ABI comes out of bytes, whatever they are."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest

from vgw import abi
from vgw.controller.event_decoder import LONGEST_FRAME, LONGEST_PADDING, Lease, decode
from vgw.controller.event_names import EventNames
from vgw.controller.event_reader import EventLosses, EventReader, LeaseHandler
from vgw.controller.events import LogWriter, event_record, read_log
from vgw.controller.paths import Paths

KIND = abi.EventKind
FRAME = b"frame of a server's answer"


def packet(**fields: Any) -> bytes:
    return bytes(abi.Event(**{"abi": abi.ABI_VERSION, **fields}))


def flow(**fields: Any) -> bytes:
    made = abi.FlowEvent()
    made.event = abi.Event.from_buffer_copy(packet(**{"kind": KIND.FLOW_END, **fields}))
    return bytes(made)


def lease(frame: bytes = FRAME, **fields: Any) -> bytes:
    return packet(**{"kind": KIND.LEASE, "length": len(frame), **fields}) + frame


def wrong_records() -> dict[str, bytes]:
    """Return what N13 is about: what a program of another version, or another program, sends."""
    wrong = {
        "nothing": b"",
        "a byte": b"\0",
        "a packet cut short": packet()[:-1],
        "a packet with more behind it": packet() + bytes(LONGEST_PADDING + 1),
        "a flow cut short": flow()[:-1],
        "a flow of a packet's size": flow()[: len(packet())],
        "a packet of a flow's size": packet() + bytes(len(flow()) - len(packet())),
        "a flow with more behind it": flow() + bytes(LONGEST_PADDING + 1),
        "a lease without a frame": packet(kind=KIND.LEASE, length=300),
        "a lease of length 0": lease(length=0),
        "a lease with too much of it": lease(bytes(LONGEST_FRAME + 1)),
        "an unknown kind": packet(kind=len(KIND)),
        "another byte order": packet(abi=abi.ABI_VERSION << 8),
        "an older version": packet(abi=abi.ABI_VERSION - 1),
        "a newer version": flow(abi=abi.ABI_VERSION + 1),
    }
    for field in ("path", "rule_path", "verdict", "reason", "end", "state"):
        wrong[f"a packet of {field} 255"] = packet(**{field: 255})
        wrong[f"a flow of {field} 255"] = flow(**{field: 255})
    return wrong


WRONG = wrong_records()


@pytest.mark.parametrize("padding", range(LONGEST_PADDING + 1))
def test_padding_of_the_kernel_belongs_to_no_record(padding: int) -> None:
    assert isinstance(decode(packet(length=7) + bytes(padding)), abi.Event)
    assert isinstance(decode(flow() + bytes(padding)), abi.FlowEvent)
    made = decode(lease() + bytes(padding))
    assert isinstance(made, Lease)
    assert made.frame == FRAME


def test_of_a_lease_cut_short_comes_what_was_captured() -> None:
    made = decode(lease(length=1500))
    assert isinstance(made, Lease)
    assert (made.frame, made.event.length) == (FRAME, 1500)


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_catalogue_N13_what_is_no_record_of_this_abi_is_none(data: bytes) -> None:
    assert decode(data) is None


class Reading:
    """A reader over no map, with what it logs and counts."""

    def __init__(self, directory: Path, on_lease: LeaseHandler | None = None) -> None:
        self.file = directory / "events.jsonl"
        self.log = LogWriter(self.file)
        self.losses = EventLosses(list)
        paths = Paths.from_environment({}, state_dir=directory)
        names = EventNames(paths)
        self.reader = EventReader(directory / "events", names, self.log, self.losses, on_lease)

    def take(self, *records: bytes) -> list[dict[str, Any]]:
        for data in records:
            self.reader._take(0, data)
        self.reader._write()
        self.log.close()
        return list(read_log(self.file))


def test_catalogue_N13_wrong_records_are_dropped_and_counted(tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    logged = reading.take(packet(), *WRONG.values(), flow())

    assert reading.losses.totals()["malformed"] == len(WRONG)
    assert [record["event"] for record in logged] == ["accept", "flow_end"]


def test_catalogue_N13_no_bytes_are_more_than_a_malformed_record(tmp_path: Path) -> None:
    """Random changes of good records: each gives a record that can be written, or is counted."""
    generator = random.Random(13)
    seeds = (packet(), flow(), flow(kind=KIND.FLOW_START), lease())
    names = EventNames(Paths.from_environment({}, state_dir=tmp_path))
    believed = 0
    for _ in range(20_000):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.choice((0, 1, 1, 2, 4, 30))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        made = decode(bytes(data[: generator.choice((len(data), generator.randrange(200)))]))
        if isinstance(made, abi.Event | abi.FlowEvent):
            believed += 1
            assert event_record(made, names, 1_700_000_000_000_000_000)["ts"]
    assert believed > 1000


def test_leases_are_handed_on_with_their_frame(tmp_path: Path) -> None:
    taken: list[tuple[int, bytes]] = []
    reading = Reading(tmp_path, lambda event, frame: taken.append((event.endpoint, frame)))

    assert reading.take(lease(endpoint=7)) == []
    assert taken == [(7, FRAME)]
    assert not any(reading.losses.totals().values())


def test_leases_that_nobody_takes_are_counted(tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    reading.take(lease(), lease())
    assert reading.losses.totals()["lease"] == 2


def test_who_fails_at_a_lease_does_not_end_the_log(tmp_path: Path) -> None:
    def fail(_: abi.Event, frame: bytes) -> None:
        raise ZeroDivisionError(frame)

    reading = Reading(tmp_path, fail)
    assert len(reading.take(lease(), packet())) == 1
    assert reading.losses.totals()["lease"] == 1


def test_a_packet_is_the_shortest_record() -> None:
    """The perf buffer has room for so many more packets as these are shorter."""
    assert ctypes.sizeof(abi.Event) == 96
    assert ctypes.sizeof(abi.FlowEvent) == 144
