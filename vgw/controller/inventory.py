# SPDX-License-Identifier: Apache-2.0
"""The policy on disk: a file, or a directory of files that are read as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

#: Larger files are no policies: what is read into memory has to have a bound.
MAX_POLICY_BYTES: Final = 64 << 20


def read_sources(path: Path) -> list[tuple[str, str]]:
    """Return (name, text) of a policy file, or of each `*.yaml` of a directory in order of names.

    Raises VgwError when it cannot be read or is no policy by its size or encoding.
    """
    try:
        files = _yaml_files(path) if path.is_dir() else [path]
        if not files:
            raise VgwError(f"policy {path} has no *.yaml files; write one or name another path")
        return _read_texts(files)
    except OSError as error:
        advice = "run vgw as root" if isinstance(error, PermissionError) else "write it"
        raise VgwError(
            f"policy {error.filename or path} cannot be read: {error.strerror}; {advice}, or name "
            "another path by --policy or VGW_POLICY"
        ) from error


def read_policy(path: Path) -> PolicyDocument:
    """Return the policy of a file or directory.

    Raises VgwError when it cannot be read and PolicyError when it is invalid.
    """
    return parse_sources(read_sources(path))


def _yaml_files(directory: Path) -> list[Path]:
    # glob() takes a directory that it may not read for an empty one.
    return sorted(file for file in directory.iterdir() if file.suffix == ".yaml")


def _read_texts(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Return name and text of files. Raises VgwError before they take more memory than may be."""
    found: list[tuple[str, str]] = []
    room = MAX_POLICY_BYTES
    for file in files:
        text = _read_text(file)
        room -= len(text)
        if room < 0:
            raise VgwError(
                f"policy {file.parent} is larger than {MAX_POLICY_BYTES >> 20} MiB; shorten it"
            )
        found.append((str(file), text))
    return found


def _read_text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MAX_POLICY_BYTES + 1)
    if len(data) > MAX_POLICY_BYTES:
        raise VgwError(f"policy {file} is larger than {MAX_POLICY_BYTES >> 20} MiB; split it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise VgwError(f"policy {file} line {line} is not UTF-8 text; save it as UTF-8") from None
