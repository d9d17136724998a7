# SPDX-License-Identifier: Apache-2.0
"""Packets do not notice what becomes of the controller, of the clock, or of the host's settings."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.conftest import run
from tests.controller.observe import program_ids, row
from tests.controller.policies import from_vm, to_vm
from tests.controller.process import Controller, eventually
from tests.patience import PATIENCE
from vgw import abi, libbpf, loader
from vgw.controller import links
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

pytestmark = [pytest.mark.bpf, pytest.mark.usefixtures("artefact")]

POLICY = """
schema: vgw/v1
vms:
  web01: {interfaces: [{name: tap0, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]}
policies:
  - name: base
    tier: vm
    applies_to: {all: true}
    ingress: [{name: in, action: accept, services: [udp/8000]}]
    egress: [{name: out, action: accept, services: [udp/8001]}]
defaults: {ingress: drop, egress: drop}
"""
ALLOWED, ALLOWED_OUT, DENIED = 8000, 8001, 9000
#: Python for a controller whose time of day is shifted by the seconds in a file.
SHIFTED = """
import pathlib, time
def shifted(real, unit):
    return lambda: real() + int(pathlib.Path({file!r}).read_text()) * unit
time.time, time.time_ns = shifted(time.time, 1), shifted(time.time_ns, 10**9)
"""
DAY = 86_400


def packet(port: int) -> dict[str, object]:
    """Return a UDP packet with four bytes of payload, which no checksum covers."""
    return {"proto": "udp", "sport": 4000, "dport": port, "length": 4}


class Traffic:
    """Numbered packets of four flows, both ways, allowed and denied, until stopped."""

    def __init__(self, vm: int) -> None:
        self._vm = vm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._in = {port: to_vm(**packet(port))[:-4] for port in (ALLOWED, DENIED)}
        self._out = {port: from_vm(**packet(port))[:-4] for port in (ALLOWED_OUT, DENIED)}
        self.sent = 0
        self.arrived: dict[int, list[int]] = {ALLOWED: [], DENIED: []}
        self._thread.start()

    def _run(self) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("tap0", 0))
            while not self._stop.is_set() and self.sent < 100_000:
                number = struct.pack("=I", self.sent)
                for port in (ALLOWED, DENIED):
                    with contextlib.suppress(OSError):  # ENOBUFS: a program dropped it
                        sock.send(self._in[port] + number)
                for port in (ALLOWED_OUT, DENIED):
                    os.write(self._vm, self._out[port] + number)
                self.sent += 1
                self._receive()
                self._stop.wait(0.001)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = os.read(self._vm, 65536)
                port, number = frame[36:38], frame[42:46]
                known = self.arrived.get(int.from_bytes(port))
                if known is not None and frame[23] == socket.IPPROTO_UDP:
                    known += struct.unpack("=I", number)

    def goes_on(self) -> None:
        """Wait until some more was sent."""
        target = self.sent + 100
        eventually("traffic", lambda: self.sent >= target)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def judged(host: Host) -> dict[tuple[abi.Path, abi.Verdict], int]:
    """Return how many packets got each verdict."""
    (endpoint,) = host.open_endpoints("web01")
    found: dict[tuple[abi.Path, abi.Verdict], int] = {}
    with endpoint:
        for (path, verdict, _), counter in endpoint.maps.stats().items():
            found[path, verdict] = found.get((path, verdict), 0) + counter.packets
    return found


def created(host: Host) -> list[int]:
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        return list(endpoint.maps.meta().created)


def check_nothing_was_lost(host: Host, flow: Traffic) -> None:
    """Check that each packet was judged, and that counters and flows are those of before."""
    assert flow.arrived == {ALLOWED: list(range(flow.sent)), DENIED: []}
    assert judged(host) == {
        (path, verdict): flow.sent
        for path in abi.Path
        for verdict in (abi.Verdict.ACCEPT, abi.Verdict.DROP)
    }, "the counters went on"
    assert created(host) == [1, 1], "the flows were kept"


def link_ids(host: Host) -> list[int]:
    found = []
    for path in abi.Path:
        with links.opened(links.link_pin(host.paths.endpoint_dir("web01", "tap0"), path)) as fd:
            found.append(libbpf.link_info(fd).id)
    return found


Start = Callable[..., Controller]


@pytest.fixture
def start(paths: Paths) -> Iterator[Start]:
    run("ip", "link", "set", "lo", "up")
    paths.policy.write_text(POLICY)
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


@pytest.fixture
def traffic(tap: Callable[[str], int], start: Start) -> Iterator[tuple[Traffic, Controller]]:
    """Traffic through a VM's interface, and the controller that protects it."""
    for where in ("all", "default"):  # or the host sends packets of its own
        Path(f"/proc/sys/net/ipv6/conf/{where}/disable_ipv6").write_text("1")
    vm = tap("tap0")
    controller = start()
    made = Traffic(vm)
    yield made, controller
    made.stop()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="M1-kill"),
        pytest.param(signal.SIGTERM, id="M38-stop"),
    ],
)
def test_catalogue_M1_M2_M38_packets_do_not_notice_that_the_controller_ends_and_comes_again(
    traffic: tuple[Traffic, Controller], start: Start, paths: Paths, how: signal.Signals
) -> None:
    flow, controller = traffic
    host = Host(paths)
    before = program_ids(host), link_ids(host)
    flow.goes_on()
    controller.end(how)
    flow.goes_on()
    assert (program_ids(host), link_ids(host)) == before
    again = start()
    flow.goes_on()
    assert again.client.apply([("policy.yaml", POLICY)])["vms"][0]["changed"] is False
    flow.stop()

    assert (program_ids(host), link_ids(host)) == before
    check_nothing_was_lost(host, flow)
    assert len(again.records("attach")) == 1
    assert again.records("apply") == []


def test_a_moment_without_programs_would_be_noticed(
    traffic: tuple[Traffic, Controller], paths: Paths
) -> None:
    flow, controller = traffic
    controller.end(signal.SIGKILL)
    Host(paths).detach("web01")
    flow.goes_on()
    flow.stop()
    assert flow.arrived[DENIED]


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_catalogue_M33_a_clock_that_jumps_ends_no_flow_and_no_watch(
    start: Start, paths: Paths, tap: Callable[[str], int], jump: int
) -> None:
    vm = tap("tap0")
    shift = paths.run_dir.with_name("shift")
    shift.write_text("0")
    controller = start(SHIFTED.format(file=str(shift)))
    host = Host(paths)
    os.write(vm, from_vm(proto="udp", sport=4000, dport=ALLOWED_OUT))
    (flow,) = controller.client.conntrack("web01")["flows"]
    started = controller.records("start")[0]["ts"]

    fresh = shift.with_name("shift.new")
    fresh.write_text(str(jump))
    fresh.rename(shift)

    directory = paths.endpoint_dir("web01", "tap0")
    with links.opened(links.link_pin(directory, abi.Path.TO_VM)) as fd:
        libbpf.link_detach(fd)
    eventually("put back", lambda: row(host)["attached"])
    (restored,) = eventually("recorded", lambda: controller.records("restored"))
    assert restored["ts"][:10] != started[:10], "the clock did not jump"
    (now,) = controller.client.conntrack("web01")["flows"]
    assert 0 <= now["age"] - flow["age"] < PATIENCE
    assert 0 <= flow["expires_in"] - now["expires_in"] < PATIENCE
    (alarm,) = controller.client.status()["alarms"]
    assert 0 <= alarm["seconds"] < PATIENCE
    assert controller.page("healthz")[0] == 200
    assert sum(created(host)) == 1


def test_catalogue_M33_no_program_asks_for_the_time_of_day(artefact: loader.Artefact) -> None:
    """Every clock that a program can ask has a helper; ours ask for monotonic ones only."""
    ktime, jiffies, boot, coarse, tai = 5, 118, 125, 160, 208
    asked: set[int] = set()
    for program in artefact.programs.values():
        code = program.insns
        for offset in range(0, len(code), 8):
            opcode, registers, _, number = struct.unpack_from("=BBhi", code, offset)
            if opcode == 0x85 and registers >> 4 == 0:
                asked.add(number)
    assert asked & {ktime, jiffies, coarse}, "no helper is found where there is one for sure"
    assert not asked & {boot, tai}


def test_catalogue_M33_another_clock_than_that_of_packets_is_refused() -> None:
    ask = "from vgw.controller import fitness; fitness.require_host_clock(); print('ok')"
    command = [sys.executable, "-P", "-c", ask]
    shifted = ["unshare", "--time", "--monotonic", str(DAY), "--fork", *command]
    same = subprocess.run(command, capture_output=True, text=True, check=True)
    other = subprocess.run(shifted, capture_output=True, text=True, check=False)
    assert same.stdout == "ok\n"
    assert "time namespace of its own" in other.stderr.splitlines()[-1]


def test_catalogue_M37_settings_that_a_package_upgrade_resets_change_no_verdict(
    traffic: tuple[Traffic, Controller], paths: Paths
) -> None:
    flow, _ = traffic
    settings = (
        "net/ipv4/conf/all/rp_filter",
        "net/ipv4/conf/tap0/rp_filter",
        "net/ipv4/ip_forward",
        "net/ipv4/conf/all/arp_filter",
        "net/ipv6/conf/all/forwarding",
        "net/bridge/bridge-nf-call-iptables",
        "net/bridge/bridge-nf-call-ip6tables",
        "net/bridge/bridge-nf-call-arptables",
    )
    flipped = 0
    for name in settings:
        place = Path("/proc/sys") / name  # of the network namespace of who opens it
        for value in ("1", "0", "1") if place.exists() else ():
            flow.goes_on()
            place.write_text(value)
            flipped += 1
    flow.goes_on()
    flow.stop()
    assert flipped >= 9
    assert flow.arrived == {ALLOWED: list(range(flow.sent)), DENIED: []}
    assert judged(Host(paths))[abi.Path.FROM_VM, abi.Verdict.DROP] == flow.sent
