# SPDX-License-Identifier: Apache-2.0
"""Records of events: what they say, how they get into the log file and out of it again."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from vgw import abi
from vgw.controller.events import LogWriter, RuleName, control_record, event_record, read_log
from vgw.errors import VgwError

IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806


class FakeNames:
    """Knows one endpoint with one rule."""

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        return ("web01", "tap-web01") if endpoint == 7 else None

    def rule(self, endpoint: int, generation: int, path: abi.Path, rule: int) -> RuleName | None:
        is_known = (endpoint, generation, path, rule) == (7, 4, abi.Path.TO_VM, 3)
        return RuleName("web-tier", "group", "site") if is_known else None


def event(**fields: Any) -> abi.Event:
    made = abi.Event(
        time_ns=5_000_001_999,
        endpoint=7,
        generation=4,
        rule=abi.NO_RULE,
        length=74,
        abi=abi.ABI_VERSION,
        ethertype=IPV4,
        path=abi.Path.TO_VM,
        verdict=abi.Verdict.DROP,
        reason=abi.Reason.DEFAULT,
    )
    for name, value in fields.items():
        if name in ("source", "destination"):
            setattr(made, name, abi.pack_address(ipaddress.ip_address(value)))
        elif name.endswith("_port"):
            setattr(made, name, abi.be16(value))
        else:
            setattr(made, name, value)
    return made


def record(**fields: Any) -> dict[str, Any]:
    return event_record(event(**fields), FakeNames(), 1_700_000_000_000_000_000)


def packet(**fields: Any) -> dict[str, Any]:
    """Return what a record says besides what the test event always has."""
    always = ("ts", "event", "vm", "interface", "direction", "verdict", "reason", "generation")
    return {k: v for k, v in record(**fields).items() if k not in (*always, "length")}


def test_record_of_a_rule() -> None:
    assert list(
        record(
            verdict=abi.Verdict.ACCEPT,
            reason=abi.Reason.RULE,
            rule=3,
            protocol=6,
            source="192.0.2.1",
            destination="10.20.0.11",
            source_port=40000,
            destination_port=443,
            tcp_flags=0x12,
        ).items()
    ) == [
        ("ts", "2023-11-14T22:13:25.000001Z"),
        ("event", "accept"),
        ("vm", "web01"),
        ("interface", "tap-web01"),
        ("direction", "ingress"),
        ("verdict", "accept"),
        ("reason", "RULE"),
        ("policy", "web-tier"),
        ("tier", "group"),
        ("rule", "site"),
        ("generation", 4),
        ("proto", "tcp"),
        ("src", "192.0.2.1"),
        ("dst", "10.20.0.11"),
        ("sport", 40000),
        ("dport", 443),
        ("tcp_flags", "SA"),
        ("length", 74),
    ]


def test_a_rule_is_that_of_the_path_that_opened_the_flow() -> None:
    assert record(rule=3, path=abi.Path.FROM_VM, rule_path=abi.Path.TO_VM)["rule"] == "site"
    assert "rule" not in record(rule=3, path=abi.Path.TO_VM, rule_path=abi.Path.FROM_VM)
    assert "rule" not in record(rule=3, generation=5)


@pytest.mark.parametrize(
    ("verdict", "kind", "word"),
    [
        (abi.Verdict.ACCEPT, "accept", "accept"),
        (abi.Verdict.DROP, "drop", "drop"),
        (abi.Verdict.REJECT, "drop", "reject"),
        (abi.Verdict.WOULD_DROP, "drop", "would_drop"),
    ],
)
def test_verdicts(verdict: abi.Verdict, kind: str, word: str) -> None:
    made = record(verdict=verdict, path=abi.Path.FROM_VM)

    assert (made["event"], made["verdict"], made["direction"]) == (kind, word, "egress")


ADDRESSES = {"source": "10.0.0.1", "destination": "10.0.0.2"}
SHOWN = {"src": "10.0.0.1", "dst": "10.0.0.2"}


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        pytest.param({"ethertype": 0}, {}, id="nothing was read"),
        pytest.param({"ethertype": 0x88CC}, {"proto": "0x88cc"}, id="other ethertype"),
        pytest.param(
            {"ethertype": ARP, **ADDRESSES, "protocol": 6, "source_port": 1},
            {"proto": "arp", **SHOWN},
            id="arp has no ports",
        ),
        pytest.param({"reason": abi.Reason.TRUNCATED}, {"proto": "ipv4"}, id="cut in IPv4"),
        pytest.param(
            {"reason": abi.Reason.TRUNCATED, **ADDRESSES, "protocol": 6},
            {"proto": "tcp", **SHOWN},
            id="cut in TCP: ports unknown",
        ),
        pytest.param(
            {"reason": abi.Reason.PORT_ZERO, **ADDRESSES, "protocol": 17},
            {"proto": "udp", **SHOWN, "sport": 0, "dport": 0},
            id="zero ports that were read",
        ),
        pytest.param(
            {"reason": abi.Reason.TCP_FLAGS, **ADDRESSES, "protocol": 6, "source_port": 1},
            {"proto": "tcp", **SHOWN, "sport": 1, "dport": 0, "tcp_flags": ""},
            id="no TCP flag at all",
        ),
        pytest.param(
            {**ADDRESSES, "protocol": 132, "source_port": 1, "destination_port": 2},
            {"proto": "sctp", **SHOWN, "sport": 1, "dport": 2},
            id="sctp",
        ),
        pytest.param(
            {**ADDRESSES, "protocol": 1, "source_port": 99, "destination_port": 99},
            {"proto": "icmp", **SHOWN, "icmp_type": 0, "icmp_code": 0},
            id="echo reply, whose identifier is no port",
        ),
        pytest.param(
            {"reason": abi.Reason.TRUNCATED, **ADDRESSES, "protocol": 1},
            {"proto": "icmp", **SHOWN},
            id="cut in ICMP: type unknown",
        ),
        pytest.param(
            {"ethertype": IPV6, "source": "::", "destination": "ff02::1", "protocol": 58}
            | {"icmp_type": 135, "reason": abi.Reason.SPOOF_ND},
            {"proto": "icmpv6", "src": "::", "dst": "ff02::1", "icmp_type": 135, "icmp_code": 0},
            id="an unspecified source was read",
        ),
        pytest.param({**ADDRESSES, "protocol": 112}, {"proto": 112, **SHOWN}, id="number"),
    ],
)
def test_only_what_was_read_is_in_the_record(fields: dict[str, Any], shown: dict[str, Any]) -> None:
    assert packet(**fields) == shown


def test_tcp_flags_are_letters() -> None:
    shown = [packet(protocol=6, source_port=1, tcp_flags=1 << bit)["tcp_flags"] for bit in range(8)]
    assert shown == list("FSRPAUEC")


def test_names_nobody_knows_are_left_out() -> None:
    made = record(endpoint=99, rule=3, reason=abi.Reason.RULE)

    assert not {"vm", "interface", "policy", "tier", "rule"} & set(made)
    assert made["reason"] == "RULE"


def flow_record(kind: abi.EventKind, **fields: Any) -> dict[str, Any]:
    made = abi.FlowEvent(
        event=event(
            kind=kind,
            verdict=abi.Verdict.ACCEPT,
            protocol=6,
            source="192.0.2.10",
            destination="10.20.0.11",
            source_port=40112,
            destination_port=443,
            **fields,
        ),
        created_ns=2_000_000_000,
        last_seen_ns=4_500_900_000,
    )
    made.packets[:] = 5, 7
    made.bytes[:] = 500, 90_000
    return event_record(made, FakeNames(), 0)


def test_the_record_of_a_flow_that_ended_says_how_much_it_was_and_why() -> None:
    made = flow_record(
        abi.EventKind.FLOW_END, end=abi.FlowEnd.CLOSED, state=abi.FlowState.TCP_FIN, rule=3
    )
    assert made == {
        "ts": "1970-01-01T00:00:05.000001Z",
        "event": "flow_end",
        "vm": "web01",
        "interface": "tap-web01",
        "direction": "ingress",
        "verdict": "accept",
        "reason": "DEFAULT",
        "policy": "web-tier",
        "tier": "group",
        "rule": "site",
        "generation": 4,
        "proto": "tcp",
        "src": "192.0.2.10",
        "dst": "10.20.0.11",
        "sport": 40112,
        "dport": 443,
        "packets": 12,
        "packets_ingress": 5,
        "packets_egress": 7,
        "bytes": 90_500,
        "bytes_ingress": 500,
        "bytes_egress": 90_000,
        "duration_ms": 2500,
        "state": "tcp_fin",
        "ended": "closed",
    }


def test_the_record_of_a_flow_that_begins_has_nothing_to_count() -> None:
    made = flow_record(abi.EventKind.FLOW_START)
    assert made["event"] == "flow_start"
    assert made["dport"] == 443
    assert not {"packets", "bytes", "duration_ms", "state", "ended", "length"} & set(made)


def test_the_record_of_a_ping_has_its_identifier() -> None:
    made = event_record(
        abi.FlowEvent(event=event(kind=abi.EventKind.FLOW_START, protocol=1, source_port=7)),
        FakeNames(),
        0,
    )
    assert (made["proto"], made["icmp_id"]) == ("icmp", 7)
    assert "sport" not in made


def test_control_record_leaves_out_what_is_none() -> None:
    made = control_record("attach", vm="web01", interface=None, generation=0)

    assert made.pop("ts").endswith("Z")
    assert made == {"event": "attach", "vm": "web01", "generation": 0}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogWriter]:
    writer = LogWriter(tmp_path / "log" / "events.jsonl")
    yield writer
    writer.close()


@pytest.fixture
def path(log: LogWriter, tmp_path: Path) -> Path:  # noqa: ARG001 - the writer makes the file
    return tmp_path / "log" / "events.jsonl"


def numbers(path: Path) -> list[int]:
    return [found["n"] for found in read_log(path)]


def test_log_has_mode_0640_and_gets_records_by_flush(log: LogWriter, path: Path) -> None:
    log.add({"n": 1})
    assert numbers(path) == []
    log.flush()
    log.add({"n": 2, "vm": "evil\n\x1b[31m"})
    log.flush()

    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert numbers(path) == [1, 2]
    assert path.read_bytes().count(b"\n") == 2
    assert b"\x1b" not in path.read_bytes()


def test_log_goes_on_in_a_new_file_after_rotation(log: LogWriter, path: Path) -> None:
    log.add({"n": 1})
    log.flush()
    rotated = path.rename(path.with_suffix(".1"))
    log.add({"n": 2})
    log.flush()
    log.reopen()
    log.add({"n": 3})
    log.flush()

    assert (numbers(rotated), numbers(path)) == ([1, 2], [3])


def test_log_keeps_the_old_file_when_there_can_be_no_new_one(log: LogWriter, path: Path) -> None:
    rotated = path.rename(path.with_suffix(".1"))
    path.mkdir()
    log.reopen()
    log.add({"n": 1})
    log.flush()

    assert numbers(rotated) == [1]


def test_log_that_a_dead_writer_left_inside_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n":1}\n{"n":')
    log = LogWriter(path)
    log.add({"n": 2})
    log.close()

    assert numbers(path) == [1, 2]


def test_full_disk_is_counted_and_a_line_cut_short_is_closed(
    log: LogWriter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 12
    real_write = os.write

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real_write(fd, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr("vgw.controller.log_file.os.write", write)
    for n in (1, 2, 3):
        log.add({"n": n})
    log.flush()
    log.add({"n": 4})
    log.flush()
    assert log.losses() == {"file": 3}

    room = 1000
    log.add({"n": 5})
    log.flush()
    assert numbers(path) == [1, 5]


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VgwError, match=r"cannot write the log .*VGW_LOG"):
        LogWriter(tmp_path / "file" / "events.jsonl")


def test_read_log_of_one_vm_keeps_losses_that_may_be_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        '{"n":1,"vm":"web01"}\n'
        '{"n":2,"vm":"db01"}\n'
        '{"n":3,"event":"lost","cause":"reader"}\n'
        '{"n":4,"event":"lost","cause":"suppressed","vm":"db01"}\n'
        '{"n":5,"event":"start"}\n'
        "not json\n[]\n\n"
        '{"n":6,"vm":"web01"}\n'
        '{"n":7,"vm":"we'
    )

    assert [found["n"] for found in read_log(path, "web01")] == [1, 3, 6]
    assert [found["n"] for found in read_log(path)] == [1, 2, 3, 4, 5, 6]
    assert [found["n"] for found in read_log(path, "web01", last=2)] == [3, 6]
    assert [found["n"] for found in read_log(path, last=0)] == []


def test_read_log_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match="there is no log"):
        next(read_log(tmp_path / "events.jsonl"))


def test_follow_survives_rotation_and_lines_that_come_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause of the follower lets the next thing happen to the file."""
    path = tmp_path / "events.jsonl"
    rotated = tmp_path / "events.jsonl.1"

    def append(file: Path, text: str) -> None:
        with file.open("a") as stream:
            stream.write(text)

    happenings: Iterator[Callable[[], object]] = iter(
        [
            lambda: append(path, '{"n":1}\n{"n":2}\n{"n'),
            lambda: append(path, '":3}\n'),
            lambda: path.rename(rotated),
            path.touch,
            lambda: append(rotated, '{"n":4}\n'),
            lambda: append(path, '{"n":5}\n'),
            lambda: path.write_text(""),
            lambda: append(path, '{"n":6}\n'),
            path.unlink,
            lambda: append(path, '{"n":7}\n'),
        ]
    )
    monkeypatch.setattr("vgw.controller.events.time.sleep", lambda _: next(happenings)())

    found = [found["n"] for found in islice(read_log(path, follow=True), 7)]

    assert found == [1, 2, 3, 4, 5, 6, 7]


def test_follow_begins_with_the_last_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f'{{"n":{n}}}\n' for n in range(9)))

    def append(_: float) -> None:
        with path.open("a") as stream:
            stream.write('{"n":9}\n')

    monkeypatch.setattr("vgw.controller.events.time.sleep", append)

    assert [r["n"] for r in islice(read_log(path, follow=True, last=2), 3)] == [7, 8, 9]


def test_records_from_many_threads_are_whole(log: LogWriter, path: Path) -> None:
    def write(first: int) -> None:
        for n in range(first, first + 200):
            log.add({"n": n})
            log.flush()

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 800, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == list(
        range(800)
    )
