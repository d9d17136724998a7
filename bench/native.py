# SPDX-License-Identifier: Apache-2.0
"""Builds the programs in C that measurements run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from vgw.errors import VgwError

_CC: Final = ("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror")


def build(name: str, directory: Path) -> Path:
    """Compile bench/NAME.c and return the program, `directory`/NAME. Raises VgwError."""
    program = directory / name
    source = Path(__file__).with_name(f"{name}.c")
    run = subprocess.run(
        [*_CC, "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise VgwError(f"{source.name} does not compile: {run.stderr.strip()}")
    return program
