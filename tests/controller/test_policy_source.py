# SPDX-License-Identifier: Apache-2.0
"""Reading a policy that changes meanwhile, or gives no answer."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from vgw.controller import policy_source
from vgw.controller.policy_files import read_sources
from vgw.controller.policy_source import SourceHangsError, SourceReader, read_steadily
from vgw.errors import VgwError

TEXT = "schema: vgw/v1\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policy.d"
    path.mkdir()
    for name in "ab":
        (path / f"{name}.yaml").write_text(TEXT)
    return path


def meanwhile(monkeypatch: pytest.MonkeyPatch, *changes: object) -> list[int]:
    """Have a change made at each reading, after the look at what is there; count the readings."""
    readings = [0]
    left = list(changes)

    def read(path: Path) -> list[tuple[str, str]]:
        readings[0] += 1
        first = None if not left else left.pop(0)
        if callable(first):
            first()
        return read_sources(path)

    monkeypatch.setattr(policy_source, "read_sources", read)
    return readings


def test_files_are_read_as_they_are(directory: Path) -> None:
    assert [Path(name).name for name, _ in read_steadily(directory)] == ["a.yaml", "b.yaml"]
    assert read_steadily(directory / "a.yaml") == [(str(directory / "a.yaml"), TEXT)]


def test_catalogue_M10_a_file_that_vanishes_while_it_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish() -> None:
        (directory / "b.yaml").unlink()

    readings = meanwhile(monkeypatch, vanish)
    assert [Path(name).name for name, _ in read_steadily(directory)] == ["a.yaml"]
    assert readings == [2], "what was read first was of two moments"


def test_catalogue_M10_a_file_that_is_written_while_it_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow() -> None:
        (directory / "a.yaml").write_text(TEXT + "vms: {}\n")

    readings = meanwhile(monkeypatch, grow)
    assert read_steadily(directory)[0][1] == TEXT + "vms: {}\n"
    assert readings == [2]


def test_catalogue_M10_one_that_never_comes_to_rest_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))

    def change() -> None:
        (directory / "a.yaml").write_text(f"{TEXT}# {next(count)}\n")

    meanwhile(monkeypatch, *[change] * 50)
    with pytest.raises(VgwError, match="changes while it is read; write its files aside"):
        read_steadily(directory)


def test_catalogue_M10_a_file_that_was_just_written_is_looked_at_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file that is being written may be a policy, too."""
    file, whole = directory / "a.yaml", TEXT + "vms: {}\n"
    file.write_text(TEXT)
    waits: list[float] = []

    def write_the_rest(seconds: float) -> None:
        waits.append(seconds)
        file.write_text(whole)
        for each in directory.iterdir():
            os.utime(each, (0, 0))  # as if it were written long ago

    monkeypatch.setattr("vgw.controller.policy_source.time.sleep", write_the_rest)
    assert read_steadily(directory, quiet=3600.0)[0][1] == whole
    assert waits == [3600.0]


def test_a_mistake_that_stays_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match="cannot be read: No such file"):
        read_steadily(tmp_path / "nowhere")


def test_catalogue_M9_a_source_that_hangs_is_given_up_without_spinning(tmp_path: Path) -> None:
    fifo = tmp_path / "policy.yaml"
    os.mkfifo(fifo)
    reader = SourceReader(fifo, seconds=0.2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()

    with pytest.raises(SourceHangsError, match=r"gave no answer within 0\.2 s"):
        reader.read()
    took = time.monotonic() - started
    threads = threading.active_count()
    for _ in range(100):
        with pytest.raises(SourceHangsError):
            reader.read()
        assert reader.digest() is None

    used = resource.getrusage(resource.RUSAGE_SELF)
    assert took >= 0.2
    assert used.ru_utime - before.ru_utime < 0.5 * took + 0.1, "it spins"
    assert threading.active_count() == threads, "each attempt leaves a thread"
    assert reader.hangs

    fifo.write_text(TEXT)  # the reading that was given up gets this
    fifo.unlink()
    fifo.write_text(TEXT)
    reading = reader._reading
    assert reading is not None
    assert reading.wait(PATIENCE)
    assert reader.read() == [(str(fifo), TEXT)]
