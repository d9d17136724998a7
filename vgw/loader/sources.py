# SPDX-License-Identifier: Apache-2.0
"""The C sources as the compiler gets them: one text per program, and the headers around it."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vgw.errors import CompileError, VgwError
from vgw.libbpf import ProgType

#: Program (and its source file without `.c`) -> type.
PROGRAMS: Final[Mapping[str, ProgType]] = {
    "xdp_from_vm": ProgType.XDP,
    "tc_from_vm": ProgType.SCHED_CLS,
    "tc_to_vm": ProgType.SCHED_CLS,
    "xdp_shield": ProgType.XDP,
    "xdp_from_vm_stage": ProgType.XDP,
    "tc_from_vm_stage": ProgType.SCHED_CLS,
    "tc_to_vm_stage": ProgType.SCHED_CLS,
    "xdp_shield_stage": ProgType.XDP,
    "conntrack_reap": ProgType.SCHED_CLS,
    "flow_report": ProgType.SCHED_CLS,
    "conntrack_import": ProgType.SCHED_CLS,
    "policy_probe": ProgType.SCHED_CLS,
}

_LOCAL_INCLUDE: Final = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_USER_HEADERS: Final = Path("/usr/include")


def bpf_dir() -> Path:
    """Return the directory of the C sources: in the package if installed, else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


@dataclass(frozen=True, slots=True)
class SourceTree:
    """A directory with `NAME.c` for each program NAME, their headers, and the shim in include/."""

    directory: Path
    programs: Mapping[str, ProgType] = field(default_factory=lambda: PROGRAMS)

    def flatten(self, program: str) -> str:
        """Return the source of a program with every `#include "x.h"` replaced by that file.

        BCC rewrites map accesses only in the main file, so headers that use maps must be in it.
        Each header is taken once; `#line` markers keep the names and lines of messages right.
        Raises CompileError when a file cannot be read.
        """
        lines: list[str] = []
        self._append(f"{program}.c", f"the list of programs needs {program}.c", lines, set())
        return "\n".join(lines) + "\n"

    def shim(self) -> list[str]:
        """Return the texts of the headers in include/, each behind its path."""
        paths = sorted((self.directory / "include").rglob("*.h"))
        return [
            part
            for path in paths
            for part in (str(path.relative_to(self.directory)), path.read_text())
        ]

    def _append(self, name: str, wanted_by: str, lines: list[str], seen: set[str]) -> None:
        seen.add(name)
        try:
            text = (self.directory / name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CompileError(f"{wanted_by}, which cannot be read: {error}") from None
        lines.append(f'#line 1 "bpf/{name}"')
        for number, line in enumerate(text.splitlines(), 1):
            include = _LOCAL_INCLUDE.match(line)
            if not include:
                lines.append(line)
            elif include[1] not in seen:
                self._append(include[1], f"bpf/{name}:{number}: includes {include[1]}", lines, seen)
                lines.append(f'#line {number + 1} "bpf/{name}"')
            else:
                lines.append("")


def write_headers(source: SourceTree, directory: Path) -> list[str]:
    """Make a kernel source tree of the shim in `directory`; return the compiler's options for it.

    The kernel's public headers come from linux-libc-dev and are searched last, so that the
    shim's empty uapi/linux/bpf.h hides the real one, which BCC's own copy would clash with.
    Raises VgwError when linux-libc-dev is missing.
    """
    shutil.copytree(source.directory / "include", directory / "include")
    public = directory / "public"
    (public / "uapi").mkdir(parents=True)
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    for name, found in (
        ("linux", _USER_HEADERS / "linux"),
        ("asm-generic", _USER_HEADERS / "asm-generic"),
        ("asm", _USER_HEADERS / machine / "asm"),
    ):
        if not found.is_dir():
            raise VgwError(f"{found} is missing: run `apt install linux-libc-dev`")
        (public / "uapi" / name).symlink_to(found)
    return ["-idirafter", str(public), "-idirafter", str(public / "uapi")]
