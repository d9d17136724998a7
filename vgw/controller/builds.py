# SPDX-License-Identifier: Apache-2.0
"""Of which build an endpoint's programs are: a mark beside their pins."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vgw.controller.marks import mark, marked

_MARK: Final = "build_"


def build_of(directory: Path) -> str | None:
    """Return the build of what is pinned in a directory, None where that is not marked."""
    builds = marked(directory, _MARK)
    return builds[0] if len(builds) == 1 else None


def mark_build(directory: Path, build: str) -> None:
    """Say of which build the programs are that are pinned in a directory. Raises OSError."""
    mark(directory, _MARK, build)
