# SPDX-License-Identifier: Apache-2.0
"""Connection tracking as a model: keys, states and timeouts of an endpoint's flows.

Times are nanoseconds of whatever clock the caller counts by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vgw.abi import FlowState, Path
from vgw.policy.model import ICMP, ICMPV6, TCP, UDP, Address, EffectiveRule
from vgw.policy.packet_fields import ACK, FIN, RST, SYN, Packet, Quoted, Tcp

SECOND_NS: Final = 1_000_000_000

#: An open TCP connection may be idle for longer than the two hours after which hosts send their
#: first keepalive; RFC 5382, REQ-5 asks for 2 h 4 min.
ESTABLISHED_SECONDS: Final = 7440

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
_FIRST_STATE: Final = {
    TCP: FlowState.TCP_SYN,
    UDP: FlowState.UDP_SINGLE,
    ICMP: FlowState.ICMP,
    ICMPV6: FlowState.ICMP,
}
_BOTH_FINS: Final = 1 << Path.TO_VM | 1 << Path.FROM_VM


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
    """A connection. `rule` is what accepted it last, None for the default."""

    opener: Path
    state: FlowState
    generation: int
    rule: EffectiveRule | None
    last_seen_ns: int
    packets: dict[Path, int] = field(default_factory=lambda: dict.fromkeys(Path, 0))
    acked: dict[Path, int] = field(default_factory=lambda: dict.fromkeys(Path, 0))
    fins: int = 0


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


def open_flow(
    packet: Packet, path: Path, generation: int, rule: EffectiveRule | None, now_ns: int
) -> Flow:
    """Return the flow that an accepted packet opens."""
    state = _FIRST_STATE.get(packet.protocol or 0, FlowState.OTHER)
    if packet.icmp is None and state is FlowState.ICMP:
        state = FlowState.OTHER  # ICMP's number over the other family is a protocol like any
    flow = Flow(path, state, generation, rule, now_ns)
    flow.packets[path] = 1
    if packet.tcp is not None:
        # As if the other side had acknowledged the SYN: what a reset on either side must match.
        flow.acked[other(path)] = (packet.tcp.sequence + 1) % (1 << 32)
    return flow


def may_be_reused(flow: Flow, packet: Packet) -> bool:
    """Tell whether a TCP packet starts a new connection in place of a finished one."""
    finished = flow.state in {FlowState.TCP_FIN, FlowState.TCP_CLOSED}
    return finished and packet.tcp is not None and is_opening(packet.tcp)


def is_opening(tcp: Tcp) -> bool:
    """Tell whether a segment asks for a new connection."""
    return tcp.flags & (SYN | ACK) == SYN


def track(flow: Flow, packet: Packet, path: Path, now_ns: int) -> None:
    """Take note of an accepted packet of a live flow."""
    was_closed = flow.state is FlowState.TCP_CLOSED
    if packet.tcp is not None and not _track_tcp(flow, packet.tcp, path):
        return
    if flow.state is FlowState.UDP_SINGLE and path is not flow.opener:
        flow.state = FlowState.UDP_REPLIED
    flow.packets[path] += 1
    if not was_closed:
        flow.last_seen_ns = now_ns


def _track_tcp(flow: Flow, tcp: Tcp, path: Path) -> bool:
    """Move the state of a TCP flow; returns False for a segment that must not change anything.

    A reset out of sequence or a SYN inside an open connection may be forged. They pass, for the
    receiver knows better, but cannot shorten or lengthen the life of the flow.
    """
    if tcp.flags & RST:
        if not _reset_is_exact(flow, tcp, path):
            return False
        flow.state = FlowState.TCP_CLOSED
        return True
    if is_opening(tcp) and flow.state is FlowState.TCP_ESTABLISHED:
        return False
    is_answer_to_syn = flow.state is FlowState.TCP_SYN and path is not flow.opener
    if tcp.flags & ACK and not is_answer_to_syn:  # forged, it would choose the next reset's number
        flow.acked[path] = tcp.acknowledgement
    answered = flow.packets[other(flow.opener)] > 0
    if (
        flow.state is FlowState.TCP_SYN
        and path is flow.opener
        and tcp.flags & (SYN | ACK) == ACK
        and answered
    ):
        flow.state = FlowState.TCP_ESTABLISHED
    if tcp.flags & FIN:
        flow.fins |= 1 << path
        if flow.fins == _BOTH_FINS and flow.state is not FlowState.TCP_CLOSED:
            flow.state = FlowState.TCP_FIN
    return True


def _reset_is_exact(flow: Flow, tcp: Tcp, path: Path) -> bool:
    """Tell whether a reset is one that its receiver heeds (RFC 5961; RFC 9293, 3.10.7.3)."""
    if flow.state is FlowState.TCP_SYN and path is not flow.opener:
        return bool(tcp.flags & ACK) and tcp.acknowledgement == flow.acked[path]
    return tcp.sequence == flow.acked[other(path)]
