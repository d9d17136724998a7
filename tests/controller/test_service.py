# SPDX-License-Identifier: Apache-2.0
"""contrib/systemd as shipped, run by a systemd that was booted for it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.controller import observe, process
from tests.controller.booted import ROOT, Booted, booted
from tests.controller.conftest import run
from tests.controller.policies import to_vm
from tests.patience import PATIENCE
from vgw.controller.fitness import NEEDED_CAPABILITIES

pytestmark = pytest.mark.bpf

SHIPPED = ROOT / "contrib/systemd"
UNIT = "/run/units/vgw.service"
SERVICE = "vgw.service"
POLICY = """
schema: vgw/v1
vms:
  web01: {interfaces: [{name: tap0, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]}
  web02: {interfaces: [{name: tap1}]}
policies:
  - name: base
    tier: vm
    applies_to: {all: true}
    ingress:
      - {name: http, action: accept, services: [tcp/80]}
      - {name: telnet, action: drop, services: [tcp/23], log: true}
"""
Tap = Callable[[str], int]


@pytest.fixture
def host(netns: None) -> Iterator[Booted]:  # noqa: ARG001
    """A booted host on which the service is installed as its files say."""
    run("ip", "link", "set", "lo", "up")
    with booted() as made:
        made.run("mkdir", "-p", "/etc/sysusers.d", "/etc/tmpfiles.d", f"{UNIT}.d")
        made.write(UNIT, (SHIPPED / "vgw.service").read_text())
        made.write("/etc/sysusers.d/vgw.conf", (SHIPPED / "vgw.sysusers").read_text())
        made.write("/etc/tmpfiles.d/vgw.conf", (SHIPPED / "vgw.tmpfiles").read_text())
        drop_in(made, "StandardOutput=append:/run/console", "StandardError=append:/run/console")
        made.run("systemd-sysusers", "vgw.conf")
        made.run("systemd-tmpfiles", "--create", "vgw.conf")
        made.write("/etc/vgw/policy.d/site.yaml", POLICY)
        made.run("systemctl", "daemon-reload")
        yield made


def drop_in(host: Booted, *lines: str, name: str = "output") -> None:
    host.write(f"{UNIT}.d/{name}.conf", "\n".join(["[Service]", *lines, ""]))


def eventually(what: str, ask: Callable[[], bool]) -> None:
    process.eventually(what, ask, PATIENCE)


def passes(vm: int, port: int, name: str = "tap0") -> bool:
    return observe.passes(vm, to_vm(dport=port), name)


def main_pid(host: Booted) -> str:
    return host.show(SERVICE, "MainPID")


def test_the_service_protects_with_three_capabilities(host: Booted, tap: Tap) -> None:
    vm, other = tap("tap0"), tap("tap1")
    host.run("systemctl", "start", SERVICE)

    status = host.run("cat", f"/proc/{main_pid(host)}/status")
    parts = (line.partition(":") for line in status.splitlines())
    facts = {name: value.strip() for name, _, value in parts}
    wanted = sum(1 << bit for bit in NEEDED_CAPABILITIES.values())
    assert {int(facts[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd", "Amb")} == {wanted}
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert facts["Uid"].split()[0] == host.run("id", "-u", "vgw").strip() != "0"

    # The programs are compiled in the sandbox, with no headers of a kernel.
    host.vgw("attach", "--vm", "web01")
    assert [passes(vm, port) for port in (80, 443, 23)] == [True, False, False]
    assert host.run("stat", "-c", "%U", "/var/cache/vgw").strip() == "vgw"
    eventually(
        "the drop is logged",
        lambda: '"telnet"' in host.attempt("cat", "/var/log/vgw/events.jsonl").stdout,
    )
    with urllib.request.urlopen("http://127.0.0.1:9477/metrics", timeout=PATIENCE) as answer:
        metrics = answer.read().decode()
    assert 'vgw_attached{hook="tc",interface="tap0",mode="tcx",vm="web01"} 1.0' in metrics

    host.write("/etc/vgw/policy.d/site.yaml", POLICY.replace("tcp/80]", "tcp/80, tcp/443]"))
    host.run("systemctl", "reload", SERVICE)
    eventually("the changed policy is in force", lambda: passes(vm, 443))

    log_is_rotated(host, vm)

    before = main_pid(host)
    host.run("kill", "-9", before)
    eventually(
        "it is back",
        lambda: main_pid(host) not in (before, "0") and host.show(SERVICE, "SubState") == "running",
    )
    assert [passes(vm, port) for port in (80, 443, 23)] == [True, True, False]

    host.run("systemctl", "stop", SERVICE)
    assert [passes(vm, port) for port in (80, 443, 23)] == [True, True, False]
    # Root goes on without it, and it takes over what root has made.
    host.vgw("mode", "--vm", "web01", "quarantine")
    host.vgw("attach", "--vm", "web02")
    assert (passes(vm, 80), passes(other, 80, "tap1")) == (False, True)
    host.run("systemctl", "start", SERVICE)
    foreign = "find /sys/fs/bpf/vgw /var/lib/vgw /var/cache/vgw /var/log/vgw ! -user vgw"
    assert host.run(*foreign.split()) == ""
    host.vgw("mode", "--vm", "web01", "enforce")
    vms = json.loads(host.vgw("status", "-o", "json"))["vms"]
    assert [row["interfaces"][0]["attached"] for row in vms] == [True, True]
    host.vgw("detach", "--all")
    assert (passes(vm, 23), passes(other, 23, "tap1")) == (True, True)
    host.run("systemctl", "restart", SERVICE)


def log_is_rotated(host: Booted, vm: int) -> None:
    """Let logrotate put the log aside; the service goes on in a new one and loses nothing."""
    host.write("/etc/logrotate.d/vgw", (ROOT / "contrib/logrotate/vgw").read_text())
    log = "/var/log/vgw/events.jsonl"
    before = host.run("cat", log)
    host.run("logrotate", "--force", "--state=/run/rotated", "/etc/logrotate.d/vgw")

    assert host.run("cat", f"{log}.1").startswith(before)
    assert not passes(vm, 23)
    eventually(
        "the next drop is in the new file", lambda: '"telnet"' in host.attempt("cat", log).stdout
    )
    assert host.run("stat", "-c", "%U %a", log).split() == ["vgw", "600"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("SystemCallFilter=~bpf", "Operation not permitted"),
        ("CapabilityBoundingSet=\nCapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF", "CAP_PERFMON is"),
        ("ExecStartPre=", "/run/vgw-pins is not in a bpffs"),
        ("BindPaths=", "/run/vgw-pins is not in a bpffs"),
    ],
)
def test_what_the_unit_allows_is_needed(host: Booted, tap: Tap, change: str, said: str) -> None:
    """The negative control: with less the service does not come to protect anything."""
    tap("tap0")
    drop_in(host, "Restart=no", change, name="less")
    host.run("systemctl", "daemon-reload")

    started = host.attempt("systemctl", "start", SERVICE)
    attached = host.attempt("/opt/vgw/.venv/bin/vgw", "attach", "--vm", "web01")

    output = host.console() + (attached.stderr if started.returncode == 0 else "")
    assert started.returncode != 0 or attached.returncode != 0, output
    assert said in output


def test_systemd_finds_nothing_wrong_and_little_exposed(host: Booted) -> None:
    checked = host.attempt("systemd-analyze", "verify", "--man=no", UNIT)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    rated = host.attempt("systemd-analyze", "security", "--offline=yes", "--threshold=23", UNIT)
    assert rated.returncode == 0, rated.stdout
    print(rated.stdout.splitlines()[-1])  # with -s

    bare = "[Service]\nExecStart=/bin/true\n"  # the control
    host.write("/run/units/bare.service", bare)
    rated = host.attempt(
        "systemd-analyze", "security", "--offline=yes", "--threshold=23", "/run/units/bare.service"
    )
    assert rated.returncode != 0
    text = (SHIPPED / "vgw.service").read_text()
    host.write(UNIT, text.replace("NoNewPrivileges", "NoOldPrivileges"))
    assert "NoOldPrivileges" in host.attempt("systemd-analyze", "verify", "--man=no", UNIT).stderr


def test_nothing_detaches_on_stop_and_guests_start_later() -> None:
    text = (SHIPPED / "vgw.service").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if line.startswith(("ExecStop", "ExecStopPost"))]
    assert "detach" not in "".join(lines)
    (before,) = (line for line in lines if line.startswith("Before="))
    assert {"libvirtd.service", "pve-guests.service", "machines.target"} <= set(before[7:].split())
