# SPDX-License-Identifier: Apache-2.0
"""Whether the environment makes this process run code of others.

Somebody who may set variables of a command that root runs, but may not become root, could have the
loader or Python load their code. By the time this looks, such code runs already if it is any
cleverer than to wait; what is caught is the mistake before somebody uses it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from vgw.errors import VgwError

#: Variables that name files or directories of code, and what separates these.
_CODE: Final[Mapping[str, str]] = {
    "LD_PRELOAD": ": ",
    "LD_AUDIT": ":",
    "LD_LIBRARY_PATH": ":;",
    "PYTHONPATH": ":",
    "PYTHONHOME": ":",
    "PYTHONUSERBASE": "",
}
#: Names without a slash in these are looked for where the system's own libraries are.
_LIBRARIES: Final = ("LD_PRELOAD", "LD_AUDIT")


def require_own_code(environ: Mapping[str, str]) -> None:
    """Raise VgwError when others than root and this user can change code that is to be loaded."""
    for variable in _CODE:
        for entry in _entries(variable, environ.get(variable, "")):
            if not _is_own(entry):
                raise VgwError(
                    f"{variable} names {entry or 'the current directory'}, where other users can "
                    f"put code: unset it (`env -u {variable} vgw ...`)"
                )


def _entries(variable: str, value: str) -> Iterator[str]:
    """Yield the parts of a variable; an empty one is the current directory."""
    if not value:
        return
    separators = _CODE[variable]
    for separator in separators[1:]:
        value = value.replace(separator, separators[0])
    for entry in value.split(separators[0]) if separators else [value]:
        if variable in _LIBRARIES and "/" not in entry:
            continue
        yield entry


def _is_own(entry: str) -> bool:
    """Tell whether only root and this user can change a path, or what is on the way to it."""
    if not entry.startswith("/"):
        return False
    path = Path(entry)
    is_last = True
    for each in (path, *path.parents):
        try:
            facts = each.stat()
        except OSError:
            continue  # whoever may make it may change the directory, which comes next
        shared = stat.S_IWGRP | stat.S_IWOTH
        # In a sticky directory others cannot replace what is there.
        allowed = shared if facts.st_mode & stat.S_ISVTX and not is_last else 0
        if facts.st_uid not in {0, os.geteuid()} or facts.st_mode & shared & ~allowed:
            return False
        is_last = False
    return True
