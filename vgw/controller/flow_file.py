# SPDX-License-Identifier: Apache-2.0
"""The form in which flows go from host to host: a stream that is whole or refused.

It begins with a line of JSON, the head, which says whose flows it has and which fields each has.
Then comes for each interface a line of JSON, its flows, and of a delta the keys (the first
`key_fields` fields) of the flows that are as they were. The SHA-256 of all that, in hex, is the
last line. Fields are named, so versions that have other ones understand each other; numbers are
little-endian, addresses and ports as on the wire. Times are ages in nanoseconds: `age_ns` since
the first packet, `idle_ns` since the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from tempfile import TemporaryFile
from typing import IO, Any, Final

import numpy as np

from vgw import abi
from vgw.controller.columns import Columns, fitting, renumbered
from vgw.controller.flow_table import FLOW, KEY, RECORD
from vgw.errors import VgwError

SCHEMA: Final = "vgw/flows/v1"
MAX_BYTES: Final = 1 << 30
_MAX_LINE: Final = 1 << 20
_MAX_FLOWS: Final = 1 << 20
_MAX_INTERFACES: Final = 64
_MAX_RECORD: Final = 1024
_MAX_COUNT: Final = 64
_CHUNK: Final = 1 << 20
_KINDS: Final = ("u1", "u2", "u4", "u8")
#: What only means something in the table that a flow is in.
_OF_TABLE: Final = {"last_seen_ns", "created_ns", "epoch", "claim", "generation", "rule"}
#: Without these there is no flow.
_NEEDED: Final = {"local", "remote", "local_port", "remote_port", "protocol", "state", "opener"}
_ENUMS: Final = {"state": "vgw_flow_state", "opener": "vgw_path"}

#: Name, kind and count of each field of a flow in a stream.
Fields = tuple[tuple[str, str, int], ...]


class FlowFileError(VgwError):
    """A stream of flows that is not to be used, no part of it."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a stream says of itself.

    `stream` names a full export and the deltas that follow it, which `sequence` counts from 0.
    """

    vm: str
    host: str
    version: str
    stream: str
    sequence: int
    fields: Fields
    key_fields: int
    enums: Mapping[str, Mapping[str, int]]
    byteorder: str = sys.byteorder


@dataclass(frozen=True, slots=True)
class Section:
    """The flows of one interface as RECORDs of this version, with ages for their times.

    Of `unchanged`, flows that were sent before and are still there, only the keys mean something.
    `lost` counts flows whose state this version does not know.
    """

    interface: str
    mac: str | None
    records: Columns
    unchanged: Columns
    lost: int = 0


def _plain(dtype: np.dtype[Any]) -> Iterator[tuple[str, str, int]]:
    for name in dtype.names or ():
        field = dtype[name]
        kind, shape = field.base, field.shape
        if kind.names:  # an address
            kind, shape = kind[0].base, kind[0].shape
        if name not in _OF_TABLE and not name.startswith("pad"):
            yield name, f"u{kind.itemsize}", int(np.prod(shape, dtype=int))


def own_head(vm: str, host: str, version: str, stream: str, sequence: int) -> Head:
    """Return the head of a stream that this version writes."""
    key = tuple(_plain(KEY))
    times = (("idle_ns", "u8", 1), ("age_ns", "u8", 1))
    enums = {
        name: {member.name: int(member) for member in abi.ENUMERATIONS[name][1]}
        for name in _ENUMS.values()
    }
    fields = (*key, *_plain(FLOW), *times)
    return Head(vm, host, version, stream, sequence, fields, len(key), enums)


def _row_type(fields: Fields) -> np.dtype[Any]:
    """Return the type of a flow in a stream with these fields."""
    formats = [(name, f"<{kind}", (count,) if count > 1 else ()) for name, kind, count in fields]
    return np.dtype(formats)


class FlowWriter:
    """Writes a stream: the head, then sections; close() makes it whole."""

    def __init__(self, out: IO[bytes], head: Head) -> None:
        self._out = out
        self._digest = hashlib.sha256()
        self._type = _row_type(head.fields)
        self._key_type = _row_type(head.fields[: head.key_fields])
        self.bytes = 0
        self._line({"schema": SCHEMA, **asdict(head)})

    def add(self, section: Section) -> None:
        """Write the flows of an interface."""
        self._line(
            {
                "interface": section.interface,
                "mac": section.mac,
                "flows": len(section.records),
                "unchanged": len(section.unchanged),
            }
        )
        self._write(_rows(section.records, self._type).tobytes())
        self._write(_rows(section.unchanged, self._key_type).tobytes())

    def close(self) -> None:
        """Write the last line."""
        self._out.write(self._digest.hexdigest().encode() + b"\n")
        self._out.flush()

    def _line(self, value: Mapping[str, object]) -> None:
        self._write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._out.write(data)
        self.bytes += len(data)


def _rows(records: Columns, wanted: np.dtype[Any]) -> Columns:
    """Return RECORDs as the rows of a stream."""
    rows = np.zeros(len(records), wanted)
    for name in wanted.names or ():
        rows[name] = _place(records, name)
    return rows


def _place(records: Columns, name: str) -> Columns:
    """Return the field of RECORDs that a field of a stream is, as a view."""
    name = {"idle_ns": "last_seen_ns", "age_ns": "created_ns"}.get(name, name)
    field = records["key" if name in (KEY.names or ()) else "flow"][name]
    return field["bytes"] if field.dtype.names else field  # an address


def _records(rows: Columns) -> Columns:
    """Return rows of a stream as RECORDs: the fields that they have."""
    records = np.zeros(len(rows), RECORD)
    known = {name for name, _, _ in own_head("", "", "", "", 0).fields}
    for name in rows.dtype.names or ():
        if name in known:
            _place(records, name)[...] = fitting(rows[name], _place(records, name))
    return records


class FlowReader:
    """Reads a stream that was checked as a whole before any of it is given out."""

    def __init__(self, file: IO[bytes]) -> None:
        """Check a seekable file. Raises FlowFileError."""
        self._file = file
        self._end = _checked_end(file)
        self.head = _head(self._line())

    def sections(self) -> Iterator[Section]:
        """Yield what the stream has of each interface. Raises FlowFileError."""
        fields = self.head.fields
        flow_type, key_type = _row_type(fields), _row_type(fields[: self.head.key_fields])
        for _ in range(_MAX_INTERFACES):
            if self._file.tell() == self._end:
                return
            about = self._line()
            try:
                name, mac = str(about["interface"]), about["mac"]
                counts = int(about["flows"]), int(about["unchanged"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise FlowFileError("a section of the flows says not what it has") from error
            rows = self._take(flow_type, counts[0])
            unchanged = _records(self._take(key_type, counts[1]))
            records, lost = self._understood(rows)
            yield Section(name, None if mac is None else str(mac), records, unchanged, lost)
        raise FlowFileError(f"the flows are of more than {_MAX_INTERFACES} interfaces")

    def _understood(self, rows: Columns) -> tuple[Columns, int]:
        """Return rows as RECORDs with this version's numbers, and how many it cannot understand."""
        records = _records(rows)
        known = np.ones(len(rows), bool)
        for field, enum in _ENUMS.items():
            numbers = {member.name: int(member) for member in abi.ENUMERATIONS[enum][1]}
            values, named = renumbered(records["flow"][field], self.head.enums[enum], numbers)
            records["flow"][field] = values
            known &= named
        return records[known], int(np.count_nonzero(~known))

    def _line(self) -> Mapping[str, Any]:
        line = self._file.readline(_MAX_LINE)
        if not line.endswith(b"\n") or self._file.tell() > self._end:
            raise FlowFileError("what should be flows has no readable head")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FlowFileError("what should be flows has no readable head") from error
        if not isinstance(value, dict):
            raise FlowFileError("what should be flows has no readable head")
        return value

    def _take(self, dtype: np.dtype[Any], count: int) -> Columns:
        size = count * dtype.itemsize
        if not 0 <= count <= _MAX_FLOWS or self._file.tell() + size > self._end:
            raise FlowFileError("a section of the flows has another size than it says")
        return np.frombuffer(self._file.read(size), dtype)


@contextlib.contextmanager
def spooled(source: IO[bytes]) -> Iterator[IO[bytes]]:
    """Give what a stream holds as a file without a name, for a `with` block.

    Only a whole stream can be checked, and a pipe cannot be read twice. Raises FlowFileError if it
    is too large.
    """
    with TemporaryFile() as file:
        total = 0
        while data := source.read(_CHUNK):
            total += len(data)
            if total > MAX_BYTES:
                raise FlowFileError(f"the flows are more than {MAX_BYTES >> 20} MiB")
            file.write(data)
        yield file


def _checked_end(file: IO[bytes]) -> int:
    """Return where the last line begins; the file is at its start then."""
    size = file.seek(0, 2)
    end = size - hashlib.sha256().digest_size * 2 - 1
    if size > MAX_BYTES:
        raise FlowFileError(f"the flows are more than {MAX_BYTES >> 20} MiB")
    file.seek(0)
    digest, left = hashlib.sha256(), max(end, 0)
    while left > 0 and (data := file.read(min(left, _CHUNK))):
        digest.update(data)
        left -= len(data)
    if end < 0 or file.read() != digest.hexdigest().encode() + b"\n":
        raise FlowFileError("the flows are cut off or damaged: export them again")
    file.seek(0)
    return end


def _head(value: Mapping[str, Any]) -> Head:
    if value.get("schema") != SCHEMA:
        raise FlowFileError(f"the flows are not of the form {SCHEMA}: use an older or newer vgw")
    try:
        fields = tuple((str(name), str(kind), int(n)) for name, kind, n in value["fields"])
        head = Head(
            vm=str(value["vm"]),
            host=str(value["host"]),
            version=str(value["version"]),
            stream=str(value["stream"]),
            sequence=int(value["sequence"]),
            fields=fields,
            key_fields=int(value["key_fields"]),
            enums={
                enum: {str(name): int(n) for name, n in value["enums"][enum].items()}
                for enum in _ENUMS.values()
            },
            byteorder=str(value["byteorder"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FlowFileError("the head of the flows does not say all that it has to") from error
    _check_fields(head)
    return head


def _check_fields(head: Head) -> None:
    names = [name for name, _, _ in head.fields]
    if head.byteorder != sys.byteorder:
        raise FlowFileError("the flows are of a host with another byte order")
    missing = sorted(_NEEDED.difference(names))
    if missing:
        raise FlowFileError(f"the flows do not say their {missing[0]}")
    sound = (
        len(set(names)) == len(names)
        and 0 < head.key_fields < len(names)
        and all(name.isidentifier() for name in names)
        and all(kind in _KINDS and 1 <= n <= _MAX_COUNT for _, kind, n in head.fields)
    )
    if not sound or _row_type(head.fields).itemsize > _MAX_RECORD:
        raise FlowFileError("the fields of the flows are nothing that a flow has")
