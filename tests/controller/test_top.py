# SPDX-License-Identifier: Apache-2.0
"""`vgw top` on a real terminal of 80x24, of VMs that really get packets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.observe import send_to_vm
from tests.controller.policies import PEER_ADDRESS, document, to_vm
from tests.controller.process import Controller, environment_of
from tests.terminal import Terminal
from vgw.controller import samples
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

pytestmark = pytest.mark.bpf

RULES = """[{name: http, action: accept, services: [tcp/80]},
            {name: telnet, action: drop, services: [tcp/23]}]"""
VMS = {"web01": "{interfaces: [{name: tap0}]}", "db01": "{interfaces: [{name: tap1}]}"}
PASSES, DROPPED = to_vm(dport=80), to_vm(dport=23)
#: Frames a second, by interface and kind, sent in so many beats.
BEATS = 50
RATES = {("tap0", PASSES): 200, ("tap0", DROPPED): 100, ("tap1", PASSES): 50}
COMMAND = str(Path(sys.executable).with_name("vgw"))


@pytest.fixture
def environment(paths: Paths) -> dict[str, str]:
    return {**os.environ, **environment_of(paths)}


@pytest.fixture
def protected(host: Host, tap: Callable[[str], int]) -> Host:
    for name in ("tap0", "tap1"):
        tap(name)
    host.attach_many(document(RULES, vms=VMS))
    return host


Sent = dict[tuple[str, bytes], int]


@pytest.fixture
def traffic(protected: Host) -> Iterator[Sent]:  # noqa: ARG001
    """Send at the rates of RATES, catching up after every wait; gives what was sent so far."""
    stop = threading.Event()
    sent = dict.fromkeys(RATES, 0)

    def send() -> None:
        begin, beats = time.monotonic(), 0
        while not stop.wait(0.02):
            while beats < BEATS * (time.monotonic() - begin) and not stop.is_set():
                beats += 1
                for key, rate in RATES.items():
                    name, frame = key
                    for _ in range(rate // BEATS):
                        with contextlib.suppress(OSError):  # ENOBUFS: a program dropped it
                            socks[name].send(frame)
                    sent[key] += rate // BEATS

    with contextlib.ExitStack() as stack:
        socks = {}
        for name, _ in RATES:  # one for all frames: the kernel takes its time to close one
            socks[name] = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            socks[name].bind((name, 0))
        thread = threading.Thread(target=send)
        thread.start()
        yield sent
        stop.set()
        thread.join()


def top(environment: dict[str, str], *options: str) -> Terminal:
    return Terminal([COMMAND, "top", "--interval", "1", *options], env=environment)


def cells(lines: list[str], vm: str) -> list[str]:
    return next((line.split() for line in lines if line.startswith(f"{vm} ")), [])


def number(text: str) -> float:
    unit = {"k": 1e3, "M": 1e6}.get(text[-1:], 1.0)
    return float(text.rstrip("kM")) * unit if text != "-" else -1.0


def near(text: str, wanted: float) -> bool:
    return 0.75 * wanted <= number(text) <= 1.25 * wanted


def shows_rates(lines: list[str]) -> bool:
    """Tell whether the list shows what is being sent."""
    web, db = cells(lines, "web01"), cells(lines, "db01")
    if len(web) != 9 or len(db) != 9:
        return False
    _, mode, into, into_bits, out, _, drops, drop_bits, connections = web
    return (
        (mode, out, connections) == ("enforce", "0", "1")
        and near(into, 200)
        and near(into_bits, 200 * 8 * len(PASSES))
        and near(drops, 100)
        and near(drop_bits, 100 * 8 * len(DROPPED))
        and near(db[2], 50)
    )


def order(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines[2:] if line.startswith(("web01 ", "db01 "))]


@pytest.mark.parametrize("by_controller", [True, False])
@pytest.mark.usefixtures("traffic")
def test_rates_keys_and_views(
    paths: Paths, environment: dict[str, str], by_controller: bool
) -> None:
    with contextlib.ExitStack() as stack:
        if by_controller:
            stack.callback(Controller(paths, 0).end)
        screen = stack.enter_context(top(environment))
        lines = screen.wait_for("the rates that are sent", shows_rates)
        assert lines[0].startswith("vgw top  2 VMs  in ")
        assert lines[-1] == "up/down select  enter open  s sort  r reverse  q quit"
        assert order(lines) == ["web01", "db01"]
        assert any(line.startswith("drops    RULE in ") for line in lines)
        screen.wait_for(
            "the talkers", lambda lines: f"talkers  web01: {PEER_ADDRESS} " in "\n".join(lines)
        )

        screen.press("r")
        screen.wait_for("the other order", lambda lines: order(lines) == ["db01", "web01"])
        screen.press("rs")
        screen.wait_for("sorted by out", lambda lines: "OUTbitv" in lines[1])
        screen.press("ss")
        screen.wait_for("sorted by connections", lambda lines: "CONNv" in lines[1])
        screen.press("s")
        screen.wait_for("sorted by name", lambda lines: order(lines) == ["db01", "web01"])

        screen.press("\x1b[B\r")  # down, enter
        lines = screen.wait_for(
            "the opened VM with its rules",
            lambda lines: (
                lines[0].startswith("web01  enforce") and "in base/http" in "\n".join(lines)
            ),
        )
        text = "\n".join(lines)
        assert "tap0" in text
        assert "tap1" not in text
        screen.wait_for("its reasons", lambda lines: any("in RULE" in line for line in lines))
        screen.wait_for(
            "its talkers by what they send",
            lambda lines: any(PEER_ADDRESS in line and "kbit/s 1" in line for line in lines),
        )
        screen.wait_for(
            "its rates",
            lambda lines: any(
                line.startswith("toward VM") and near(line.split()[2], 200) for line in lines
            ),
        )
        screen.press("\x1b")
        screen.wait_for("back", lambda lines: lines[0].startswith("vgw top"))

        screen.resize(132, 40)
        screen.wait_for("a larger screen", lambda lines: lines[39].startswith("up/down"))
        screen.resize(60, 12)
        screen.wait_for(
            "a smaller one",
            lambda lines: lines[0].startswith("vgw top") and lines[11].startswith("up/down"),
        )
        screen.press("q")
        assert screen.end() == 0
        assert screen.is_restored()


@pytest.mark.parametrize(
    ("finish", "status"),
    [
        (lambda screen: screen.press("\x03"), 130),
        (lambda screen: screen.signal(signal.SIGTERM), 128 + signal.SIGTERM),
        (lambda screen: screen.signal(signal.SIGHUP), 128 + signal.SIGHUP),
        (lambda screen: screen.press("\x1c"), 128 + signal.SIGQUIT),
        (lambda screen: screen.press("xyzq"), 0),
    ],
    ids=["ctrl-c", "term", "hangup", "quit", "q"],
)
@pytest.mark.usefixtures("protected")
def test_the_terminal_is_as_before(
    environment: dict[str, str], finish: Callable[[Terminal], None], status: int
) -> None:
    with top(environment) as screen:
        screen.wait_for("the list", lambda lines: "web01" in "\n".join(lines))
        assert not screen.is_restored()  # the control
        finish(screen)
        assert screen.end() == status
        assert screen.is_restored()
        assert "Traceback" not in screen.text()


@pytest.mark.usefixtures("protected")
def test_suspended_it_leaves_the_terminal_and_comes_back(environment: dict[str, str]) -> None:
    with top(environment) as screen:
        screen.wait_for("the list", lambda lines: "web01" in "\n".join(lines))
        screen.press("\x1a")
        screen.wait_for("the terminal is given back", lambda _: screen.is_restored())
        assert screen.process.poll() is None
        os.kill(screen.process.pid, signal.SIGCONT)
        screen.wait_for("it is back", lambda _: not screen.is_restored())
        screen.press("q")
        assert screen.end() == 0
        assert screen.is_restored()


def test_without_a_terminal_it_prints_one_sample(
    environment: dict[str, str], traffic: Sent
) -> None:
    def run(*options: str) -> str:
        command = [COMMAND, "top", "--interval", "1", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    table = run().splitlines()
    assert table[0].split()[:3] == ["VM", "MODE", "IN/s"]
    row = cells(table, "web01")
    assert near(row[2], 2 * number(row[6]))  # twice as many pass as are dropped
    assert cells(table, "web01")[-2:] == ["RULE", "(ingress)"]

    before = dict(traffic)
    answer = json.loads(run("--once", "--vm", "web01", "-o", "json"))
    most = {key: traffic[key] - before[key] for key in RATES}
    assert answer["schema"] == "vgw/v1"
    (row,) = answer["vms"]
    accepted = row["rates"]["ingress"]["accepted"]
    counted = {
        PASSES: accepted["packets"] * answer["seconds"],
        DROPPED: row["rates"]["ingress"]["dropped"]["packets"] * answer["seconds"],
    }
    for frame, packets in counted.items():
        assert 0 < packets <= most["tap0", frame] + 1
    assert counted[PASSES] == pytest.approx(2 * counted[DROPPED], rel=0.25)
    assert accepted["bits"] == pytest.approx(accepted["packets"] * 8 * len(PASSES), rel=0.05)
    assert row["talkers"][0]["address"] == PEER_ADDRESS
    assert row["talkers"][0]["bits"]["ingress"] > 0
    assert {each["rule"] for each in row["rules"]} == {"http", "telnet"}
    assert len(run("-o", "jsonl").splitlines()) == 2

    done = subprocess.run(
        [COMMAND, "top", "--once", "--vm", "nobody"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)


def test_reads_of_connections_are_bounded(protected: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for port in range(30):
        send_to_vm("tap0", to_vm(sport=1000 + port, dport=80))
    send_to_vm("tap0", to_vm(src="198.51.100.1", dport=80))
    whole = samples.talkers(protected, "web01")
    assert (whole["flows"], whole["complete"]) == (31, True)
    assert [(row["address"], row["connections"]) for row in whole["talkers"]] == [
        (PEER_ADDRESS, 30), ("198.51.100.1", 1),
    ]  # fmt: skip
    assert whole["talkers"][0]["packets"] == {"ingress": 30, "egress": 0}
    assert whole["talkers"][0]["bytes"] == {"ingress": 30 * len(PASSES), "egress": 0}
    for limit, complete in ((31, True), (30, False), (1, False)):
        monkeypatch.setattr(samples, "MAX_FLOWS", limit)
        some = samples.talkers(protected, "web01")
        assert (some["flows"], some["complete"]) == (limit, complete)
    monkeypatch.setattr(samples, "MAX_TALKERS", 1)
    assert len(samples.talkers(protected, "web01")["talkers"]) == 1
