# SPDX-License-Identifier: Apache-2.0
"""Nothing is shipped for other tools that no test has used."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"


def unused(files: Collection[Path], texts: Collection[str]) -> set[str]:
    """Return the files of which no test names the directory and the file."""
    return {
        str(file.relative_to(CONTRIB))
        for file in files
        if not any(
            f"contrib/{file.relative_to(CONTRIB).parent}" in text and file.name in text
            for text in texts
        )
    }


def test_every_file_is_used_by_a_test() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    texts = [path.read_text() for path in tests]
    files = [path for path in CONTRIB.rglob("*") if path.is_file()]
    assert files
    assert unused(files, texts) == set()
    assert unused([CONTRIB / "systemd/nobody.service"], texts) == {"systemd/nobody.service"}
