# SPDX-License-Identifier: Apache-2.0
"""What covers each catalogue id: rows, test functions named after it, the README's exceptions."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tests.catalogue.rows import ROWS, can_run
from vgw.policy.model import Hook

ROOT = Path(__file__).parents[2]

_FUNCTION = re.compile(r"test_catalogue((?:_[A-Z][0-9]+)+)_\w+")
_EXCEPTION = re.compile(r"^\| ([A-N][0-9]+(?:, [A-N][0-9]+)*) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def functions_by_id(root: Path = ROOT) -> Mapping[str, list[str]]:
    """Return id -> the test functions named after it, as FILE::NAME, without importing them."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = _FUNCTION.fullmatch(node.name)
                for identity in name[1].split("_")[1:] if name else ():
                    found[identity].append(f"{path.relative_to(root)}::{node.name}")
    return found


def not_runnable(readme: str) -> Mapping[str, str]:
    """Return id -> reason, from the README's table of what cannot run on this kernel.

    Only ids of which nothing runs: where the table names a part, the rest needs its tests.
    """
    section = readme.partition("\n## Packet catalogue\n")[2].partition("\n## ")[0]
    return {
        identity: reason
        for ids, what, reason in _EXCEPTION.findall(section)
        if what == "all of it"
        for identity in ids.split(", ")
    }


def has_rows_for_programs(identity: str) -> bool:
    """Tell whether an id has a row that the loaded programs can be given on some hook."""
    return any(
        can_run(hook, case) for case in ROWS.get(identity, ()) for hook in (Hook.XDP, Hook.TC)
    )
