# SPDX-License-Identifier: Apache-2.0
"""What is kept of listed directories is what is there now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vgw.controller.pin_tree import PinTree
from vgw.controller.stamps import stamp

LONG_AGO_NS = 1_000_000_000_000_000_000


def settle(*directories: Path) -> None:
    """Have directories changed long ago, so that they need not be listed again."""
    for directory in directories:
        os.utime(directory, ns=(LONG_AGO_NS, LONG_AGO_NS))


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    """Two VMs, one with two interfaces, and what is beside them."""
    for name in ("web01/tap0", "web01/tap1", "db01/tap%2e0", "images/abc", "web01/%%tap0"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("events", "web01/file"):
        (tmp_path / name).touch()
    settle(tmp_path, *tmp_path.iterdir())
    return tmp_path


def places(tree: PinTree) -> list[tuple[str, str]]:
    return list(tree.endpoints())


ALL = [("db01", "tap.0"), ("web01", "tap0"), ("web01", "tap1")]


def test_endpoints_are_found_in_order_of_their_places(pins: Path) -> None:
    tree = PinTree(pins)
    assert places(tree) == ALL
    assert tree.endpoints()["db01", "tap.0"] == str(pins / "db01/tap%2e0")


def test_nothing_is_listed_again_as_long_as_nothing_changes(
    pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = PinTree(pins)
    before = tree.endpoints()
    with monkeypatch.context() as patched:
        patched.delattr(os, "scandir")
        assert tree.endpoints() is before
    (pins / "web01" / "tap2").mkdir()
    listed: list[str] = []
    scandir = os.scandir

    def noted(path: str) -> object:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    tree.endpoints()
    assert listed == [str(pins / "web01")]


def test_what_comes_and_goes_is_noticed(pins: Path) -> None:
    tree = PinTree(pins)
    assert places(tree) == ALL
    (pins / "web01" / "tap0").rmdir()
    assert places(tree) == [ALL[0], ALL[2]]
    (pins / "new" / "tap9").mkdir(parents=True)
    assert places(tree) == [ALL[0], ("new", "tap9"), ALL[2]]
    (pins / "web01" / "tap1").rename(pins / "web01" / "tap0")
    assert places(tree) == [ALL[0], ("new", "tap9"), ALL[1]]
    (pins / "new").rename(pins / "other")
    assert places(tree) == [ALL[0], ("other", "tap9"), ALL[1]]
    (pins / "db01" / "tap%2e0").rmdir()
    (pins / "db01").rmdir()
    assert places(tree) == [("other", "tap9"), ALL[1]]


def test_a_second_change_in_the_same_tick_of_the_clock_is_noticed(pins: Path) -> None:
    tree, web01 = PinTree(pins), pins / "web01"
    (web01 / "tap2").mkdir()
    first = web01.stat().st_mtime_ns
    assert ("web01", "tap2") in places(tree)
    (web01 / "tap3").mkdir()
    os.utime(web01, ns=(first, first))
    assert ("web01", "tap3") in places(tree)


def test_without_pins_there_are_none_until_there_are(tmp_path: Path) -> None:
    tree = PinTree(tmp_path / "v1")
    assert places(tree) == []
    (tmp_path / "v1" / "web01" / "tap0").mkdir(parents=True)
    assert places(tree) == [("web01", "tap0")]
    (tmp_path / "v1").rename(tmp_path / "v2")
    assert places(tree) == []
    assert stamp(str(tmp_path / "v1")) is None
