# SPDX-License-Identifier: Apache-2.0
"""Records of the perf buffer: anybody who may write to the map can put any bytes there."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.fuzz.inputs.target import WrongError, quick_directory
from vgw import abi
from vgw.controller.event_decoder import decode
from vgw.controller.event_reader import EventLosses, EventReader
from vgw.controller.events import LogWriter, RuleName

#: An address, a port or a count that stands in a record: both ends of every width.
_EDGES: Final = (b"\0", b"\xff", b"\x7f", b"\x80")
_MOST_BYTES: Final = 16384


class _Names:
    """Knows half of the endpoints and rules, by hostile names."""

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        return None if endpoint & 1 else ("vm\n\x1b[31m\ud800", 'tap"0\\')

    def rule(self, endpoint: int, generation: int, path: abi.Path, rule: int) -> RuleName | None:
        del endpoint, generation, path
        return None if rule & 1 else RuleName("p\n", "vm", "r\0")


class RecordTarget:
    """Gives records to a reader of events as the perf buffer does, and reads what it logs."""

    has_structure = False
    words: Sequence[bytes] = (
        *(edge * width for edge in _EDGES for width in (1, 2, 4, 8, 16)),
        abi.ABI_VERSION.to_bytes(2, "little"),
    )

    def __init__(self) -> None:
        self._log_file = Path()
        self._log: LogWriter | None = None
        self._losses = EventLosses(list)
        self._counted = 0
        self._leases = 0
        self._read = 0

    def seeds(self) -> Sequence[bytes]:
        """Return a record of each structure and kind, whole, cut and too long."""
        found = [b"", b"\0" * 8]
        for structure in (abi.Event, abi.FlowEvent):
            for kind in abi.EventKind:
                for filled in (b"\0", b"\x01"):
                    record = structure.from_buffer_copy(filled * ctypes.sizeof(structure))
                    event = record if isinstance(record, abi.Event) else record.event
                    _put_right(event, random.Random(kind))
                    event.kind = kind
                    data = bytes(record)
                    found += [data, data[:-1], data + bytes(4), data + bytes(300)]
        return found

    def shape(self, chance: random.Random, data: bytes) -> bytes:
        """Return the record with its version and its enumerations right, mostly."""
        data = data[:_MOST_BYTES]
        if len(data) < ctypes.sizeof(abi.Event) or chance.random() < 0.2:
            return data
        event = abi.Event.from_buffer_copy(data)
        _put_right(event, chance)
        return bytes(event) + data[ctypes.sizeof(abi.Event) :]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a reader and its log."""
        with quick_directory() as directory:
            self._log_file = directory / "events.jsonl"
            self._log = LogWriter(self._log_file)
            self._losses = EventLosses(list)
            self._reader = EventReader(
                directory / "events", _Names(), self._log, self._losses, self._take_lease
            )
            self._reader.on_flood = self._take_flood
            self._counted = self._leases = self._floods = self._read = 0
            yield
            self._log.close()

    def _take_lease(self, event: Any, frame: bytes) -> None:
        bytes(event)
        if not frame:
            raise WrongError("a lease without a frame")
        self._leases += 1

    def _take_flood(self, _endpoint: int, vm: str, interface: str) -> None:
        if not (vm and interface):
            raise WrongError("a flood of nobody")
        self._floods += 1

    def give(self, data: bytes) -> Hashable:
        """Give one record; it is logged, handed on or counted as none, one of them once.

        A lease is handed on, and a flood; that of an endpoint which is not known is passed over.
        """
        handed_on = self._leases + self._floods
        self._reader._take(0, data)
        self._reader._write()
        assert self._log is not None
        self._log.flush()
        with self._log_file.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        if self._read > 64 << 20:
            self._log_file.write_bytes(b"")
            self._read = 0
        lines = text.decode().splitlines()
        counted = sum(self._losses.totals().values())
        lost, self._counted = counted - self._counted, counted
        came = len(lines) + self._leases + self._floods - handed_on + lost
        if came != (0 if _is_nobodys_flood(data) else 1):
            raise WrongError(f"one record became {came}: {lines}, {lost} lost")
        if not all(line.isprintable() for line in lines):
            raise WrongError(f"a line with control characters: {lines}")
        shown = [json.loads(line) for line in lines]
        if not all(isinstance(record.get("event"), str) for record in shown):
            raise WrongError(f"a record without its event: {lines}")
        kinds = [(record["event"], record.get("reason"), *sorted(record)) for record in shown]
        return (lost, *map(tuple, kinds))


def _is_nobodys_flood(data: bytes) -> bool:
    event = decode(data)
    if not isinstance(event, abi.Event) or event.kind != abi.EventKind.FLOOD:
        return False
    return _Names().endpoint(event.endpoint) is None


def _put_right(event: abi.Event, chance: random.Random) -> None:
    """Give a record the version of this ABI, and numbers that enumerations have."""
    event.abi = abi.ABI_VERSION
    event.kind = chance.choice([*abi.EventKind])
    event.path, event.rule_path = chance.choice([*abi.Path]), chance.choice([*abi.Path])
    event.verdict, event.reason = chance.choice([*abi.Verdict]), chance.choice([*abi.Reason])
    event.end, event.state = chance.choice([*abi.FlowEnd]), chance.choice([*abi.FlowState])
    event.ethertype = chance.choice((0x0800, 0x86DD, 0x0806, event.ethertype))
