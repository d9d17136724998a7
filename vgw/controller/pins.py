# SPDX-License-Identifier: Apache-2.0
"""The directories of endpoints in bpffs, whatever is in them: list, name, remove."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from vgw import files
from vgw.errors import VgwError

#: Prefix of what is not yet in its place; pin_name() makes nothing like it.
ASIDE: Final = "%%"


#: Prefix of an endpoint that is on its way to another name, of all such names.
MOVING: Final = f"{ASIDE}%"


def moving(directory: Path) -> Path:
    """Return where an endpoint waits until the place of its new name is free."""
    return directory.with_name(MOVING + directory.name)


def beside(directory: Path) -> Path:
    """Return where an endpoint is made that is to take the place of another."""
    return directory.with_name(ASIDE + directory.name)


def remove_endpoint(directory: Path) -> None:
    """Remove an endpoint's directory, and that of its VM with the last one."""
    remove_tree(directory)
    with contextlib.suppress(OSError):
        files.rmdir(directory.parent)


def remove_empty(directory: Path) -> None:
    """Remove the empty directories in a directory: of VMs whose last endpoint is gone."""
    for name in directories(directory):
        if not names(directory / name):
            quietly(files.rmdir, directory / name)


def remove_tree(directory: Path) -> None:
    """Remove a directory of bpffs with everything in it."""
    for entry in entries(directory):
        if entry.is_dir():
            remove_tree(entry)
        else:
            files.unlink(entry)
    with contextlib.suppress(FileNotFoundError):
        files.rmdir(directory)


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory, nothing when there is no such directory."""
    return [directory / name for name in names(directory)]


def names(directory: str | Path) -> list[str]:
    """Return the names of what is in a directory, none when there is no such directory."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - for all VMs: a Path takes three times as long
    except (FileNotFoundError, NotADirectoryError):
        return []


def directories(directory: str | Path) -> list[str]:
    """Return the names of the directories in a directory, none when there is no such directory."""
    try:
        with os.scandir(directory) as found:
            return [entry.name for entry in found if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def all_endpoint_dirs(pins: Path) -> Iterator[Path]:
    """Yield the directories of all VMs' endpoints, those on their way too, as they come and go."""
    for vm_dir in entries(pins):
        yield from entries(vm_dir)


def quietly(action: Callable[..., object], *arguments: object) -> None:
    """Undo one thing; what fails here must not keep the rest from being undone."""
    with contextlib.suppress(OSError, VgwError):
        action(*arguments)


def endpoint_dirs(vm_dir: Path) -> Iterator[Path]:
    """Yield the directories of a VM's endpoints."""
    for name in sorted(names(vm_dir)):
        if not name.startswith(ASIDE):
            yield vm_dir / name
