# SPDX-License-Identifier: Apache-2.0
"""Where the log goes: each sink gets every record as one, and none waits for another."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.controller import receivers
from tests.controller.process import eventually
from tests.controller.receivers import (
    BusyboxSyslogd,
    Journald,
    Receiver,
    parse_journal,
    parse_syslog,
    running,
)
from tests.patience import PATIENCE
from vgw.controller import events, log_sink
from vgw.controller.events import LogWriter, read_log
from vgw.controller.log_choice import LogOptions, open_sinks
from vgw.controller.log_file import FileSink
from vgw.controller.log_journal import JournalSink
from vgw.controller.log_sink import Entry, Written
from vgw.controller.log_syslog import SyslogSink
from vgw.controller.log_text import LONGEST_TEXT, cut, escaped, record_text
from vgw.errors import VgwError

DROP = {
    "ts": "2024-05-04T12:30:01.512351Z",
    "event": "drop",
    "vm": "web01",
    "interface": "tap-web01",
    "direction": "ingress",
    "verdict": "drop",
    "reason": "RULE",
    "policy": "guardrails",
    "tier": "admin",
    "rule": "no-telnet",
    "generation": 3,
    "proto": "tcp",
    "src": "192.0.2.10",
    "dst": "10.20.0.11",
    "sport": 40112,
    "dport": 23,
    "tcp_flags": "S",
    "length": 74,
}
DROP_TEXT = (
    "web01/tap-web01  ingress  drop  RULE  admin/guardrails/no-telnet  "
    "tcp 192.0.2.10:40112 > 10.20.0.11:23 S"
)
ENDED = {
    **DROP,
    "event": "flow_end",
    "verdict": "accept",
    "packets": 12,
    "bytes": 900,
    "duration_ms": 2500,
    "ended": "closed",
}
#: What names and texts may have in them to look like another record, or to play with a terminal.
HOSTILE = (
    'web\n{"ts":"2024-05-04T12:30:01.512351Z","event":"accept","vm":"forged"}',
    "web\r\n<30>1 2024-05-04T12:30:01.512351Z host vgw 1 accept - forged",
    'web"] [forged@1 vm="x"] text',
    "web\nVGW_EVENT=accept\nMESSAGE=forged",
    "web\x00\x1b[2J\x1b]0;title\x07\x7f",
    "web\u0085\u2028\u2029\u202e\u200b\x9b31m",
    "web\udcff\\n\\",
    "%n%s%x ${PATH} $(id) `id`",
    "w" * (3 * LONGEST_TEXT),
    "",
)


@pytest.fixture
def writers() -> Iterator[Callable[..., LogWriter]]:
    made: list[LogWriter] = []

    def make(*sinks: Any) -> LogWriter:
        made.append(LogWriter(*sinks))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path / "journal", parse_journal)
    yield receiver
    receiver.close()


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path / "syslog", parse_syslog)
    yield receiver
    receiver.close()


MakeWriter = Callable[..., LogWriter]


# --- files --------------------------------------------------------------------------------


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_a_full_file_is_rotated_and_the_oldest_goes(tmp_path: Path, writers: MakeWriter) -> None:
    path = tmp_path / "events.jsonl"
    log = writers(FileSink(path, max_bytes=80, keep=2))
    for n in range(100, 140):
        log.add({"n": n})
        log.flush()

    files = {file.name: numbers(file) for file in tmp_path.iterdir()}
    assert set(files) == {"events.jsonl", "events.jsonl.1", "events.jsonl.2"}
    assert files["events.jsonl.2"] + files["events.jsonl.1"] + files["events.jsonl"] == list(
        range(140 - sum(map(len, files.values())), 140)
    )
    assert all(file.stat().st_size <= 80 for file in tmp_path.iterdir())
    assert len(files["events.jsonl.1"]) == 80 // len('{"n":100}\n')
    assert [found["n"] for found in read_log(path)] == [
        *files["events.jsonl.2"],
        *files["events.jsonl.1"],
        *files["events.jsonl"],
    ]
    assert [found["n"] for found in read_log(path, last=10)] == list(range(130, 140))


def test_many_records_at_once_are_rotated_where_they_belong(
    tmp_path: Path, writers: MakeWriter
) -> None:
    path = tmp_path / "events.jsonl"
    log = writers(FileSink(path, max_bytes=100, keep=1000))
    for n in range(100, 400):
        log.add({"n": n})
    log.flush()

    assert [found["n"] for found in read_log(path)] == list(range(100, 400))
    assert len(list(tmp_path.iterdir())) == 30


def test_a_record_longer_than_a_file_has_one_of_its_own(
    tmp_path: Path, writers: MakeWriter
) -> None:
    path = tmp_path / "events.jsonl"
    log = writers(FileSink(path, max_bytes=20, keep=3))
    for text in ("", "x" * 100, ""):
        log.add({"n": 1, "text": text})
    log.flush()

    assert len(list(tmp_path.iterdir())) == 3
    assert len(list(read_log(path))) == 3


def test_without_older_files_the_log_begins_anew(tmp_path: Path, writers: MakeWriter) -> None:
    path = tmp_path / "events.jsonl"
    log = writers(FileSink(path, max_bytes=30, keep=0))
    for n in range(100, 110):
        log.add({"n": n})
    log.flush()

    assert [file.name for file in tmp_path.iterdir()] == ["events.jsonl"]
    assert numbers(path)[-1] == 109


def test_where_nothing_can_be_rotated_the_file_grows(tmp_path: Path, writers: MakeWriter) -> None:
    path = tmp_path / "events.jsonl"
    (tmp_path / "events.jsonl.1").mkdir()
    (tmp_path / "events.jsonl.1" / "full").touch()
    log = writers(FileSink(path, max_bytes=30, keep=1))
    for n in range(100, 110):
        log.add({"n": n})
    log.flush()

    assert numbers(path) == list(range(100, 110))
    assert log.losses() == {"file": 0}


def test_the_size_of_a_file_that_was_there_counts(tmp_path: Path, writers: MakeWriter) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n":100}\n' * 3)
    log = writers(FileSink(path, max_bytes=30, keep=1))
    log.add({"n": 101})
    log.flush()

    assert numbers(path) == [101]


def test_following_goes_over_the_rotation(
    tmp_path: Path, writers: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause of the follower lets the log grow by a record, and be rotated every third."""
    path = tmp_path / "events.jsonl"
    log = writers(FileSink(path, max_bytes=30, keep=1))
    counter = iter(range(100, 200))

    def grow(_: float) -> None:
        log.add({"n": next(counter)})
        log.flush()

    monkeypatch.setattr("vgw.controller.events.time.sleep", grow)
    assert [r["n"] for r in islice(read_log(path, follow=True), 20)] == list(range(100, 120))


def test_a_follower_begins_with_what_was_rotated_away(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n":3}\n')
    path.with_name("events.jsonl.1").write_text('{"n":2}\n{"n')
    path.with_name("events.jsonl.2").write_text('{"n":1}\n')
    path.with_name("events.jsonl.4").write_text('{"n":0}\n')

    assert [found["n"] for found in read_log(path)] == [1, 2, 3]
    assert [r["n"] for r in islice(read_log(path, follow=True, last=2), 2)] == [2, 3]


def test_only_records_of_some_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        "".join(f'{{"event":"{name}"}}\n' for name in ("drop", "flow_end", "attach", "flow_end"))
    )
    found = [record["event"] for record in read_log(path, events=("flow_end", "attach"))]
    assert found == ["flow_end", "attach", "flow_end"]
    assert len(list(read_log(path, events=("flow_end",), last=1))) == 1


# --- the journal ---------------------------------------------------------------------------


def test_a_record_in_the_journal_has_its_fields(journal: Receiver, writers: MakeWriter) -> None:
    log = writers(JournalSink(str(journal.path)))
    log.add(DROP)
    log.flush()
    fields = journal.get()

    assert fields["MESSAGE"] == DROP_TEXT
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("5", "vgw")
    assert (fields["VGW_VM"], fields["VGW_REASON"], fields["VGW_DPORT"]) == ("web01", "RULE", "23")
    assert {name for name in fields if name.startswith("VGW_")} == {
        f"VGW_{key.upper()}" for key in DROP
    }


def test_a_large_record_comes_in_a_sealed_file(journal: Receiver, writers: MakeWriter) -> None:
    log = writers(JournalSink(str(journal.path)))
    large = {f"field_{number}": "x" * LONGEST_TEXT for number in range(60)}
    log.add({"event": "error", **large})
    log.flush()
    fields = journal.get()

    assert fields["VGW_FIELD_59"] == "x" * LONGEST_TEXT
    assert fields["PRIORITY"] == "3"
    assert log.losses() == {"journal": 0}


@pytest.mark.bpf  # needs root
def test_journald_has_the_records(writers: MakeWriter) -> None:
    daemon = Journald()
    with running(daemon):
        log = writers(JournalSink(str(daemon.socket)))
        for text in HOSTILE:
            log.add({**DROP, "vm": text})
        log.add({"event": "error", **{f"field_{n}": "x" * LONGEST_TEXT for n in range(60)}})
        log.flush()
        drops = eventually(
            "all are in the journal", lambda: _complete(daemon.records("drop"), len(HOSTILE))
        )
        (error,) = eventually("and the large one", lambda: daemon.records("error"))

    assert {record["_TRANSPORT"] for record in drops} == {"journal"}
    assert {record["VGW_REASON"] for record in drops} == {"RULE"}
    assert all(DROP_TEXT.partition("  ")[2] in _text(record["MESSAGE"]) for record in drops)
    assert error["VGW_FIELD_59"] == "x" * LONGEST_TEXT


def _complete(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return records if len(records) >= count else []


def _text(value: str | list[int]) -> str:
    """Return a value of journalctl, which gives those that are no plain text as bytes."""
    return value if isinstance(value, str) else bytes(value).decode()


# --- syslog --------------------------------------------------------------------------------


def check_drop(message: receivers.Syslog) -> None:
    assert (message.severity, message.facility) == (5, 3)
    assert (message.app, message.id, message.element) == ("vgw", "drop", "vgw@32473")
    assert message.parameters == {key: str(DROP[key]) for key in DROP if key != "ts"}
    assert message.text == DROP_TEXT


def test_a_record_by_a_unix_socket(syslog: Receiver, writers: MakeWriter) -> None:
    log = writers(SyslogSink(str(syslog.path)))
    log.add(DROP)
    log.flush()
    check_drop(syslog.get())


def test_a_record_by_a_stream(tmp_path: Path, writers: MakeWriter) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "log"))
        server.listen()
        log = writers(SyslogSink(str(tmp_path / "log")))
        log.add(DROP)
        log.add(DROP)
        log.flush()
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as lines:
            for line in islice(lines, 2):
                check_drop(parse_syslog(line.rstrip(b"\n")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_record_by_udp(host: str, writers: MakeWriter) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((host, 0))
        server.settimeout(PATIENCE)
        log = writers(SyslogSink(udp=(host, server.getsockname()[1])))
        log.add(DROP)
        log.flush()
        check_drop(parse_syslog(server.recv(65536)))


@pytest.mark.bpf  # needs root
def test_busybox_syslogd_has_a_line_for_each_record(tmp_path: Path, writers: MakeWriter) -> None:
    daemon = BusyboxSyslogd(tmp_path / "messages")
    with running(daemon):
        log = writers(SyslogSink(str(daemon.socket)))
        for text in HOSTILE[:-2]:  # it cuts long messages
            log.add({**DROP, "vm": text})
        log.flush()
        lines = eventually(
            "all arrived", lambda: [line for line in daemon.lines() if "vgw@32473" in line]
        )
        lines = eventually(
            "all arrived", lambda: lines if len(lines) >= len(HOSTILE) - 2 else daemon.lines()
        )
    ours = [line for line in lines if "vgw@32473" in line]
    assert len(ours) == len(HOSTILE) - 2
    assert len([line for line in lines if "forged" in line and "vgw@32473" not in line]) == 0


# --- hostile names and bytes ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["vm", "interface", "rule", "reason", "src", "event", "message"])
@pytest.mark.parametrize("text", HOSTILE)
def test_catalogue_N7_a_name_forges_no_record(  # noqa: PLR0917 (fixtures)
    key: str, text: str, tmp_path: Path, journal: Receiver, syslog: Receiver, writers: MakeWriter
) -> None:
    path = tmp_path / "events.jsonl"
    log = writers(path, JournalSink(str(journal.path)), SyslogSink(str(syslog.path)))
    record = {**DROP, key: text}
    log.add(record)
    log.flush()

    (line,) = path.read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n")
    assert json.loads(line) == {**record, key: cut(text)}
    fields = journal.get()
    assert journal.quiet(0.01)
    assert set(fields) == {
        *("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"),
        *(f"VGW_{name.upper()}" for name in record),
    }
    assert "\n" not in fields["MESSAGE"]
    message = syslog.get()
    assert syslog.quiet(0.01)
    assert set(message.parameters) == record.keys() - {"ts"}
    assert message.app == "vgw"


@pytest.mark.parametrize("text", HOSTILE)
def test_catalogue_N14_bytes_of_packets_are_escaped_and_cut(text: str) -> None:
    """In texts for people and terminals, as `vgw logs` and the sinks have them."""
    shown = record_text({"event": "lease", "vm": "web01", "hostname": text})
    assert shown.isprintable()
    assert len(shown) <= 4 * LONGEST_TEXT
    assert "\x1b" not in shown
    assert escaped("a\\nb") != escaped("a\nb")  # what is escaped and what was like that differ


@pytest.mark.parametrize(
    "record",
    [{}, {"verdict": "drop"}, {"event": 5, "verdict": None}, {"vm": ["x"], "proto": {}}, {"a": 1}],
)
def test_a_line_of_the_log_that_is_no_record_of_ours_is_shown(record: dict[str, Any]) -> None:
    assert record_text(record).isprintable()


def test_a_flow_that_ended_is_told_in_words() -> None:
    assert record_text(ENDED) == (
        "web01/tap-web01  flow_end  ingress  admin/guardrails/no-telnet  "
        "tcp 192.0.2.10:40112 > 10.20.0.11:23 S  closed after 2500 ms, 12 packets, 900 bytes"
    )


# --- slow and dead sinks -------------------------------------------------------------------


class Stuck:
    """A sink whose write ends when the test says so."""

    kind, place = "syslog", "test"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.got: list[int] = []

    def write(self, entries: Sequence[Entry]) -> Written:
        self.go.wait()
        self.got += [entry.record["n"] for entry in entries]
        return Written(len(entries))

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass


def add_all(log: LogWriter, path: Path, count: int, **fields: object) -> None:
    """Add numbered records, a few at a time, until the file has them."""
    before = _lines(path)
    for n in range(count):
        log.add({**fields, "n": n})
        if n % 20 == 19 or n == count - 1:
            log.kick()
            eventually("the file has them", partial(_has, path, before + n + 1))


def test_a_stuck_sink_holds_up_nobody_and_loses_what_does_not_fit(
    tmp_path: Path, writers: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sink, "MOST_WAITING", 50)
    stuck, path = Stuck(), tmp_path / "events.jsonl"
    log = writers(path, stuck)
    add_all(log, path, 150)
    lost = log.losses()
    assert lost["file"] == 0
    assert lost["syslog"] == 100  # what it has taken is not done, so it waits too
    stuck.go.set()
    eventually("it caught up", lambda: len(stuck.got) == 150 - lost["syslog"])
    add_all(log, path, 1)
    eventually("it goes on", lambda: len(stuck.got) == 151 - lost["syslog"])
    assert stuck.got[:50] == list(range(50))


def test_a_stuck_sink_is_waited_for_once(
    writers: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "DRAIN_SECONDS", 0.1)
    stuck = Stuck()
    log = writers(stuck)
    waits: list[float] = []
    wait_for = threading.Condition.wait_for

    def counted(condition: threading.Condition, predicate: Any, timeout: float) -> Any:
        done = wait_for(condition, predicate, timeout)
        if threading.current_thread() is threading.main_thread() and not done:
            waits.append(timeout)
        return done

    monkeypatch.setattr(threading.Condition, "wait_for", counted)
    for n in range(40):
        log.add({"n": n})
        log.flush()
    stuck.go.set()
    assert len(waits) == 1


@pytest.mark.parametrize("kind", ["journal", "syslog"])
def test_a_receiver_that_was_away_gets_what_waited(
    kind: str, tmp_path: Path, writers: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sink, "RETRY_SECONDS", 0.05)
    path = tmp_path / "receiver"
    sink = JournalSink(str(path)) if kind == "journal" else SyslogSink(str(path))
    log = writers(tmp_path / "events.jsonl", sink)
    decode = parse_journal if kind == "journal" else parse_syslog

    def number(message: Any) -> int:
        fields = message if kind == "journal" else message.parameters
        return int(fields["VGW_GENERATION" if kind == "journal" else "generation"])

    log.add({**DROP, "generation": 1})  # it is not there yet
    log.flush()
    got = []
    for round_ in range(3):
        receiver = Receiver(path, decode)
        got.append(number(receiver.get()))
        receiver.close()
        log.add({**DROP, "generation": 2 + round_})
        log.flush()
    assert got == [1, 2, 3]
    assert log.losses() == {"file": 0, kind: 0}
    assert [found["generation"] for found in read_log(tmp_path / "events.jsonl")] == [1, 2, 3, 4]


def test_a_receiver_that_takes_nothing_is_not_waited_for(
    tmp_path: Path, writers: MakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is full: what is sent to it would block."""
    monkeypatch.setattr(log_sink, "MOST_WAITING", 1000)
    monkeypatch.setattr("vgw.controller.log_socket.SEND_SECONDS", 0.1)
    receiver = Receiver(tmp_path / "journal", parse_journal)
    log = writers(tmp_path / "events.jsonl", JournalSink(str(receiver.path)))
    try:
        add_all(log, tmp_path / "events.jsonl", 3000, **DROP)
        lost = log.losses()
        assert lost["file"] == 0
        assert lost["journal"] > 1000
    finally:
        receiver.close()


def _has(path: Path, lines: int) -> bool:
    return _lines(path) == lines


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_what_no_receiver_got_is_lost_at_the_end(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "events.jsonl", SyslogSink(str(tmp_path / "nobody")))
    for _ in range(5):
        log.add(DROP)
    before = time.monotonic()
    log.close()
    assert time.monotonic() - before < 2 * log_sink.CLOSE_SECONDS
    assert log.losses() == {"file": 0, "syslog": 5}


def test_a_bug_in_a_sink_costs_the_records_that_met_it(tmp_path: Path, writers: MakeWriter) -> None:
    class Broken(Stuck):
        def write(self, entries: Sequence[Entry]) -> Written:
            if entries:
                raise ZeroDivisionError
            return Written(0)

    log = writers(tmp_path / "events.jsonl", Broken())
    for _ in range(3):
        log.add(DROP)
        log.flush()
    assert log.losses() == {"file": 0, "syslog": 3}
    assert _lines(tmp_path / "events.jsonl") == 3


# --- the choice of sinks -------------------------------------------------------------------


def test_every_kind_of_sink_can_be_chosen(tmp_path: Path) -> None:
    options = LogOptions(
        (
            *("file", f"file:{tmp_path}/more.jsonl", "journal", "journal:/run/other"),
            *("syslog", "syslog:/run/log", "syslog:udp:192.0.2.1:514", "syslog:udp:[::1]:5514"),
        )
    )
    sinks = open_sinks(options, tmp_path / "events.jsonl")
    assert [(sink.kind, sink.place) for sink in sinks] == [
        ("file", f"{tmp_path}/events.jsonl"),
        ("file", f"{tmp_path}/more.jsonl"),
        ("journal", "journal /run/systemd/journal/socket"),
        ("journal", "journal /run/other"),
        ("syslog", "syslog /dev/log"),
        ("syslog", "syslog /run/log"),
        ("syslog", "syslog udp:192.0.2.1:514"),
        ("syslog", "syslog udp:::1:5514"),
    ]
    for sink in sinks:
        sink.close()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("kafka",), "no place for a log"),
        (("",), "no place for a log"),
        (("file:",), "no place for a log"),
        (("file:events.jsonl",), "absolute"),
        (("syslog:tcp:h:1",), "absolute"),
        (("syslog:udp:host",), "HOST:PORT"),
        (("syslog:udp:host:0",), "HOST:PORT"),
        (("syslog:udp:host:65536",), "HOST:PORT"),
        (("journal", "journal:/run/systemd/journal/socket"), "twice"),
    ],
)
def test_mistakes_in_the_choice(texts: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(VgwError, match=message):
        open_sinks(LogOptions(texts), tmp_path / "events.jsonl")
    assert list(tmp_path.iterdir()) == []
