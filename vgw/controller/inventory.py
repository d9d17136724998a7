# SPDX-License-Identifier: Apache-2.0
"""What a host reads from disk: the policy, a file or a directory, and its own inventory.

Whoever needs the document that they make together gets it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vgw.controller.paths import Paths
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
        return [(str(file), _read_text(file)) for file in files]
    except OSError as error:
        advice = "run vgw as root" if isinstance(error, PermissionError) else "write it"
        raise VgwError(
            f"policy {error.filename or path} cannot be read: {error.strerror}; {advice}, or name "
            "another path by --policy or VGW_POLICY"
        ) from error


def read_document(paths: Paths, sources: Sequence[tuple[str, str]] | None = None) -> PolicyDocument:
    """Return what this host is to enforce: a policy together with the host's inventory.

    `sources` are the (name, text) of the policy, None: read it where `paths` say. Raises VgwError
    when a file cannot be read and PolicyError with all mistakes of all files.
    """
    policy = read_sources(paths.policy) if sources is None else sources
    return parse_sources(policy, read_inventory(paths))


def read_host_document(paths: Paths) -> PolicyDocument:
    """Return what this host is to enforce, which may have no policy: the defaults then.

    Raises what read_document() raises.
    """
    if paths.policy.exists():
        return read_document(paths)
    inventory = read_inventory(paths)
    return PolicyDocument() if inventory is None else parse_sources((), inventory)


def wants(document: PolicyDocument, vm: str) -> bool:
    """Tell whether a host is to protect a VM that runs on it."""
    return vm in document.vms or document.inventory.protect_all


def read_inventory(paths: Paths) -> tuple[str, str] | None:
    """Return name and text of the host's inventory, None when it has none. Raises VgwError."""
    try:
        return str(paths.inventory), _read_text(paths.inventory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VgwError(
            f"inventory {paths.inventory} cannot be read: {error.strerror}; make it readable, or "
            "name another file by VGW_INVENTORY"
        ) from error


def _yaml_files(directory: Path) -> list[Path]:
    # glob() takes a directory that it may not read for an empty one.
    return sorted(file for file in directory.iterdir() if file.suffix == ".yaml")


def _read_text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MAX_POLICY_BYTES + 1)
    if len(data) > MAX_POLICY_BYTES:
        raise VgwError(f"{file} is larger than {MAX_POLICY_BYTES >> 20} MiB; split it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise VgwError(f"{file} line {line} is not UTF-8 text; save it as UTF-8") from None
