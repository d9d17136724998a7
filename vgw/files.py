# SPDX-License-Identifier: Apache-2.0
"""Changes of files and directories, in bpffs and in the state directory: each is a step.

All raise OSError as the functions of the standard library do.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from vgw import steps
from vgw.errors import VgwError

#: What may help where a change of a file failed, by error number.
_ADVICE: Final = {
    errno.ENOSPC: "make room there, or ",
    errno.EDQUOT: "make room there, or ",
    errno.EACCES: "run vgw as root, or ",
    errno.EPERM: "run vgw as root, or ",
    errno.EROFS: "remount it by `mount -o remount,rw`, or ",
    errno.EIO: "see what the kernel says of the disk (`dmesg`), or ",
}


def mkdir(path: Path, mode: int = 0o777, *, exist_ok: bool = False) -> None:
    """Make a directory, and those that it is in; with `exist_ok` it may be there."""
    if exist_ok and path.is_dir():
        return
    if not path.parent.exists():  # a file there is no directory, which mkdir() says
        mkdir(path.parent, exist_ok=True)
    _announce("mkdir", path)
    path.mkdir(mode, exist_ok=exist_ok)


def rename(old: Path, new: Path) -> None:
    """Give a file or directory another name; a file that has it goes."""
    _announce("rename", new)
    old.replace(new)


def unlink(path: Path) -> None:
    """Remove a file or a pin; none there is no error."""
    if os.path.lexists(path):
        _announce("unlink", path)
        path.unlink(missing_ok=True)


def rmdir(path: Path) -> None:
    """Remove an empty directory."""
    _announce("rmdir", path)
    path.rmdir()


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file with such permissions, and have it on the disk."""
    _announce("create", path)
    with path.open("wb") as file:
        path.chmod(mode)
        _announce("write", path)
        file.write(data)
        file.flush()
        _announce("fsync", path)
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Have on the disk which files a directory has."""
    _announce("fsync", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def advice(error: OSError) -> str:
    """Return what to do about a failure, to go before what else may be done: "do this, or "."""
    return _ADVICE.get(error.errno or 0, "")


def failure(error: OSError) -> VgwError:
    """Return the error of vgw for a failed change of a file."""
    where = f"cannot change {error.filename}: " if error.filename else ""
    return VgwError(f"{where}{error.strerror}; {advice(error)}try again")


def _announce(step: str, path: Path) -> None:
    refused = steps.announce(step, path)
    if refused:
        raise OSError(refused, os.strerror(refused), str(path))
