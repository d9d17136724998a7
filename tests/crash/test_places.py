# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, file systems that are read-only or gone: real ones, under a protected VM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Final

import pytest

from tests.crash.killing import Ended, run_change
from tests.crash.probe import OPEN, A, B
from tests.crash.scenarios import attach, under_a
from tests.crash.world import VM, World, run
from vgw.controller.manifest import load_manifest

pytestmark = pytest.mark.bpf

_CLONE_NEWNS: Final = 0x20000


def own_mounts() -> None:
    """Have this process see file systems of its own from now on."""
    assert ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
    run("mount", "--make-rprivate", "/")


def tried(world: World, prepare: Callable[[World], None]) -> Ended:
    """Ask for policy b in a process that sees file systems of its own; return how that ended."""

    def change() -> object:
        own_mounts()
        prepare(world)
        return attach(world, B)

    return run_change(world.paths, change)


def refused(world: World, prepare: Callable[[World], None], said: str) -> None:
    """Check that policy b is refused in one line, changes nothing, and is taken afterwards."""
    was = world.left()
    world.prober.seen()
    judge = OPEN if not was.attached else A

    ended = tried(world, prepare)

    assert ended.error is not None
    assert said in ended.error
    assert "\n" not in ended.error
    assert ended.error.startswith(("VgwError", "KernelError"))
    assert world.prober.now() == {judge}
    assert world.left() == was
    attach(world, B)
    assert world.prober.now() == {B}


@pytest.fixture(params=[False, True], ids=["fresh", "protected"])
def there(a_world: World, request: pytest.FixtureRequest) -> World:
    """A world whose VM is protected already, or is not."""
    a_world.paths.state_dir.mkdir()
    if request.param:
        under_a(a_world)
    return a_world


# --- M26: bpffs -------------------------------------------------------------------------------


def bpffs_read_only(world: World) -> None:
    mount = str(world.paths.bpffs.parent)
    run("mount", "--bind", mount, mount)
    run("mount", "-o", "remount,bind,ro", mount)


def bpffs_gone(world: World) -> None:
    run("umount", "-l", str(world.paths.bpffs.parent))


def another_bpffs(world: World) -> None:
    run("mount", "-t", "tmpfs", "tmpfs", str(world.paths.bpffs.parent))


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (bpffs_read_only, "Read-only file system; remount it by `mount -o remount,rw`"),
        (bpffs_gone, "is not in a bpffs: run `mkdir -p"),
        (another_bpffs, "is not in a bpffs: run `mkdir -p"),
    ],
    ids=["read-only", "unmounted", "hidden"],
)
def test_catalogue_M26_a_bpffs_that_cannot_be_used_changes_nothing(
    there: World, prepare: Callable[[World], None], said: str
) -> None:
    refused(there, prepare, said)


def test_catalogue_M26_a_bpffs_that_goes_in_the_middle(a_world: World) -> None:
    """What is pinned is not to be found again, and goes on."""
    under_a(a_world)
    was = a_world.left()

    def take_away() -> int:
        own_mounts()
        bpffs_gone(a_world)
        return 0

    found = run_change(a_world.paths, partial(attach, a_world, B)).steps
    under_a(a_world)
    for step in (found[3], next(each for each in found if each.what == "map create")):
        ended = run_change(a_world.paths, partial(attach, a_world, B), step, take_away)
        assert ended.error is None or ended.error.startswith(("VgwError", "KernelError"))
        assert a_world.prober.now() == {A} if ended.error else a_world.prober.now() <= {A, B}
        under_a(a_world)
        assert a_world.left() == was


# --- M31: the state directory ---------------------------------------------------------------------


def full(world: World) -> None:
    """Put the state on a file system without room, with what was in it."""
    hold = world.paths.state_dir.with_name("hold")
    run("cp", "-a", str(world.paths.state_dir), str(hold))
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(world.paths.state_dir))
    run("cp", "-a", f"{hold}/.", str(world.paths.state_dir))
    run("rm", "-r", str(hold))
    with (world.paths.state_dir / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return


def state_read_only(world: World) -> None:
    mount = str(world.paths.state_dir)
    run("mount", "--bind", mount, mount)
    run("mount", "-o", "remount,bind,ro", mount)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (full, "No space left on device; make room there, or choose another directory by"),
        (state_read_only, "Read-only file system; remount it by `mount -o remount,rw`, or choose"),
    ],
    ids=["full", "read-only"],
)
def test_catalogue_M31_a_state_directory_that_takes_nothing_changes_nothing(
    there: World, prepare: Callable[[World], None], said: str
) -> None:
    refused(there, prepare, said)


def test_catalogue_M31_what_is_in_force_needs_no_state_directory(a_world: World) -> None:
    """It is looked at, and a packet is judged, while the directory is full."""
    under_a(a_world)

    def look() -> object:
        own_mounts()
        full(a_world)
        (row,) = a_world.host().status(VM)["vms"][0]["interfaces"]
        assert row["attached"]
        assert load_manifest(a_world.paths.manifest(VM)) is not None
        return None

    assert run_change(a_world.paths, look).error is None
    assert a_world.prober.now() == {A}
