# SPDX-License-Identifier: Apache-2.0
"""A host of its own for a test: a network namespace, a bpffs and places of vgw, gone afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from vgw.controller import events
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def run(*command: str) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Have this thread, and those it starts, in a network namespace that goes with the block."""
    with Path("/proc/thread-self/ns/net").open() as home:
        _check(_libc.unshare(_CLONE_NEWNET), "unshare the network namespace")
        try:
            yield
        finally:
            _check(_libc.setns(home.fileno(), _CLONE_NEWNET), "return to the network namespace")


@pytest.fixture(autouse=True)
def patient_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records in the log after each flush, also where its thread waits for a processor."""
    monkeypatch.setattr(events, "DRAIN_SECONDS", PATIENCE)


@pytest.fixture
def netns() -> Iterator[None]:
    """Run the test in a network namespace of its own, which goes with it."""
    with own_network():
        yield


@pytest.fixture
def paths(tmp_path: Path, netns: None, program_cache: Path) -> Iterator[Paths]:  # noqa: ARG001
    """Places of vgw in the test's directory, with a bpffs of their own."""
    bpffs = tmp_path / "bpffs"
    bpffs.mkdir()
    run("mount", "-t", "bpf", "bpf", str(bpffs))
    try:
        yield Paths(
            policy=tmp_path / "policy.yaml",
            inventory=tmp_path / "inventory.yaml",
            run_dir=tmp_path / "run",
            state_dir=tmp_path / "state",
            bpffs=bpffs / "vgw",
            cache_dir=program_cache,
            log_file=tmp_path / "events.jsonl",
        )
    finally:
        run("umount", "-l", str(bpffs))


@pytest.fixture
def host(paths: Paths) -> Host:
    """The host that uses these places."""
    return Host(paths)


@pytest.fixture
def veth(netns: None) -> Callable[[str], str]:  # noqa: ARG001
    """Make veth pairs: returns the name given, its peer is NAME-p."""

    def make(name: str) -> str:
        run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-p")
        run("ip", "link", "set", name, "up")
        run("ip", "link", "set", f"{name}-p", "up")
        return name

    return make


@pytest.fixture
def tap(netns: None) -> Iterator[Callable[[str], int]]:  # noqa: ARG001
    """Make TAP interfaces: returns the VM's side, a file descriptor of frames."""
    fds: list[int] = []

    def make(name: str) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fds.append(fd)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
        run("ip", "link", "set", name, "up")
        return fd

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another network namespace, by the process that keeps it."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 600"], stdout=subprocess.PIPE
    )
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b"ready\n"
    yield str(keeper.pid)
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()
