# SPDX-License-Identifier: Apache-2.0
"""Directories are looked at again when they changed, whatever became of them, and only then."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vgw.controller.directory_notes import DirectoryNotes
from vgw.controller.stamps import Stamps, stamp


def remove(directory: Path) -> None:
    for entry in directory.iterdir():
        entry.unlink()
    directory.rmdir()


def replace(directory: Path) -> None:
    """Put an empty directory into the place of one; an endpoint's has a pin."""
    directory.rename(directory.with_name("aside"))
    directory.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "made in it": lambda root: (root / "web01/tap0/new").touch(),
    "removed from it": lambda root: (root / "web01/tap0/pin").unlink(),
    "renamed in it": lambda root: (root / "web01/tap0/pin").rename(root / "web01/tap0/other"),
    "moved out of it": lambda root: (root / "web01/tap0/pin").rename(root / "pin"),
    "it removed": lambda root: remove(root / "web01/tap0"),
    "it moved": lambda root: (root / "web01/tap0").rename(root / "web01/tap9"),
    "another in its place": lambda root: replace(root / "web01/tap0"),
    "its VM moved": lambda root: (root / "web01").rename(root / "db01"),
    "another VM in its place": lambda root: replace(root / "web01"),
    "the root moved": lambda root: root.rename(root.with_name("elsewhere")),
    "another root in its place": replace,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An endpoint with a pin."""
    made = tmp_path / "pins"
    (made / "web01/tap0").mkdir(parents=True)
    (made / "web01/tap0/pin").touch()
    for directory in (made, made / "web01", made / "web01/tap0"):
        os.utime(directory, ns=(1, 1))
    return made


class Asked(Stamps):
    """Stamps of all three directories, and how many of them the kernel was asked for."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(str(root))
        self.asked = 0
        self.directories = [str(root), f"{root}/web01", f"{root}/web01/tap0"]

        def count(directory: str, **options: bool) -> object:
            self.asked += directory != str(root)
            return real(directory, **options)

        real = os.stat
        patch.setattr("vgw.controller.stamps.os.stat", count)

    def look(self) -> list[object]:
        self.asked = 0
        self.refresh()
        return [self.of(each) for each in self.directories]


def test_directories_that_did_not_change_are_not_looked_at(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = Asked(root, monkeypatch)
    first = stamps.look()
    assert stamps.asked == 2
    assert stamps.look() == first
    assert stamps.asked == 0
    assert not stamps.refresh()
    (root / "web01/tap0/new").touch()
    assert stamps.look() != first
    assert stamps.asked == 1


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(root: Path, change: Callable[[Path], object]) -> None:
    stamps = Stamps(str(root))
    endpoint, vm = f"{root}/web01/tap0", f"{root}/web01"
    for _ in range(2):
        stamps.refresh()
        before = [stamps.of(str(root)), stamps.of(vm), stamps.of(endpoint)]
    change(root)
    assert stamps.refresh()
    now = [stamps.of(str(root)), stamps.of(vm), stamps.of(endpoint)]
    assert now == [stamp(str(root)), stamp(vm), stamp(endpoint)]
    assert now != before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_endpoint_that_comes_after_a_change_is_noticed(
    root: Path, change: Callable[[Path], object]
) -> None:
    stamps = Stamps(str(root))
    endpoint = root / "web01/tap0"
    places = [str(each) for each in (root, endpoint.parent, endpoint)]
    steps: list[Callable[[], object]] = [dict, lambda: change(root), lambda: make(endpoint), dict]
    for step in steps:
        step()
        stamps.refresh()
        assert [stamps.of(place) for place in places] == [stamp(place) for place in places]


def make(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "fresh").touch()


def test_lost_notes_are_changes_of_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = Asked(root, monkeypatch)
    stamps.look()
    monkeypatch.setattr(DirectoryNotes, "take", lambda _: None)
    assert stamps.refresh()
    stamps.look()
    assert stamps.asked == 2


@pytest.mark.parametrize("lack", ["no notes", "no watches"])
def test_without_notes_directories_are_looked_at_each_time(
    root: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    """On a kernel without them, or where a limit of the user is reached."""
    if lack == "no watches":
        monkeypatch.setattr(DirectoryNotes, "watch", lambda *_: None)
    else:
        monkeypatch.setattr(DirectoryNotes, "__init__", refused)
    stamps = Asked(root, monkeypatch)
    first = stamps.look()
    (root / "web01/tap0/new").touch()
    assert stamps.refresh()
    assert stamps.look() != first
    assert stamps.asked


def refused(notes: DirectoryNotes) -> None:
    """Begin as where there are too many listeners."""
    library = ctypes.CDLL(None)
    notes._add, notes._remove = library.inotify_add_watch, library.inotify_rm_watch
    notes._fd, notes._end = -1, None


def test_nothing_stays_of_directories_that_went(root: Path) -> None:
    stamps = Stamps(str(root))
    stamps.refresh()
    for number in range(50):
        made = root / "web01" / f"tap{number + 1}"
        made.mkdir()
        stamps.refresh()
        stamps.of(str(root / "web01"))
        assert stamps.of(str(made)) is not None
        if number % 2:
            made.rename(root / "web01/moved")
            stamps.refresh()
            assert stamps.of(str(root / "web01/moved")) is not None
            (root / "web01/moved").rmdir()
        else:
            made.rmdir()
        stamps.refresh()
    assert len(stamps._known) <= 1
    assert len(stamps._watches) == len(stamps._directories) == 1


def test_what_nobody_listens_to_any_more_ends() -> None:
    def listeners() -> int:
        found = (each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
        return sum(str(each) == "anon_inode:inotify" for each in found)

    before = listeners()
    notes = DirectoryNotes()
    assert listeners() == before + 1
    del notes
    assert listeners() == before
    notes = DirectoryNotes()
    notes.close()
    assert listeners() == before
    assert notes.take() == []
