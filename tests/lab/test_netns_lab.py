# SPDX-License-Identifier: Apache-2.0
"""The lab script itself: it builds, survives being killed, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab import wire
from tests.lab.conftest import PREFIX
from tests.lab.topology import run_script

pytestmark = pytest.mark.lab

NODES = ("host", "web01", "db01", "client")


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a lab, which is removed afterwards whatever is left of it."""
    lab = f"{PREFIX}{os.getpid()}-own"
    yield lab
    run_script(lab, "down")


def traces(lab: str) -> list[str]:
    """Return what exists of a lab: namespaces, directory, mounts."""
    namespaces = [str(path) for path in Path("/run/netns").glob(f"{lab}-*")]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if f"/{lab}/" in line]
    return namespaces + mounts + [str(path) for path in Path("/run").glob(lab)]


def everybody_answers(lab: str) -> bool:
    nodes = wire.lab_nodes(lab)
    return all(
        wire.ping(nodes["client"], nodes[vm].address(family))
        for vm in ("web01", "db01")
        for family in (4, 6)
    )


def test_up_and_down(name: str) -> None:
    own_links = subprocess.check_output(["ip", "-o", "link"])
    run_script(name, "up")
    assert everybody_answers(name)
    assert "The lab is up" in run_script(name, "status").stdout
    assert subprocess.check_output(["ip", "-o", "link"]) == own_links
    run_script(name, "down")
    assert traces(name) == []
    assert run_script(name, "status").stdout == "The lab is down.\n"


def test_up_repairs_a_lab_whose_guest_was_killed(name: str) -> None:
    run_script(name, "up")
    guest = int(Path("/run", name, "web01.pid").read_text())
    os.kill(guest, signal.SIGKILL)
    assert "half there" in run_script(name, "status").stdout
    run_script(name, "up")
    assert everybody_answers(name)


@pytest.mark.parametrize("missing", ["namespace", "mount"])
def test_down_removes_a_half_built_lab(name: str, missing: str) -> None:
    run_script(name, "up")
    if missing == "namespace":
        subprocess.run(["ip", "netns", "delete", f"{name}-client"], check=True)
    else:
        subprocess.run(["umount", f"/run/{name}/bpf"], check=True)
    run_script(name, "down")
    assert traces(name) == []


def test_down_ends_what_runs_inside(name: str) -> None:
    run_script(name, "up")
    node = wire.lab_nodes(name)["client"]
    with subprocess.Popen(node.command("busybox", "nc", "-l", "-p", "7")) as process:
        run_script(name, "down")
        assert process.wait(timeout=wire.PATIENCE) != 0
    assert traces(name) == []


@pytest.mark.parametrize("bad", ["../etc", "A", "x;y", "x" * 40])
def test_a_dangerous_name_is_refused(bad: str) -> None:
    run = run_script(bad, "down", check=False)
    assert run.returncode == 1
    assert "is no name for a lab" in run.stderr


def test_the_demo_shows_what_the_policy_says(name: str) -> None:
    run = run_script(name, "demo", check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rows are as the policy says" in run.stdout
    assert "WRONG" not in run.stdout


@pytest.mark.parametrize("command", ["up", "down", "status", "shell host", "exec host true"])
def test_every_command_says_that_it_needs_root(command: str) -> None:
    reading = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", *reading)
    script = Path(__file__).parents[2] / "scripts" / "netns-lab.sh"
    done = subprocess.run(
        [*nobody, script, *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "network namespaces need root" in done.stderr
