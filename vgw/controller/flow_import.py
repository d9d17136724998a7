# SPDX-License-Identifier: Apache-2.0
"""Flows of another host taken into a VM's tables: its full export, then deltas in their order.

The command checks a stream as a whole and cuts it into pieces; the one writer of the host, the
controller if there is one, checks each piece for itself and puts it in. Flows come in with
generation 0, so the policy of this host judges each at its next packet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Final

import numpy as np

from vgw import abi
from vgw.controller.clock import coarse_now_ns
from vgw.controller.columns import Columns
from vgw.controller.flow_file import FlowReader, Head, Section
from vgw.controller.flow_table import (
    RECORD,
    Filled,
    are_live,
    keys_of,
    put_flows,
    read_flows,
    records_of,
)
from vgw.controller.reconcile import Host
from vgw.controller.state_file import read_state, write_state
from vgw.errors import VgwError

_SCHEMA: Final = "vgw/flow-import/v1"
#: Flows in a piece: a message of 1.5 MB.
PIECE: Final = 8192
_MAX_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a stream for one interface: RECORDs as bytes, with ages for times.

    `last` says that the stream ends with it.
    """

    vm: str
    interface: str
    stream: str
    sequence: int
    records: bytes
    last: bool


#: Puts a piece in and returns the fields of a flow_table.Filled.
PutPiece = Callable[[Piece], Mapping[str, int]]


def import_flows(
    host: Host, vm: str, file: IO[bytes], put: PutPiece, from_vm: str | None = None
) -> dict[str, Any]:
    """Take a stream of flows into the tables of a VM by `put`; return what became of them as JSON.

    The stream has to be of that VM, or of `from_vm`. Interfaces that have other names here are
    found by their MAC, or by their order. Raises FlowFileError, before anything is changed, when
    the stream is damaged, and VgwError when it is of another VM or comes out of order.
    """
    reader = FlowReader(file)
    head = reader.head
    if head.vm != (from_vm or vm):
        raise VgwError(
            f"these are flows of VM {head.vm}; `--from-vm {head.vm}` takes them for {vm}"
        )
    theirs = [(each.interface, each.mac) for each in reader.sections()]
    names = _matched(host, vm, theirs)
    rows: list[dict[str, Any]] = []
    file.seek(0)
    sections = FlowReader(file).sections()
    for number, section in enumerate(sections, 1):
        last = number == len(theirs)
        rows.append(_import_section(host, vm, names[section.interface], head, section, put, last))
    return {"vm": vm, "host": head.host, "sequence": head.sequence, "interfaces": rows}


def _matched(host: Host, vm: str, theirs: Sequence[tuple[str, str | None]]) -> dict[str, str]:
    """Return which interface of a VM is which of a stream's, by name, MAC or order."""
    ours = {
        name: entry.interface.mac for name, entry in sorted(host.manifest(vm).endpoints.items())
    }
    found: dict[str, str] = {}
    for name, mac in theirs:
        by_mac = [mine for mine, its in ours.items() if mac is not None and its == mac]
        if len(by_mac) == 1 or name in ours:
            found[name] = by_mac[0] if len(by_mac) == 1 else name
    if len(set(found.values())) < len(theirs):
        if len(ours) != len(theirs):
            raise VgwError(
                f"VM {vm} has other interfaces here ({', '.join(ours)}) than the flows are of "
                f"({', '.join(name for name, _ in theirs)})"
            )
        return dict(zip(sorted(name for name, _ in theirs), ours, strict=True))
    return found


def _import_section(  # noqa: PLR0913, PLR0917
    host: Host, vm: str, name: str, head: Head, section: Section, put: PutPiece, last: bool
) -> dict[str, Any]:
    records = section.records
    ended = _ended(host, vm, name, section)
    whole = np.concatenate([records, ended])
    filled = Filled()
    starts = range(0, max(len(whole), 1), PIECE)
    for start in starts:
        data = whole[start : start + PIECE].tobytes()
        is_last = last and start == starts[-1]
        piece = Piece(vm, name, head.stream, head.sequence, data, is_last)
        filled += Filled(**put(piece))
    return {
        "interface": name,
        "flows": len(records),
        "ended": len(ended),
        "unknown": section.lost,
        **asdict(filled),
    }


def _ended(host: Host, vm: str, name: str, section: Section) -> Columns:
    """Return what ends the flows that were imported and, by a stream, are there no more."""
    with _opened(host, vm, name) as endpoint:
        there = read_flows(endpoint)
        there = there[are_live(there["flow"], endpoint.maps.config(), coarse_now_ns())]
    there = there[there["flow"]["generation"] == 0]
    alive = {*keys_of(section.records), *keys_of(section.unchanged)}
    gone = [key not in alive for key in keys_of(there)]
    ended = there[np.array(gone, bool)]
    return records_of(ended["key"], np.zeros(len(ended), RECORD["flow"]))


@contextlib.contextmanager
def _opened(host: Host, vm: str, name: str) -> Iterator[Any]:
    """Open the endpoint of an interface for a `with` block. Raises VgwError."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(each) for each in host.open_endpoints(vm)]
        for endpoint in opened:
            if endpoint.interface == name:
                yield endpoint
                return
        raise VgwError(f"{name} of VM {vm} is not whole; attach the VM again to repair it")


def put_piece(host: Host, piece: Piece) -> dict[str, int]:
    """Put a piece of a stream into the tables; return what became of its flows.

    To be called where the host's changes are made. Raises VgwError when a piece is out of order or
    is not made of flows; nothing of it is put in then.
    """
    records = _checked(piece)
    file = host.paths.flow_import(piece.vm)
    with host.changing(), _opened(host, piece.vm, piece.interface) as endpoint:
        _check_order(file, piece)
        now = coarse_now_ns()
        flows = records["flow"]
        for field in ("last_seen_ns", "created_ns"):
            flows[field] = now - flows[field].clip(max=now - 1)
        flows["generation"], flows["rule"], flows["claim"] = 0, abi.NO_RULE, 0
        ended = flows["state"] == abi.FlowState.DEAD
        flows["epoch"] = endpoint.maps.config().flow_epoch
        wanted = ended | are_live(flows, endpoint.maps.config(), now)
        filled = put_flows(host.artefact, endpoint.fds, records[wanted])
        if piece.last:
            write_state(file, _SCHEMA, {"stream": piece.stream, "sequence": piece.sequence})
    return asdict(filled)


def _checked(piece: Piece) -> Columns:
    """Return the records of a piece; raises VgwError when they are none."""
    if len(piece.records) > PIECE * RECORD.itemsize or len(piece.records) % RECORD.itemsize:
        raise VgwError("a piece of flows has another size than flows have")
    records = np.frombuffer(piece.records, RECORD).copy()
    flows = records["flow"]
    sound = (
        (flows["state"] < len(abi.FlowState))
        & (flows["opener"] < len(abi.Path))
        & (flows["tcp_fins"] < 1 << len(abi.Path))
        & (flows["half_open"] <= 1)
    )
    if not sound.all() or piece.sequence < 0 or not 0 < len(piece.stream) <= _MAX_NAME:
        raise VgwError("a piece of flows has values that no flow has")
    flows["pad"] = 0
    return records


def _check_order(file: Any, piece: Piece) -> None:
    """Raise VgwError for a delta that does not follow what was imported, or that is old."""
    known = read_state(file, _SCHEMA) or {}
    before = known.get("sequence") if known.get("stream") == piece.stream else None
    if before is None and piece.sequence == 0:
        return
    if before is None:
        raise VgwError(
            f"this is delta {piece.sequence} of an export that VM {piece.vm} has not got: import "
            "the full export first"
        )
    if piece.sequence not in (before, before + 1):
        late = piece.sequence < before
        raise VgwError(
            f"number {before} of this export was imported last, so number {piece.sequence} "
            f"{'is older' if late else 'comes too early'}: import them in their order"
        )
