# SPDX-License-Identifier: Apache-2.0
"""Locks: who shares a bpffs shares them, whatever else is apart, and they leave nothing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from vgw.controller.lock import DirectoryLock, WriterLock, controller_lock, remove_stale
from vgw.controller.paths import Paths
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf

_HOLD = """
import sys, time
from pathlib import Path
from vgw.controller.lock import DirectoryLock
assert DirectoryLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Have another process hold a lock until it is killed."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_writer_waits_and_then_names_the_first(paths: Paths) -> None:
    lock = WriterLock(paths.bpffs, wait_seconds=0.1)
    other = hold(paths.bpffs / "writer")
    try:
        message = f"process {other.pid} is changing vgw's"
        with pytest.raises(VgwError, match=message), lock.held():
            pytest.fail("two writers at once")
    finally:
        end(other)

    with lock.held(), lock.held():
        assert DirectoryLock(paths.bpffs / "writer").holder() == os.getpid()
    assert not paths.bpffs.exists()


def test_writers_take_turns_while_the_lock_comes_and_goes(paths: Paths) -> None:
    """Each holder removes the directory that others wait for."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        lock = WriterLock(paths.bpffs)
        for _ in range(50):
            with lock.held():
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert most == 1
    assert not paths.bpffs.exists()


@pytest.mark.parametrize("shared", ["run_dir", "bpffs"])
def test_catalogue_M27_there_is_one_controller_of_a_socket_and_of_a_bpffs(
    paths: Paths, tmp_path: Path, shared: str
) -> None:
    apart = {"run_dir": tmp_path / "other", "bpffs": paths.bpffs.with_name("other")}
    del apart[shared]
    other = dataclasses.replace(paths, **apart)
    with (
        controller_lock(paths),
        pytest.raises(VgwError, match=rf"already running \(pid {os.getpid()}\)"),
        controller_lock(other),
    ):
        pytest.fail("two controllers at once")

    with controller_lock(other):
        assert other.bpffs.exists()
    assert not paths.bpffs.exists()


def test_the_lock_of_a_killed_controller_is_free_and_swept_up(paths: Paths) -> None:
    place = paths.bpffs / "controller"
    killed = hold(place)
    remove_stale(paths.bpffs)
    assert DirectoryLock(place).holder() == killed.pid
    end(killed)
    assert place.exists()

    remove_stale(paths.bpffs)
    assert not place.exists()
    with controller_lock(paths):
        remove_stale(paths.bpffs)
        assert place.exists()


def test_a_place_that_cannot_be_locked_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VgwError, match=r"cannot lock .*VGW_BPFFS"):
        DirectoryLock(tmp_path / "file" / "writer").acquire()
