# SPDX-License-Identifier: Apache-2.0
"""Plots are pictures, one for each of what there are numbers of."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lab import BenchError
from bench.plots import draw
from bench.report import Row
from bench.size.figures import FLOWS, KIB, NS, VMS, row

ROWS = [
    *(row("packet", NS, VMS, size, (size * 1.0,), "tc_to_vm") for size in (1, 10)),
    row("maps", KIB, VMS, 10, (5.0,)),
    row("packet", NS, FLOWS, 1000, (3.0,)),
    Row("other", "packet", NS, (1.0,)),
]
PNG = b"\x89PNG\r\n\x1a\n"


def test_each_kind_of_size_has_a_picture(tmp_path: Path) -> None:
    found = draw(ROWS, tmp_path / "plots")
    assert [path.name for path in found] == ["vms.png", "flows.png"]
    assert all(path.read_bytes().startswith(PNG) for path in found)


def test_other_parts_have_none(tmp_path: Path) -> None:
    assert draw(ROWS[-1:], tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_directory_is_said(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    with pytest.raises(BenchError, match="cannot write plots"):
        draw(ROWS, tmp_path / "file")
