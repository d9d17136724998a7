# SPDX-License-Identifier: Apache-2.0
"""Records of the event log: how one is made from a kernel event, written to the file and read.

A record is a JSON object on a line of its own with the keys `ts, event, vm, interface, direction,
verdict, reason, policy, tier, rule, generation, proto, src, sport, dst, dport, icmp_type,
icmp_code, tcp_flags, length`; what does not apply or was not read is left out. Those of flows have
`icmp_id, packets, packets_ingress, packets_egress`, the same of `bytes`, `duration_ms, state` and
`ended` in place of the last four.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from vgw import abi
from vgw.controller.log_file import FileSink, open_rotated
from vgw.controller.log_sink import DRAIN_SECONDS, Entry, Sink, SinkThread
from vgw.controller.log_text import cut
from vgw.errors import VgwError
from vgw.policy.model import DIRECTION_OF_PATH, ICMP_PROTOCOLS, PORT_PROTOCOLS, TCP

Record = dict[str, Any]

FOLLOW_SECONDS: Final = 0.2
_READ_BYTES: Final = 1 << 16
_IPV4, _IPV6 = 0x0800, 0x86DD
_ETHERTYPES: Final = {0x0806: "arp", 0x8035: "rarp", _IPV4: "ipv4", _IPV6: "ipv6"}
_PROTOCOLS: Final = {
    1: "icmp",
    2: "igmp",
    6: "tcp",
    17: "udp",
    47: "gre",
    50: "esp",
    51: "ah",
    58: "icmpv6",
    132: "sctp",
}
_TCP_FLAGS: Final = "FSRPAUEC"
_UNREAD: Final = bytes(16)


class RuleName(NamedTuple):
    """What the rule number of an event stands for."""

    policy: str
    tier: str
    rule: str


class Names(Protocol):
    """What the numbers in an event stand for; None when nobody knows any more."""

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        """Return the VM and the interface of an endpoint's identity."""

    def rule(self, endpoint: int, generation: int, path: abi.Path, rule: int) -> RuleName | None:
        """Return the name of a rule by its number in the policy of a generation on a path."""


def timestamp(time_ns: int) -> str:
    """Return nanoseconds since 1970 as RFC 3339 in UTC with microseconds."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06d}Z"


def control_record(event: str, **fields: object) -> Record:
    """Return the record of something the controller did now; fields that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    return {"ts": timestamp(time.time_ns()), "event": event, **known}


def event_record(event: abi.Event | abi.FlowEvent, names: Names, clock_offset_ns: int) -> Record:
    """Return the record of a kernel event that event_decoder.decode() let pass.

    `clock_offset_ns` is what must be added to CLOCK_MONOTONIC to get the time of day.
    """
    if isinstance(event, abi.FlowEvent):
        kind = abi.EventKind(event.event.kind)
        record = _judged(event.event, kind.name.lower(), names, clock_offset_ns)
        record.update(_flow_fields(event))
        return record
    name = "accept" if event.verdict == abi.Verdict.ACCEPT else "drop"
    record = _judged(event, name, names, clock_offset_ns)
    record.update(_packet_fields(event, abi.Reason(event.reason)))
    record["length"] = event.length
    return record


def _judged(event: abi.Event, name: str, names: Names, clock_offset_ns: int) -> Record:
    """Return what all kernel events tell: when, where, and by what it was judged."""
    record: Record = {"ts": timestamp(event.time_ns + clock_offset_ns), "event": name}
    where = names.endpoint(event.endpoint)
    if where is not None:
        record["vm"], record["interface"] = where
    record["direction"] = DIRECTION_OF_PATH[abi.Path(event.path)].value
    record["verdict"] = abi.Verdict(event.verdict).name.lower()
    record["reason"] = abi.Reason(event.reason).name
    rule = _rule(event, names)
    if rule is not None:
        record["policy"], record["tier"], record["rule"] = rule
    record["generation"] = event.generation
    return record


def _rule(event: abi.Event, names: Names) -> RuleName | None:
    """Return the rule that decided, if one did and its name is known.

    A packet of an older policy's flow is judged by the policy on the path that opened it.
    """
    if event.rule == abi.NO_RULE:
        return None
    path = abi.Path(event.rule_path)
    return names.rule(event.endpoint, event.generation, path, event.rule)


def _flow_fields(flow: abi.FlowEvent) -> Record:
    """Return who a flow is between, and of one that ended how much of it there was, and why."""
    event = flow.event
    fields: Record = {
        "proto": _PROTOCOLS.get(event.protocol, event.protocol),
        "src": _address(bytes(event.source.bytes)),
        "dst": _address(bytes(event.destination.bytes)),
    }
    if event.protocol in PORT_PROTOCOLS:
        fields["sport"] = abi.be16(event.source_port)
        fields["dport"] = abi.be16(event.destination_port)
    elif event.protocol in ICMP_PROTOCOLS:
        fields["icmp_id"] = abi.be16(event.source_port)
    if event.kind == abi.EventKind.FLOW_START:
        return fields
    for name, counts in (("packets", flow.packets), ("bytes", flow.bytes)):
        fields[name] = sum(counts)
        for path, direction in DIRECTION_OF_PATH.items():
            fields[f"{name}_{direction}"] = counts[path]
    fields["duration_ms"] = max(flow.last_seen_ns - flow.created_ns, 0) // 1_000_000
    if event.state != abi.FlowState.DEAD:
        fields["state"] = abi.FlowState(event.state).name.lower()
    fields["ended"] = abi.FlowEnd(event.end).name.lower()
    return fields


def _packet_fields(event: abi.Event, reason: abi.Reason) -> Record:
    """Return what is known of the packet itself.

    The program zeroes what it did not read, so zeros are left out unless they were read for sure.
    """
    fields: Record = {}
    if event.ethertype:
        fields["proto"] = _protocol(event.ethertype, event.protocol)
    source, destination = bytes(event.source.bytes), bytes(event.destination.bytes)
    if source != _UNREAD or destination != _UNREAD:
        fields["src"], fields["dst"] = _address(source), _address(destination)
    if event.ethertype not in (_IPV4, _IPV6):
        return fields
    if event.protocol in PORT_PROTOCOLS:
        ports = event.source_port, event.destination_port
        if any(ports) or reason is abi.Reason.PORT_ZERO:
            fields["sport"], fields["dport"] = map(abi.be16, ports)
            if event.protocol == TCP:
                fields["tcp_flags"] = _tcp_flags(event.tcp_flags)
    elif event.protocol in ICMP_PROTOCOLS and _icmp_was_read(event, reason):
        fields["icmp_type"], fields["icmp_code"] = event.icmp_type, event.icmp_code
    return fields


def _icmp_was_read(event: abi.Event, reason: abi.Reason) -> bool:
    """Tell whether type 0, code 0 is an echo reply or a header that was not read."""
    cut_short = abi.Reason.TRUNCATED <= reason <= abi.Reason.EXTENSION_HEADER
    return bool(event.icmp_type or event.icmp_code) or not cut_short


def _protocol(ethertype: int, protocol: int) -> str | int:
    """Return a name; the number of an IP protocol without one; 0x.... for other EtherTypes."""
    if ethertype in (_IPV4, _IPV6) and protocol:
        return _PROTOCOLS.get(protocol, protocol)
    return _ETHERTYPES.get(ethertype, f"0x{ethertype:04x}")


@functools.lru_cache(maxsize=256)
def _tcp_flags(flags: int) -> str:
    return "".join(letter for bit, letter in enumerate(_TCP_FLAGS) if flags >> bit & 1)


@functools.lru_cache(maxsize=4096)
def _address(raw: bytes) -> str:
    return str(abi.unpack_address(abi.Address.from_buffer_copy(raw)))


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


class LogWriter:
    """Hands records to the sinks of the log; safe to use from several threads.

    No sink waits for another, and nobody for a sink that is slow or away: see log_sink.py.
    """

    def __init__(self, first: Path | Sink, *more: Sink) -> None:
        """Begin to feed sinks; a path is a file of JSON lines. Raises VgwError for that."""
        sinks = (FileSink(first) if isinstance(first, Path) else first, *more)
        self._sinks = [SinkThread(sink) for sink in sinks]

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a record; it is where it belongs after the next flush."""
        kept = {
            key: cut(value) if isinstance(value, str) else value for key, value in record.items()
        }
        entry = Entry(kept, json.dumps(kept, separators=(",", ":")) + "\n")
        for sink in self._sinks:
            sink.add(entry)

    def kick(self) -> None:
        """Have the records that wait written, without waiting for that."""
        for sink in self._sinks:
            sink.kick()

    def flush(self) -> None:
        """Have the records that wait written; return soon, even where a sink does not take them."""
        deadline = time.monotonic() + DRAIN_SECONDS
        for sink, wanted in [(sink, sink.kick()) for sink in self._sinks]:
            sink.drain(wanted, deadline)

    def losses(self) -> dict[str, int]:
        """Return how many records were lost, by the kind of the sink that lost them."""
        lost: Counter[str] = Counter()
        for sink in self._sinks:
            lost[sink.kind] += sink.lost
        return dict(lost)

    def reopen(self) -> None:
        """Have the sinks begin anew from the next flush on: the file was rotated away."""
        for sink in self._sinks:
            sink.reopen()

    def close(self) -> None:
        """Write what waits and give the sinks back."""
        for sink in self._sinks:
            sink.kick()
        for sink in self._sinks:
            sink.close()


def read_log(
    path: Path,
    vm: str | None = None,
    follow: bool = False,
    last: int | None = None,
    events: Collection[str] = (),
) -> Iterator[Record]:
    """Yield the records of a log file, oldest first, and with `follow` those to come.

    What was rotated away to `path`.1, .2 and so on comes before it. With `vm` only the records of
    that VM, and those of losses that may have been its own; with `events` only those of these
    kinds; with `last` only so many of those that are there already. A file that is rotated is read
    to its end before the new one; lines that are no record (cut short by a full disk or still being
    written) are passed over. Raises VgwError when the file cannot be read; with `follow` a file
    that does not exist is waited for.
    """
    held = None if last is None else deque[Record](maxlen=last)
    for line in _lines(path, follow):
        if line is None:
            yield from held or ()
            held = None
            continue
        record = _record_for(vm, line)
        if record is None or (events and record.get("event") not in events):
            continue
        if held is None:
            yield record
        else:
            held.append(record)


def _record_for(vm: str | None, line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    owner = record.get("vm")
    wanted = vm is None or owner == vm or (owner is None and record.get("event") == "lost")
    return record if wanted else None


def _lines(path: Path, follow: bool) -> Iterator[bytes | None]:
    """Yield lines, and None once: where the end of the file was first met."""
    file = _open_log(path, wait=follow)
    try:
        yield from _old_lines(path, file)
        rest = b""
        caught_up = False
        while True:
            block = file.read(_READ_BYTES)
            if block:
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
                continue
            if not follow:
                yield rest
            if not caught_up:
                caught_up = True
                yield None
            if not follow:
                return
            if _was_replaced(file, path):
                file.close()
                file, rest = _open_log(path, wait=True), b""
            else:
                time.sleep(FOLLOW_SECONDS)
    finally:
        file.close()


def _old_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of what was rotated away, but for `file`, if that was just now."""
    opened = open_rotated(path)
    try:
        for old in opened:
            if not os.path.sameopenfile(old.fileno(), file.fileno()):
                with open(old.fileno(), "rb", closefd=False) as buffered:
                    yield from buffered
    finally:
        for old in opened:
            old.close()


def _open_log(path: Path, *, wait: bool) -> BinaryIO:
    while True:
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError as error:
            if not wait:
                raise VgwError(
                    f"there is no log {path}; `vgw controller` writes it, VGW_LOG says where"
                ) from error
            time.sleep(FOLLOW_SECONDS)
        except OSError as error:
            raise VgwError(f"cannot read the log {path}: {error.strerror}") from error


def _was_replaced(file: BinaryIO, path: Path) -> bool:
    """Tell whether to go on in another file: this one is at its end and was rotated or cut.

    The new file counts once it has content, for the writer may go on in the old one until it is
    told of the rotation.
    """
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(file.fileno())
    if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
        return there.st_size < file.tell()
    return there.st_size > 0 and here.st_size <= file.tell()
