# SPDX-License-Identifier: Apache-2.0
"""Marks beside an endpoint's pins: empty directories whose names tell, for bpffs has no files."""

from __future__ import annotations

from pathlib import Path

from vgw import files
from vgw.controller.pins import names


def marked(directory: Path, prefix: str) -> list[str]:
    """Return what the marks with a prefix say; more than one where a change was killed."""
    return [name.removeprefix(prefix) for name in names(directory) if name.startswith(prefix)]


def mark(directory: Path, prefix: str, value: str) -> None:
    """Mark a directory with a value, in place of those before. Raises OSError."""
    files.mkdir(directory / f"{prefix}{value}", 0o700, exist_ok=True)
    for other in marked(directory, prefix):
        if other != value:
            files.rmdir(directory / f"{prefix}{other}")
