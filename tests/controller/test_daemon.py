# SPDX-License-Identifier: Apache-2.0
"""The controller as a process: what it does by itself, and what outlives it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import frames
from tests.controller.process import Controller, eventually
from vgw.controller.daemon import LinkEvent, _net_changes, run
from vgw.controller.event_reader import EventReader
from vgw.controller.events import read_log
from vgw.controller.health import notify
from vgw.controller.lock import controller_lock
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import ControllerUnreachableError, PolicyError, VgwError

# Compiled already: on a busy machine that takes longer than a start may.
pytestmark = [pytest.mark.bpf, pytest.mark.usefixtures("artefact")]

VM = """
  {name}:
    interfaces:
      - {{name: {interface}, mac: "52:54:00:00:00:{n}", addresses: [10.20.0.{n}]}}
"""
RULES = """
policies:
  - name: test
    tier: vm
    applies_to: {all: true}
    egress:
      - {name: no-dns, action: drop, services: [udp/53], log: true}
"""


def policy(*vms: tuple[str, str], rules: str = RULES) -> str:
    """Return a policy that names VMs with one interface each; the first is frames.VM4."""
    named = "".join(
        VM.format(name=name, interface=interface, n=n)
        for n, (name, interface) in enumerate(vms, 11)
    )
    return f"schema: vgw/v1\nvms:{named or ' {}'}\n{rules}"


def dns_query(destination: str = frames.PEER4) -> bytes:
    """Return a frame of the VM that the test's policy drops and logs."""
    return frames.ethernet(frames.ipv4(frames.udp(), frames.UDP, destination=destination), 0x0800)


Start = Callable[..., Controller]

#: Python by which a controller never looks around by itself.
NEVER_IDLE = "from vgw.controller import daemon; daemon.IDLE_SECONDS = 10_000.0"


@pytest.fixture
def start(paths: Paths) -> Iterator[Start]:
    """Start controllers, after Python that they run first; at the end they are stopped."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    started: list[Controller] = []

    def make(before: str = "") -> Controller:
        started.append(Controller(paths, 9477, before))
        return started[-1]

    yield make
    for controller in started:
        if controller.process.poll() is None:
            controller.end(signal.SIGKILL)
    with contextlib.suppress(VgwError):
        Host(paths).detach_all()


def test_starts_without_a_policy_and_stops(start: Start, paths: Paths) -> None:
    controller = start()

    assert controller.client.ping()["pid"] == controller.process.pid
    assert controller.client.status()["vms"] == []
    assert controller.end() == 0
    assert not paths.socket.exists()
    with pytest.raises(ControllerUnreachableError):
        controller.client.ping()
    assert [found["event"] for found in read_log(paths.log_file)] == [
        *("start", "error", "alarm", "stop")
    ]
    assert "what is in force stays in force" in controller.records("error")[0]["message"]


def test_catalogue_M27_another_controller_is_refused_and_takes_nothing(
    start: Start, paths: Paths, tap: Callable[[str], int], tmp_path: Path
) -> None:
    vm = tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()
    apart = dataclasses.replace(paths, run_dir=tmp_path / "run2", log_file=tmp_path / "log2")

    with pytest.raises(VgwError, match=rf"already running \(pid {controller.process.pid}\)"):
        run(apart, ("127.0.0.1", 0))

    os.write(vm, dns_query())
    eventually("still logged", lambda: controller.records("drop"))
    controller.end(signal.SIGKILL)
    with controller_lock(paths):
        pass


def test_does_not_start_where_it_could_do_nothing(paths: Paths, tmp_path: Path) -> None:
    nowhere = dataclasses.replace(paths, bpffs=tmp_path / "plain" / "vgw")

    with pytest.raises(VgwError, match=f"mount -t bpf bpf {tmp_path}/plain"):
        run(nowhere, ("127.0.0.1", 0))


def test_socket_that_cannot_be_had_ends_the_start(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventReader, "start", lambda _: pytest.fail("began to read"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(VgwError, match="cannot serve metrics"):
            run(paths, taken.getsockname())

    assert not paths.socket.exists()
    assert not paths.bpffs.exists()


def test_catalogue_M12_M13_what_is_there_is_protected_before_it_says_that_it_is_ready(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0"), ("absent", "tap9")))

    controller = start()

    assert controller.attached() == {"web01": 1}
    (record,) = controller.records("attach")
    assert (record["vm"], record["interface"], record["generation"]) == ("web01", "tap0", 1)
    assert controller.records("error") == []


def test_catalogue_M1_M2_killed_twice_nothing_changes_and_counters_go_on(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    dropped = 'vgw_dropped_packets_total{direction="egress",interface="tap0",reason="RULE"'
    ruled = 'vgw_rule_packets_total{direction="egress"'
    programs: list[int] = []

    for sent, how in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM), 1):
        controller = start()
        programs = programs or controller.programs()
        os.write(vm, dns_query())
        assert controller.metric(dropped) == sent
        assert controller.metric(ruled) == sent
        assert controller.programs() == programs
        assert controller.attached() == {"web01": 1}
        controller.end(how)

    assert len(controller.records("attach")) == 1
    assert Host(paths).attached() == ["web01"]


def test_catalogue_M13_M14_interface_that_comes_goes_and_comes_again(
    start: Start, paths: Paths, veth: Callable[[str], str]
) -> None:
    paths.policy.write_text(policy(("web01", "veth0"), ("db01", "veth1")))
    controller = start(NEVER_IDLE)

    def recorded(event: str, times: int) -> bool:
        found = [each["interface"] for each in controller.records(event)]
        return found == ["veth0"] * times

    for times in (1, 2):
        veth("veth0")
        # Programs are there before the change is done, and it fails if the interface goes first.
        eventually("recorded", partial(recorded, "attach", times))
        assert controller.attached() == {"web01": 1}
        subprocess.run(["ip", "link", "delete", "veth0"], check=True)
        eventually("forgotten", lambda: not paths.vm_dir("web01").exists())
        eventually("forgotten", lambda: not paths.manifest("web01").exists())
        assert controller.metric("vgw_attached{") == 0
        eventually("recorded", partial(recorded, "detach", times))


def test_interface_that_was_ordered_comes_goes_and_comes_again(
    start: Start, paths: Paths, veth: Callable[[str], str]
) -> None:
    veth("veth0")
    paths.policy.write_text(policy())
    controller = start()
    controller.client.attach("guest", interfaces=["veth0"])

    for _ in range(2):
        subprocess.run(["ip", "link", "delete", "veth0"], check=True)
        eventually("gone", lambda: controller.attached() == {})
        veth("veth0")
        eventually("protected again", lambda: "guest" in controller.attached())
    subprocess.run(["ip", "link", "delete", "veth0"], check=True)
    eventually("gone", lambda: controller.attached() == {})
    controller.client.detach("guest")
    assert not paths.manifest("guest").exists()


def test_interface_that_went_while_no_controller_ran(
    start: Start, paths: Paths, veth: Callable[[str], str]
) -> None:
    paths.policy.write_text(policy(("web01", "veth0")))
    veth("veth0")
    start().end()
    subprocess.run(["ip", "link", "delete", "veth0"], check=True)
    assert paths.vm_dir("web01").exists()

    controller = start()

    assert controller.client.status()["vms"] == []
    assert not paths.vm_dir("web01").exists()


def test_reload_takes_the_policy_if_it_is_valid(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()

    paths.policy.write_text(policy(("web01", "tap0"), rules="policies: [{}]\n"))
    controller.process.send_signal(signal.SIGHUP)
    eventually("the mistake is logged", lambda: controller.records("error"))
    assert controller.attached() == {"web01": 1}

    paths.policy.write_text(policy(("web01", "tap0"), rules=""))
    controller.process.send_signal(signal.SIGHUP)
    eventually("applied", lambda: controller.attached() == {"web01": 2})
    assert controller.client.rules("web01")["rules"] == []
    assert controller.metric("vgw_policy_apply_errors_total") == 1
    assert controller.metric("vgw_policy_generation") == 2


def test_applied_policy_is_the_current_one_until_the_next_reload(
    start: Start, paths: Paths, veth: Callable[[str], str]
) -> None:
    veth("veth0")
    paths.policy.write_text(policy(("web01", "veth0")))
    controller = start()

    applied = policy(("web01", "veth0"), ("db01", "veth1"), rules="")
    result = controller.client.apply([("policy.yaml", applied)])
    assert [(row["vm"], row["generation"]) for row in result["vms"]] == [("web01", 2)]
    with pytest.raises(PolicyError):
        controller.client.apply([("policy.yaml", "schema: vgw/v2")])
    veth("veth1")
    eventually("db01 of the applied policy", lambda: "db01" in controller.attached())

    controller.process.send_signal(signal.SIGHUP)
    eventually("the policy on disk", lambda: controller.client.rules("web01")["rules"])


@pytest.mark.usefixtures("artefact")
def test_catalogue_M9_a_policy_that_hangs_stops_nothing(
    start: Start, paths: Paths, tap: Callable[[str], int], veth: Callable[[str], str]
) -> None:
    tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0"), ("db01", "veth1")))
    start().end(signal.SIGKILL)
    paths.policy.unlink()
    os.mkfifo(paths.policy)

    controller = start()

    began, used = time.monotonic(), cpu_seconds(controller)
    assert controller.attached() == {"web01": 1}
    veth("veth1")
    eventually("db01 of the last good policy", lambda: "db01" in controller.attached())
    alarm = 'vgw_alarm{alarm="policy_unreadable"'
    assert controller.metric(alarm) == 1
    assert "gave no answer" in controller.client.status()["alarms"][0]["text"]
    assert controller.client.set_mode("web01", "monitor")["mode"] == "monitor"
    again = paths.policy.with_name("again.yaml")
    again.write_text(policy(("web01", "tap0"), ("db01", "veth1"), rules=""))
    with paths.policy.open("w"):  # what the controller waits for
        again.rename(paths.policy)
    eventually("the file is back", lambda: controller.metric(alarm) == 0)
    eventually("and in force", lambda: not controller.client.rules("web01")["rules"])
    assert cpu_seconds(controller) - used < 0.5 * (time.monotonic() - began)


def cpu_seconds(controller: Controller) -> float:
    """Return the processor time that a controller has used."""
    stat = Path(f"/proc/{controller.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def test_verbs(start: Start, tap: Callable[[str], int]) -> None:
    vm = tap("tap0")
    controller = start()
    client = controller.client
    sources = [("policy.yaml", policy(("web01", "tap0")))]

    assert client.attach("web01", sources=sources, hook="tc")["changed"] is True
    assert client.attach("web01", sources=sources, hook="tc")["changed"] is False
    assert client.status("web01")["vms"][0]["interfaces"][0]["from_vm"]["hook"] == "tc"
    os.write(vm, dns_query())
    assert [row["packets"] for row in client.rules("web01")["rules"]] == [1]
    os.write(vm, frames.ethernet(frames.ipv4(frames.udp(dport=99), frames.UDP), 0x0800))
    assert len(client.conntrack("web01")["flows"]) == 1
    client.flush("web01")
    assert client.conntrack("web01")["flows"] == []
    assert client.apply(sources, dry_run=True)["vms"][0]["changed"] is False
    for _ in range(2):
        client.set_mode("web01", "monitor")
    assert len(controller.records("mode")) == 1
    assert client.status("web01")["vms"][0]["mode"] == "monitor"
    with pytest.raises(VgwError, match="'off' in the request is none of enforce, monitor"):
        client.set_mode("web01", "off")
    with pytest.raises(VgwError, match="web02 is not attached"):
        client.detach("web02")
    many = client.attach_many(["web01"], sources=sources)
    assert [(row["vm"], row["changed"]) for row in many["vms"]] == [("web01", False)]
    assert client.detach("web01") == {"detached": ["web01"]}
    assert client.detach_all() == {"detached": []}
    assert client.status()["vms"] == []


def test_events_are_logged_with_names_and_over_rotation(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()

    before = time.time()
    os.write(vm, dns_query("192.0.2.1"))
    (record,) = eventually("logged", lambda: controller.records("drop"))
    rotated = paths.log_file.rename(paths.log_file.with_suffix(".1"))
    controller.process.send_signal(signal.SIGHUP)
    eventually("a new file", paths.log_file.exists)
    os.write(vm, dns_query("192.0.2.2"))
    (second,) = eventually("logged", lambda: controller.records("drop"))

    assert second["dst"] == "192.0.2.2"
    assert [found["dst"] for found in read_log(rotated, "web01") if "dst" in found] == ["192.0.2.1"]
    moment = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(before))
    assert record.pop("ts").startswith((moment, time.strftime("%Y-%m-%dT%H:%M", time.gmtime())))
    assert record == {
        "event": "drop",
        "vm": "web01",
        "interface": "tap0",
        "direction": "egress",
        "verdict": "drop",
        "reason": "RULE",
        "policy": "test",
        "tier": "vm",
        "rule": "no-dns",
        "generation": 1,
        "proto": "udp",
        "src": frames.VM4,
        "dst": "192.0.2.1",
        "sport": 40000,
        "dport": 53,
        "length": 42,
    }
    assert controller.metric('vgw_events_total{interface="tap0",vm="web01"}') == 2


def test_events_of_an_endpoint_that_is_made_anew_are_read(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    """The perf buffer goes with the last VM and comes with the next: another map."""
    vm = tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()
    controller.client.detach("web01")
    assert not paths.events.exists()
    controller.client.attach("web01")

    def logged() -> bool:
        os.write(vm, dns_query())
        return bool(controller.records("drop"))

    eventually("events are read from the new map", logged)
    assert all(found["vm"] == "web01" for found in controller.records("drop"))


def test_suppressed_events_are_reported(
    start: Start, paths: Paths, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()
    for _ in range(4000):
        os.write(vm, dns_query())

    lost = 'vgw_events_lost_total{cause="suppressed"}'
    eventually("suppressed events are counted", lambda: controller.metric(lost) > 0)
    controller.end()

    counts = {found["cause"]: found["count"] for found in controller.records("lost")}
    assert counts["suppressed"] + len(controller.records("drop")) == 4000


def test_memory(start: Start, paths: Paths, tap: Callable[[str], int]) -> None:
    tap("tap0")
    paths.policy.write_text(policy(("web01", "tap0")))
    controller = start()
    controller.scrape()
    maps = Path(f"/proc/{controller.process.pid}/maps").read_text()
    loaded = {line.split("/")[-1] for line in maps.splitlines() if "/" in line}

    assert any(name.startswith("libbpf.so") for name in loaded)
    assert not any("bcc" in name or "LLVM" in name for name in loaded)
    assert controller.memory_mb() < 80


def test_net_changes_of_a_burst() -> None:
    assert _net_changes(
        [
            LinkEvent("new", "tap0", 4),
            LinkEvent("gone", "tap1", 3),
            LinkEvent("new", "tap1", 5),
            LinkEvent("gone", "tap0", 4),
            LinkEvent("new", "tap2", 6),
        ]
    ) == ({"tap1": 5, "tap2": 6}, {"tap0", "tap1"})


def test_notify_speaks_to_abstract_sockets_and_never_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    name = f"vgw-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        notify("READY=1")
        assert listener.recv(64) == b"READY=1"
