# SPDX-License-Identifier: Apache-2.0
"""What packets do to the flows they belong to: opening them, moving their state on, ending them.

The receiver has the last word about a TCP segment, so each one of a live flow passes. But what may
be forged by somebody who does not see the connection must not open, close or blind it: numbers
have to fit what was seen before.
"""

from __future__ import annotations

from typing import Final

from vgw.abi import FlowState, Path
from vgw.policy.flows import Flow, other
from vgw.policy.model import ICMP, ICMPV6, TCP, UDP
from vgw.policy.packet_fields import ACK, FIN, RST, SYN, Packet, Quoted, Tcp

#: The widest window there is (RFC 7323, 2.3).
WINDOW_MAX: Final = 1 << 30
#: How far an acknowledgement may be overtaken by others.
ACK_SLACK: Final = 1 << 20
#: How late an ICMP error may quote what was acknowledged since.
QUOTE_SLACK: Final = 1 << 16
#: The payload of a segment in fragments, of which only the first one shows numbers: at most this.
FRAGMENTED_PAYLOAD: Final = 65535

_FIRST_STATE: Final = {
    TCP: FlowState.TCP_SYN,
    UDP: FlowState.UDP_SINGLE,
    ICMP: FlowState.ICMP,
    ICMPV6: FlowState.ICMP,
}
_BOTH_FINS: Final = 1 << Path.TO_VM | 1 << Path.FROM_VM
_MODULUS: Final = 1 << 32


def open_flow(packet: Packet, path: Path, generation: int, now_ns: int) -> Flow:
    """Return the flow that a packet opens, once it is accepted."""
    state = _FIRST_STATE.get(packet.protocol or 0, FlowState.OTHER)
    if packet.icmp is None and state is FlowState.ICMP:
        state = FlowState.OTHER  # ICMP's number over the other family is a protocol like any
    flow = Flow(path, state, generation, now_ns)
    flow.packets[path] = 1
    if packet.tcp is not None:
        _begin(flow, packet.tcp, path, _end_of(packet, packet.tcp))
    return flow


def take_over(packet: Packet, path: Path, opener: Path, generation: int, now_ns: int) -> Flow:
    """Return the flow of a TCP connection that was open before its first segment was seen."""
    flow = Flow(opener, FlowState.TCP_ESTABLISHED, generation, now_ns, half_open=False)
    flow.packets[path] = 1
    if packet.tcp is not None:
        flow.acked[path] = packet.tcp.acknowledgement
        flow.end[path] = _end_of(packet, packet.tcp)
        flow.acked[other(path)] = packet.tcp.sequence
        flow.end[other(path)] = packet.tcp.acknowledgement
        flow.fins = bool(packet.tcp.flags & FIN) << path
    return flow


def likely_opener(packet: Packet, path: Path) -> Path:
    """Return who opened a connection that nobody saw begin: servers have the lower port."""
    return other(path) if packet.source_port < packet.destination_port else path


def may_be_reused(flow: Flow, packet: Packet) -> bool:
    """Tell whether a TCP packet starts a new connection in place of a finished one."""
    finished = flow.state in {FlowState.TCP_FIN, FlowState.TCP_CLOSED}
    return finished and packet.tcp is not None and is_opening(packet.tcp)


def is_opening(tcp: Tcp) -> bool:
    """Tell whether a segment asks for a new connection."""
    return tcp.flags & (SYN | ACK) == SYN


def track(flow: Flow, packet: Packet, path: Path, now_ns: int) -> None:
    """Take note of an accepted packet of a live flow."""
    if packet.tcp is not None:
        if not _track_tcp(flow, packet, packet.tcp, path):
            return
    elif flow.state is FlowState.TCP_CLOSED:
        return  # a fragment: nothing keeps a closed connection
    if flow.state is FlowState.UDP_SINGLE and path is not flow.opener:
        flow.state = FlowState.UDP_REPLIED
    is_tcp = flow.state in {FlowState.TCP_SYN, FlowState.TCP_CLOSED}
    if not is_tcp and (path is not flow.opener or flow.state is FlowState.TCP_ESTABLISHED):
        flow.half_open = False
    flow.packets[path] += 1
    flow.last_seen_ns = now_ns


def quotes_what_is_sent(flow: Flow, quoted: Quoted, path: Path) -> bool:
    """Tell whether an ICMP error on `path` quotes something of the flow that may be on its way.

    Only TCP has numbers by which a guess can be told (RFC 5927).
    """
    if quoted.protocol != TCP:
        return True
    first = flow.acked[path] - QUOTE_SLACK
    return _in_range(quoted.tcp_sequence, first, flow.end[other(path)])


def _track_tcp(flow: Flow, packet: Packet, tcp: Tcp, path: Path) -> bool:
    """Move the state of a TCP flow; returns False for a segment that must not change anything.

    Such a one may be forged. It passes, for the receiver knows better, but cannot shorten or
    lengthen the life of the flow.
    """
    if flow.state is FlowState.TCP_CLOSED:
        return False
    if tcp.flags & RST:
        is_exact = _reset_is_exact(flow, tcp, path)
        if is_exact:
            flow.state = FlowState.TCP_CLOSED
        return is_exact
    if flow.state is FlowState.TCP_SYN:
        counts = _track_handshake(flow, packet, tcp, path)
    else:
        counts = not is_opening(tcp)
    if counts and flow.state is not FlowState.TCP_SYN:
        _track_open(flow, tcp, path, _end_of(packet, tcp))
    return counts


def _track_handshake(flow: Flow, packet: Packet, tcp: Tcp, path: Path) -> bool:
    """Take note of a segment of a flow that is not open yet; returns whether it counts."""
    if tcp.flags & SYN:
        return _track_syn(flow, tcp, path, _end_of(packet, tcp))
    if not _answers_syn(flow, tcp, path):
        return False
    if path is not flow.opener:
        return True
    is_answered = flow.packets[other(path)] > 0
    if is_answered:
        flow.state = FlowState.TCP_ESTABLISHED
    return is_answered


def _track_syn(flow: Flow, tcp: Tcp, path: Path, end: int) -> bool:
    """Take note of a SYN of either side while the flow is not open yet."""
    if path is flow.opener:
        is_another = (tcp.sequence + 1) % _MODULUS != flow.acked[other(path)]
        if is_opening(tcp) and is_another:  # it began anew within the life of its last attempt
            _begin(flow, tcp, path, end)
        return True
    if tcp.flags & ACK and not _answers_syn(flow, tcp, path):
        return False
    flow.end[path] = end
    flow.acked[other(path)] = (tcp.sequence + 1) % _MODULUS
    return True


def _track_open(flow: Flow, tcp: Tcp, path: Path, end: int) -> None:
    """Move the numbers of an open flow on, and its state where a FIN says so."""
    is_ahead = _is_ahead(end, flow.acked[other(path)])
    oldest = flow.acked[path] - ACK_SLACK
    is_plausible = _in_range(tcp.acknowledgement, oldest, flow.end[other(path)])
    if is_ahead and _is_ahead(end, flow.end[path]):
        flow.end[path] = end
    is_newer = 0 < (tcp.acknowledgement - flow.acked[path]) % _MODULUS < _MODULUS // 2
    if is_plausible and is_newer:
        flow.acked[path] = tcp.acknowledgement
    if tcp.flags & FIN and is_ahead and is_plausible:
        flow.fins |= 1 << path
        if flow.fins == _BOTH_FINS:
            flow.state = FlowState.TCP_FIN


def _reset_is_exact(flow: Flow, tcp: Tcp, path: Path) -> bool:
    """Tell whether a reset is one that its receiver heeds (RFC 5961; RFC 9293, 3.10.7.3)."""
    expected = flow.acked[other(path)]
    if flow.state is not FlowState.TCP_SYN:
        return tcp.sequence == expected
    if path is flow.opener:
        return _in_range(tcp.sequence, expected, flow.end[path])
    return bool(tcp.flags & ACK) and _answers_syn(flow, tcp, path)


def _answers_syn(flow: Flow, tcp: Tcp, path: Path) -> bool:
    """Tell whether a segment acknowledges the other side's SYN, with or without its data."""
    return _in_range(tcp.acknowledgement, flow.acked[path], flow.end[other(path)])


def _begin(flow: Flow, tcp: Tcp, opener: Path, end: int) -> None:
    """Set the first numbers of a flow, as if the other side had acknowledged the SYN."""
    flow.acked = {other(opener): (tcp.sequence + 1) % _MODULUS, opener: 0}
    flow.end = {opener: end, other(opener): 0}


def _end_of(packet: Packet, tcp: Tcp) -> int:
    """Return the number behind the last byte of a segment, SYN and FIN included."""
    payload = tcp.payload if packet.fragment is None else FRAGMENTED_PAYLOAD
    return (tcp.sequence + payload + bool(tcp.flags & SYN) + bool(tcp.flags & FIN)) % _MODULUS


def _is_ahead(end: int, of: int) -> bool:
    """Tell whether a number lies behind another, within a window."""
    return 0 < (end - of) % _MODULUS <= WINDOW_MAX


def _in_range(value: int, first: int, last: int) -> bool:
    """Tell whether a number is one of those from `first` to `last`, all modulo 2^32."""
    return (value - first) % _MODULUS <= (last - first) % _MODULUS
