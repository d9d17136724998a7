# SPDX-License-Identifier: Apache-2.0
"""What is measured of each program: the ways of a packet, and the endpoint each is taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from bench.lab import BenchError
from bench.paths import packets
from bench.paths.checked import BY_RULE, ESTABLISHED, Judgement
from bench.paths.vary import Frame
from vgw.abi import Path, Reason, Verdict


class Table(NamedTuple):
    """An endpoint by what is in its table: open connections, of one protocol and IP version.

    `brief`: new ones are over with the next tick, and so make room.
    """

    version: int
    protocol: str
    share: float = 1.0
    brief: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One way of packets through a program, and what they have to get.

    `frame` returns the packet on a path, `first` one that must come before it. `varies`: packets
    differ in turn. `opens`: each is to be the first of a new connection.
    """

    what: str
    table: Table
    frame: Callable[[Path], Frame]
    wanted: Callable[[Path], Judgement]
    varies: bool = False
    opens: bool = False
    first: Callable[[Path], Frame] | None = None


#: Of a case that opens: as many as are over long before one comes again.
NEW_VALUES: Final = 1 << 20
_UDP: Final = Table(4, "udp")
#: Half of the flows, because as many dead ones are among them.
_BUSY: Final = Table(4, "udp", 0.5, brief=True)
_EMPTY: Final = Table(4, "udp", 0.0, brief=True)
_FLAGS: Final = {"tcp": "A", "udp": ""}


def cases() -> Iterator[Case]:
    """Yield all cases."""
    for protocol in _FLAGS:
        for version in (4, 6):
            for varies in (False, True):
                yield _established(Table(version, protocol), varies=varies)
    for table in (_EMPTY, _BUSY):
        yield Case("new connection", table, _syn, _always(BY_RULE), varies=True, opens=True)
    denied = Judgement(Verdict.DROP, Reason.RULE)
    fragment = "fragment, first"
    for varies in (False, True):
        yield Case("denied by rule", _UDP, packets.denied, _always(denied), varies)
    for varies in (False, True):
        yield Case("denied by guard", _UDP, packets.forged, _refused, varies)
    for varies in (False, True):
        yield Case(fragment, _UDP, _first_fragment, _always(ESTABLISHED), varies)
    yield Case(
        "fragment, later",
        _UDP,
        lambda path: packets.later_fragment(path, Path.FROM_VM),
        _always(ESTABLISHED),
        first=_first_fragment,
    )
    housekeeping = Judgement(Verdict.ACCEPT, Reason.ARP)
    yield Case("ARP request", _UDP, packets.arp, _always(housekeeping))


def _established(table: Table, *, varies: bool) -> Case:
    def frame(path: Path) -> Frame:
        flags = _FLAGS[table.protocol]
        return packets.packet(path, table.version, table.protocol, Path.FROM_VM, flags)

    what = f"established {table.protocol.upper()}"
    return Case(what, table, frame, _always(ESTABLISHED), varies)


def _syn(path: Path) -> Frame:
    return packets.packet(path, 4, "tcp", path, "S")


def _first_fragment(path: Path) -> Frame:
    return packets.first_fragment(path, Path.FROM_VM)


def _refused(path: Path) -> Judgement:
    reason = Reason.NOT_FOR_VM if path is Path.TO_VM else Reason.SPOOF_ADDRESS
    return Judgement(Verdict.DROP, reason)


def _always(wanted: Judgement) -> Callable[[Path], Judgement]:
    return lambda _path: wanted


def check_opened(case: Case, opened: int, runs: int) -> None:
    """Raise BenchError unless as many connections were opened as a case is about."""
    if opened != (runs if case.opens else 0):
        raise BenchError(f"{case.what}: {opened} connections were opened by {runs} packets")
