# SPDX-License-Identifier: Apache-2.0
"""Connection tracking as a model: an endpoint's flows, their keys, timeouts and limits.

Times are nanoseconds of whatever clock the caller counts by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vgw.abi import FlowState, Path
from vgw.policy.model import Address, EffectiveRule
from vgw.policy.packet_fields import Fragment, Packet, Quoted

SECOND_NS: Final = 1_000_000_000

#: An open TCP connection may be idle for longer than the two hours after which hosts send their
#: first keepalive; RFC 5382, REQ-5 asks for 2 h 4 min.
ESTABLISHED_SECONDS: Final = 7440

#: How long hosts wait for the rest of a datagram, as Linux does.
FRAGMENT_NS: Final = 30 * SECOND_NS

DEFAULT_TIMEOUTS_NS: Final[Mapping[FlowState, int]] = {
    FlowState.DEAD: 0,
    FlowState.TCP_SYN: 30 * SECOND_NS,
    FlowState.TCP_ESTABLISHED: ESTABLISHED_SECONDS * SECOND_NS,
    FlowState.TCP_FIN: 30 * SECOND_NS,
    FlowState.TCP_CLOSED: 10 * SECOND_NS,
    FlowState.UDP_SINGLE: 30 * SECOND_NS,
    FlowState.UDP_REPLIED: 120 * SECOND_NS,
    FlowState.ICMP: 30 * SECOND_NS,
    FlowState.OTHER: 600 * SECOND_NS,
}


@dataclass(frozen=True, slots=True)
class FlowKey:
    """A flow as the VM sees it, the same for both directions.

    For echo both ports are the identifier and `asker` is 1 + the path of the request, so that
    pings in opposite directions with one identifier stay apart.
    """

    local: Address
    remote: Address
    local_port: int
    remote_port: int
    protocol: int
    asker: int
    vlan: int


@dataclass(slots=True)
class Flow:
    """A connection. `rule` is what accepted it last, None for the default.

    `acked` is the last acknowledgement number that was sent on each path, `end` the number behind
    the last byte. `half_open`: it counts toward the limit of its opener.
    """

    opener: Path
    state: FlowState
    generation: int
    last_seen_ns: int
    rule: EffectiveRule | None = None
    packets: dict[Path, int] = field(default_factory=lambda: dict.fromkeys(Path, 0))
    acked: dict[Path, int] = field(default_factory=lambda: dict.fromkeys(Path, 0))
    end: dict[Path, int] = field(default_factory=lambda: dict.fromkeys(Path, 0))
    fins: int = 0
    half_open: bool = True


def other(path: Path) -> Path:
    """Return the opposite path."""
    return Path.TO_VM if path is Path.FROM_VM else Path.FROM_VM


def flow_key(packet: Packet, path: Path) -> FlowKey:
    """Return the key of the flow that a fully read IP packet belongs to."""
    quoted = Quoted(
        source=_present(packet.source),
        destination=_present(packet.destination),
        protocol=packet.protocol or 0,
        source_port=packet.source_port,
        destination_port=packet.destination_port,
    )
    if packet.icmp is not None and packet.icmp.echo is not None:
        identifier = packet.icmp.identifier
        quoted = Quoted(
            quoted.source,
            quoted.destination,
            quoted.protocol,
            source_port=identifier,
            destination_port=identifier,
            echo=packet.icmp.echo,
        )
    return key_of(quoted, path, packet.vlan)


def key_of(quoted: Quoted, path: Path, vlan: int) -> FlowKey:
    """Return the flow of a packet known by its addresses and ports that went along `path`."""
    asker = 0
    if quoted.echo is not None:
        asker = 1 + (path if quoted.echo else other(path))
    source_side = quoted.source, quoted.source_port
    destination_side = quoted.destination, quoted.destination_port
    is_from_vm = path is Path.FROM_VM
    local, remote = (
        (source_side, destination_side) if is_from_vm else (destination_side, source_side)
    )
    return FlowKey(local[0], remote[0], local[1], remote[1], quoted.protocol, asker, vlan)


def _present(address: Address | None) -> Address:
    if address is None:
        raise ValueError("a packet without addresses has no flow")
    return address


class FlowTable:
    """The flows of one endpoint."""

    def __init__(self, timeouts_ns: Mapping[FlowState, int]) -> None:
        self._timeouts_ns = timeouts_ns
        self._flows: dict[FlowKey, Flow] = {}

    def live(self, key: FlowKey, now_ns: int) -> Flow | None:
        """Return the flow of a key unless there is none or it has timed out."""
        flow = self._flows.get(key)
        return flow if flow is not None and self._is_live(flow, now_ns) else None

    def is_full(self, key: FlowKey, limit: int, now_ns: int) -> bool:
        """Tell whether there is no room for a new flow of `key`: neither its own nor a free one."""
        if key in self._flows:
            return False
        return sum(self._is_live(flow, now_ns) for flow in self._flows.values()) >= limit

    def half_open(self, opener: Path, now_ns: int) -> int:
        """Return how many half-open flows a side has opened."""
        flows = self._flows.values()
        return sum(f.half_open and f.opener is opener and self._is_live(f, now_ns) for f in flows)

    def put(self, key: FlowKey, flow: Flow) -> None:
        """Store a flow, in place of a finished one of the same key."""
        self._flows[key] = flow

    def remove(self, key: FlowKey) -> None:
        """Forget the flow of a key."""
        del self._flows[key]

    def clear(self) -> None:
        """Forget every flow."""
        self._flows.clear()

    def _is_live(self, flow: Flow, now_ns: int) -> bool:
        return now_ns - flow.last_seen_ns <= self._timeouts_ns[flow.state]


class FragmentTable:
    """The flows of datagrams of which more fragments may come."""

    def __init__(self) -> None:
        self._first: dict[tuple[object, ...], tuple[FlowKey, int, int]] = {}

    def remember(self, packet: Packet, path: Path, flow: FlowKey, now_ns: int) -> None:
        """Take note of an accepted first fragment."""
        length = 0 if packet.fragment is None else packet.fragment.length
        self._first[_datagram(packet, path)] = flow, length, now_ns

    def forget(self, packet: Packet, path: Path) -> None:
        """Forget what was remembered of the datagram of a fragment."""
        self._first.pop(_datagram(packet, path), None)

    def flow_of(
        self, packet: Packet, fragment: Fragment, path: Path, now_ns: int
    ) -> FlowKey | None:
        """Return the flow of a later fragment; None without a first one.

        One that overlaps the first one ends the datagram.
        """
        found = self._first.get(_datagram(packet, path))
        if found is None:
            return None
        flow, length, seen_ns = found
        if now_ns - seen_ns > FRAGMENT_NS:
            return None
        if fragment.offset < length:
            self.forget(packet, path)
            return None
        return flow

    def clear(self) -> None:
        """Forget every datagram."""
        self._first.clear()


def _datagram(packet: Packet, path: Path) -> tuple[object, ...]:
    """Return what tells the datagram of a fragment from others."""
    return (
        path,
        packet.source,
        packet.destination,
        packet.vlan,
        packet.fragment
        and (
            packet.fragment.identification,
            packet.fragment.protocol,
        ),
    )
