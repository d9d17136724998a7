# SPDX-License-Identifier: Apache-2.0
"""What is measured of each program: the ways of a packet, and the endpoint each is taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
_VERSIONS: Final = (4, 6)
_FLAGS: Final = {"tcp": "A", "udp": ""}
#: Half of the flows, because as many dead ones are among them.
_SHARES: Final = (0.0, 0.5)


def cases() -> Iterator[Case]:
    """Yield all cases."""
    for protocol in _FLAGS:
        for version in _VERSIONS:
            for varies in (False, True):
                yield _established(Table(version, protocol), varies=varies)
    for version in _VERSIONS:
        for share in _SHARES:
            table = Table(version, "udp", share, brief=True)
            syn = partial(_syn, version)
            yield Case("new connection", table, syn, _always(BY_RULE), varies=True, opens=True)
    for version in _VERSIONS:
        yield from _without_connection(Table(version, "udp"))
    for version in _VERSIONS:
        yield from _fragments(Table(version, "udp"))
    housekeeping = Judgement(Verdict.ACCEPT, Reason.ARP)
    yield Case("ARP request", Table(4, "udp"), packets.arp, _always(housekeeping))


def _established(table: Table, *, varies: bool) -> Case:
    def frame(path: Path) -> Frame:
        flags = _FLAGS[table.protocol]
        return packets.packet(path, table.version, table.protocol, Path.FROM_VM, flags)

    what = f"established {table.protocol.upper()}"
    return Case(what, table, frame, _always(ESTABLISHED), varies)


def _without_connection(table: Table) -> Iterator[Case]:
    by_rule = _always(Judgement(Verdict.DROP, Reason.RULE))
    for varies in (False, True):
        yield Case("denied by rule", table, partial(packets.denied, table.version), by_rule, varies)
    for varies in (False, True):
        frame = partial(packets.forged, table.version)
        yield Case("denied by guard", table, frame, _refused, varies)


def _fragments(table: Table) -> Iterator[Case]:
    first = partial(packets.first_fragment, table.version, Path.FROM_VM)
    later = partial(packets.later_fragment, table.version, Path.FROM_VM)
    for varies in (False, True):
        yield Case("fragment, first", table, first, _always(ESTABLISHED), varies)
    yield Case("fragment, later", table, later, _always(ESTABLISHED), first=first)


def _syn(version: int, path: Path) -> Frame:
    return packets.packet(path, version, "tcp", path, "S")


def _refused(path: Path) -> Judgement:
    reason = Reason.NOT_FOR_VM if path is Path.TO_VM else Reason.SPOOF_ADDRESS
    return Judgement(Verdict.DROP, reason)


def _always(wanted: Judgement) -> Callable[[Path], Judgement]:
    return lambda _path: wanted


def check_opened(case: Case, opened: int, runs: int) -> None:
    """Raise BenchError unless as many connections were opened as a case is about."""
    if opened != (runs if case.opens else 0):
        raise BenchError(f"{case.what}: {opened} connections were opened by {runs} packets")
