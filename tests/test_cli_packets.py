# SPDX-License-Identifier: Apache-2.0
"""simulate, logs, doctor and controller: verbs that need no target, on pretended answers."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.cli_fakes import POLICY
from vgw import cli_verbs_show
from vgw.cli import cli
from vgw.controller import daemon, doctor
from vgw.controller import simulate as simulation
from vgw.controller.log_choice import LogOptions
from vgw.controller.paths import Paths
from vgw.policy.model import Direction, Hook

ACCEPT: dict[str, Any] = {
    "index": 0,
    "verdict": "accept",
    "reason": "RULE",
    "policy": "web-tier",
    "tier": "group",
    "rule": "site",
    "hook": "tc",
    "model": "accept",
    "model_reason": "RULE",
    "model_rule": "site",
}
DROP = ACCEPT | {
    "verdict": "drop",
    "reason": "DEFAULT",
    "policy": None,
    "tier": None,
    "rule": None,
    "model": "drop",
    "model_reason": "DEFAULT",
    "model_rule": None,
}
PACKET = "--proto tcp --src 192.0.2.7 --dst 10.20.0.11 --sport 40000 --dport 443"
DESCRIPTION = {
    "proto": "tcp",
    "src": "192.0.2.7",
    "dst": "10.20.0.11",
    "sport": 40000,
    "dport": 443,
}


class FakeSimulation:
    """Stands for simulate.simulate: remembers what it was asked and gives prepared rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = [ACCEPT]
        self.packets: list[Any] = []
        self.asked: dict[str, Any] = {}

    def __call__(
        self, _host: object, vm: str, direction: Direction, packets: Iterable[Any], **options: Any
    ) -> Iterator[Mapping[str, Any]]:
        self.asked = {"vm": vm, "direction": direction, **options}
        self.packets = list(packets)
        yield from self.rows


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSimulation:
    simulation_ = FakeSimulation()
    monkeypatch.setattr(simulation, "simulate", simulation_)
    return simulation_


def simulate(arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["simulate", "--vm", "web01", "--direction", "ingress", *arguments.split()]
    )


def test_one_packet_is_answered_by_a_sentence(fake: FakeSimulation) -> None:
    outcome = simulate(PACKET)
    assert outcome.exit_code == 0
    assert outcome.stdout == (
        "web01 ingress tcp 192.0.2.7:40000 > 10.20.0.11:443: "
        "accept, reason RULE, rule group/web-tier/site; the model agrees\n"
    )
    assert fake.packets == [DESCRIPTION]
    assert fake.asked == {
        "vm": "web01",
        "direction": Direction.INGRESS,
        "hook": None,
        "stateful": False,
        "interface": None,
        "document": None,
    }


def test_what_may_be_chosen_is_passed_on(fake: FakeSimulation, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    chosen = f"--hook xdp --stateful --interface tap-web01 --policy {policy}"
    assert simulate(f"--proto icmp --src 10.0.0.1 --dst 10.0.0.2 {chosen}").exit_code == 0
    assert (fake.asked["hook"], fake.asked["stateful"]) == (Hook.XDP, True)
    assert fake.asked["interface"] == "tap-web01"
    assert sorted(fake.asked["document"].vms) == ["db01", "web01"]


@pytest.mark.parametrize(
    ("row", "said", "code"),
    [
        (DROP, "drop, reason DEFAULT; the model agrees", 0),
        (ACCEPT | {"model": "drop"}, "BUT the model says drop, reason RULE", 1),
        (ACCEPT | {"model_reason": "DEFAULT"}, "BUT the model says accept, reason DEFAULT", 1),
        (ACCEPT | {"model": None, "model_reason": None}, "no answer of the model", 0),
        (DROP | {"verdict": None, "reason": None, "error": "too long"}, "no answer: too long", 1),
    ],
)
def test_disagreement_is_a_failure(
    fake: FakeSimulation, row: Mapping[str, Any], said: str, code: int
) -> None:
    fake.rows = [row]
    outcome = simulate(PACKET)
    assert said in outcome.stdout
    assert outcome.exit_code == code


def test_a_file_of_packets_is_answered_by_rows(fake: FakeSimulation, tmp_path: Path) -> None:
    file = tmp_path / "packets.jsonl"
    file.write_text(f"{json.dumps(DESCRIPTION)}\n\n{json.dumps({'proto': 47})}\n")
    fake.rows = [ACCEPT, DROP | {"index": 1, "model": "accept"}]
    outcome = simulate(f"--packets {file}")
    assert outcome.exit_code == 1
    _, first, second = outcome.stdout.splitlines()
    assert first.split() == ["0", "accept", "RULE", "group/web-tier/site", "accept"]
    assert second.split() == ["1", "drop", "DEFAULT", "-", "accept", "DEFAULT", "DIFFERS"]
    assert fake.packets == [DESCRIPTION, {"proto": 47}]
    lines = simulate(f"--packets {file} -o jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == fake.rows
    document = json.loads(simulate(f"--packets {file} -o json").stdout)
    assert document == {
        "schema": "vgw/v1",
        "vm": "web01",
        "direction": "ingress",
        "results": fake.rows,
    }


def test_a_packet_without_an_answer_is_said_in_its_row(
    fake: FakeSimulation, tmp_path: Path
) -> None:
    file = tmp_path / "packets.jsonl"
    file.write_text(f"{json.dumps(DESCRIPTION)}\n")
    fake.rows = [ACCEPT, DROP | {"verdict": None, "reason": None, "error": "too long"}]
    outcome = simulate(f"--packets {file}")
    assert outcome.exit_code == 1
    assert outcome.stdout.splitlines()[2].endswith("  drop    no answer: too long")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--proto tcp --src 10.0.0.1 --dst 10.0.0.2 --dport 70000", "--dport: 70000 is wrong"),
        ("--proto tcp --src 10.0.0.1 --dst 10.0.0.2", "--dport: it is missing"),
        ("--proto tcp --src nowhere --dst 10.0.0.2 --dport 1", "--src: 'nowhere' is not an IP"),
        ("--proto icmp --src 10.0.0.1 --dst 10.0.0.2 --icmp-type x", "--icmp-type: 'x' is wrong"),
    ],
)
def test_a_wrong_option_is_a_usage_error(fake: FakeSimulation, options: str, said: str) -> None:
    outcome = simulate(options)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"vgw: {said}")
    assert fake.asked == {}


def test_a_wrong_packet_of_a_file_is_named_by_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*arguments: Any, **_: object) -> Iterator[Mapping[str, Any]]:
        for index, _packet in enumerate(arguments[3]):
            if index:
                raise simulation.PacketError(index, "field dport: 70000 is wrong")
            yield ACCEPT

    monkeypatch.setattr(simulation, "simulate", run)
    file = tmp_path / "packets.jsonl"
    file.write_text("{}\n\n{}\n{}\n")
    outcome = simulate(f"--packets {file} -o jsonl")
    assert outcome.exit_code == 1
    assert outcome.stderr == f"vgw: {file}:3: field dport: 70000 is wrong\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "2: not a line of JSON"),
        (b"[1]", "2: not a JSON object that describes a packet"),
        (b'{"src": "\xff"}', "2: not a line of JSON"),
        (b"[" * 100000, "2: not a line of JSON"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_bad_line_of_packets_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "packets.jsonl"
    file.write_bytes(b"{}\n" + line + b"\n")
    outcome = simulate(f"--packets {file}")
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(f"vgw: {file}:{said}")


def test_a_capture_is_read(fake: FakeSimulation, tmp_path: Path) -> None:
    frame = bytes(range(60))
    file = tmp_path / "frames.pcap"
    header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    file.write_bytes(header + struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame)
    assert simulate(f"--pcap {file}").exit_code == 0
    assert fake.packets == [frame]


LOG = [
    {"ts": "2026-01-01T00:00:00.000001Z", "event": "start"},
    {
        "ts": "2026-01-01T00:00:01.000001Z",
        "event": "drop",
        "vm": "web01",
        "interface": "tap-web01",
        "direction": "ingress",
        "verdict": "drop",
        "reason": "RULE",
        "policy": "p",
        "tier": "admin",
        "rule": "no-telnet",
        "generation": 1,
        "proto": "tcp",
        "src": "192.0.2.7",
        "dst": "10.20.0.11",
        "sport": 40000,
        "dport": 23,
        "tcp_flags": "S",
    },
    {"ts": "2026-01-01T00:00:02.000001Z", "event": "apply", "vm": "db01", "generation": 2},
]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in LOG))
    monkeypatch.setenv("VGW_LOG", str(path))
    return path


def logs(*arguments: str) -> str:
    outcome = CliRunner().invoke(cli, ["logs", *arguments])
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.stdout


@pytest.mark.usefixtures("log")
def test_logs_are_lines_for_people() -> None:
    start, drop, change = logs().splitlines()
    assert start == "2026-01-01T00:00:00.000001Z  start"
    when, rest = drop.split("  ", maxsplit=1)
    assert when == "2026-01-01T00:00:01.000001Z"
    packet = "tcp 192.0.2.7:40000 > 10.20.0.11:23 S"
    assert rest == f"web01/tap-web01  ingress  drop  RULE  admin/p/no-telnet  {packet}"
    assert change == "2026-01-01T00:00:02.000001Z  db01  apply  generation=2"


@pytest.mark.usefixtures("log")
def test_logs_are_json_for_programs() -> None:
    assert [json.loads(line) for line in logs("-o", "jsonl").splitlines()] == LOG
    assert json.loads(logs("-o", "json", "-n", "2")) == {"schema": "vgw/v1", "records": LOG[1:]}
    assert [json.loads(line) for line in logs("-o", "jsonl", "--vm", "db01").splitlines()] == [
        LOG[2]
    ]
    assert logs("-n", "0") == ""


def test_following_begins_with_the_last_and_goes_on(log: Path) -> None:
    records = cli_verbs_show.last_records(log, None, follow=True, lines=1, events=())
    assert next(iter(records)) == LOG[2]
    with log.open("a") as file:
        file.write(json.dumps({"event": "detach", "vm": "web01"}) + "\n")
    assert list(itertools.islice(records, 1)) == [{"event": "detach", "vm": "web01"}]


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(("vm", "known"), [("web01", True), ("web02", False)])
def test_logs_of_a_vm_that_nobody_knows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vm: str, known: bool
) -> None:
    monkeypatch.setenv("VGW_BPFFS", str(tmp_path))
    outcome = CliRunner().invoke(cli, ["logs", "--vm", vm])
    assert outcome.exit_code == 0
    assert bool(outcome.stdout) is known
    said = "" if known else f"warning: VM {vm} is neither in the log nor attached"
    assert outcome.stderr.partition(";")[0].strip() == said


def test_without_a_log_it_is_said_who_writes_it(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(cli, ["--log", str(tmp_path / "none"), "logs"])
    assert outcome.exit_code == 1
    assert "`vgw controller` writes it" in outcome.stderr


@pytest.mark.parametrize("fit", [True, False])
def test_doctor_fails_when_a_check_does(monkeypatch: pytest.MonkeyPatch, fit: bool) -> None:
    rows = [
        {"check": "kernel", "ok": True, "detail": "6.6", "fix": None},
        {"check": "bpffs", "ok": fit, "detail": "no bpffs", "fix": "mount one"},
    ]
    monkeypatch.setattr(doctor, "examine", lambda _: rows)
    outcome = CliRunner().invoke(cli, ["doctor"])
    assert outcome.exit_code == (0 if fit else 1)
    assert ("FAILED" in outcome.stdout) != fit
    parsed = json.loads(CliRunner().invoke(cli, ["doctor", "-o", "json"]).stdout)
    assert parsed == {"schema": "vgw/v1", "checks": rows}


def test_controller_runs_the_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(daemon, "run", lambda *values, **named: asked.append((values, named)))
    arguments = ["--run-dir", str(tmp_path), "controller", "--listen", "[::1]:99", "--rule-metrics"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    [((paths, listen), named)] = asked
    assert isinstance(paths, Paths)
    expected = {"rule_metrics": True, "log_options": LogOptions(), "tls": None}
    assert (paths.run_dir, listen, named) == (tmp_path, ("::1", 99), expected)


def test_controller_is_told_where_the_log_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LogOptions] = []
    monkeypatch.setattr(daemon, "run", lambda *_, **named: asked.append(named["log_options"]))
    arguments = ["controller", "--log-to", "journal", "--log-to", "syslog:udp:192.0.2.1:514"]
    arguments += ["--log-max-bytes", "0", "--log-keep", "9"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert asked == [LogOptions(("journal", "syslog:udp:192.0.2.1:514"), 0, 9)]

    wrong = CliRunner().invoke(cli, ["controller", "--log-to", "kafka"])
    assert wrong.exit_code == 2
    assert "no place for a log" in wrong.output
    assert len(asked) == 1


def test_logs_of_some_events_only(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text('{"event":"drop","n":1}\n{"event":"flow_end","n":2}\n{"event":"lost","n":3}\n')
    arguments = ["--log", str(log), "logs", "-o", "jsonl", "--event", "flow_end", "--event", "lost"]
    outcome = CliRunner().invoke(cli, arguments)
    assert [json.loads(line)["n"] for line in outcome.stdout.splitlines()] == [2, 3]


def test_catalogue_N7_a_hostile_record_is_one_printable_line(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text(json.dumps({"ts": "\x1b[2J", "event": "attach", "vm": "a\nb\x9b\u202e"}) + "\n")
    outcome = CliRunner().invoke(cli, ["--log", str(log), "logs"])
    (line,) = outcome.stdout.splitlines()
    assert line.isprintable()
