# SPDX-License-Identifier: Apache-2.0
"""When a VM is protected: before it can send, in whatever order the host starts things."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.controller.conftest import run
from tests.controller.observe import row
from tests.controller.policies import document, from_vm
from tests.controller.process import Controller, environment_of, eventually
from tests.controller.test_daemon import NEVER_IDLE, policy
from tests.patience import PATIENCE
from vgw.controller.interfaces import wait_for
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

pytestmark = [pytest.mark.bpf, pytest.mark.usefixtures("artefact")]

_DENIED = "{ingress: drop, egress: drop}"


def test_catalogue_M13_what_is_attached_while_it_is_down_never_sends_unjudged(
    host: Host, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    run("ip", "link", "set", "tap0", "down")
    with pytest.raises(OSError, match="Input/output error"):
        os.write(vm, from_vm())
    host.attach(document("[]", defaults=_DENIED), "web01")
    run("ip", "link", "set", "tap0", "up")

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("tap0", 0))
        os.write(vm, from_vm())
    assert row(host)["drops"] == 1


def command(paths: Paths, *arguments: str) -> subprocess.Popen[str]:
    """Run vgw in this network namespace."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from vgw.cli import main; main()", *arguments],
        env={**os.environ, **environment_of(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listened_for() -> bool:
    """Tell whether somebody in this network namespace waits for messages of interfaces."""
    lines = Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]
    return any(line.split()[1] == "0" and line.split()[3] == "00000001" for line in lines)


def test_catalogue_M12_a_boot_script_waits_until_every_vm_is_protected(
    host: Host, paths: Paths, veth: Callable[[str], str]
) -> None:
    paths.policy.write_text(policy(("web01", "veth0"), ("db01", "veth1")))
    veth("veth0")
    waiting = command(paths, "attach", "--all", "--wait", str(PATIENCE))
    eventually("it listens for interfaces", listened_for)
    veth("veth1")
    out, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0, err
    assert "web01" in out
    assert [row(host, vm)["attached"] for vm in ("web01", "db01")] == [True, True]


def test_catalogue_M12_a_boot_script_fails_when_an_interface_does_not_come(
    host: Host, paths: Paths, veth: Callable[[str], str]
) -> None:
    paths.policy.write_text(policy(("web01", "veth0"), ("db01", "veth1")))
    veth("veth0")
    waiting = command(paths, "attach", "--all", "--wait", "0.3")
    _, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode != 0
    assert "veth1" in err
    assert row(host)["attached"]
    assert host.attached() == ["web01"]


def test_waiting_for_interfaces(veth: Callable[[str], str]) -> None:
    veth("first")
    assert wait_for(["first", "lo"], 0) == []
    assert wait_for(["first", "second"], 0.1) == ["second"]
    assert wait_for([], 0) == []


def test_catalogue_M13_time_from_the_interface_to_its_protection(
    paths: Paths, veth: Callable[[str], str]
) -> None:
    """Not a bound, but that the event is followed, for this controller never looks around."""
    run("ip", "link", "set", "lo", "up")
    paths.policy.write_text(policy(("web01", "veth0")))
    controller = Controller(paths, 9477, NEVER_IDLE)
    try:
        veth("veth0")
        came = time.monotonic()
        eventually("attached", lambda: paths.endpoint_dir("web01", "veth0").exists())
        eventually("protected", lambda: row(Host(paths))["attached"])
        print(f"ready after {time.monotonic() - came:.3f} s")
    finally:
        controller.end(signal.SIGKILL)
        Host(paths).detach_all()
        assert Path(paths.policy).exists()
