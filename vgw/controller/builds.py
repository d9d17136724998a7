# SPDX-License-Identifier: Apache-2.0
"""Of which build an endpoint's programs are: a mark beside their pins."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vgw import files
from vgw.controller.pins import names

_MARK: Final = "build_"


def build_of(directory: Path) -> str | None:
    """Return the build of what is pinned in a directory, None where that is not marked."""
    marks = _marks(directory)
    return marks[0].name.removeprefix(_MARK) if len(marks) == 1 else None


def mark_build(directory: Path, build: str) -> None:
    """Say of which build the programs are that are pinned in a directory. Raises OSError."""
    mark = directory / f"{_MARK}{build}"
    files.mkdir(mark, 0o700, exist_ok=True)
    for other in _marks(directory):
        if other != mark:
            files.rmdir(other)


def _marks(directory: Path) -> list[Path]:
    return [directory / name for name in names(directory) if name.startswith(_MARK)]
