# SPDX-License-Identifier: Apache-2.0
"""What a host is to enforce: its policy, a file or a directory, together with its own inventory.

Whoever needs the document that they make together gets it here.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from vgw.controller.paths import Paths
from vgw.controller.policy_files import read_text
from vgw.controller.policy_source import Texts, read_steadily
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import Sources, parse_sources


class InventoryUnreadableError(VgwError):
    """The inventory is there and cannot be read."""


def read_document(paths: Paths, sources: Sources | None = None) -> PolicyDocument:
    """Return what this host is to enforce: a policy together with the host's inventory.

    `sources` are the (name, text) of the policy, None: read it where `paths` say. Raises VgwError
    when a file cannot be read and PolicyError with all mistakes of all files.
    """
    policy = read_steadily(paths.policy) if sources is None else sources
    return parse_sources(policy, read_inventory(paths))


def read_host_document(paths: Paths, read: Callable[[], Texts] | None = None) -> PolicyDocument:
    """Return what this host is to enforce, which may have no policy: the defaults then.

    `read` returns the (name, text) of the policy's files. Raises what read_document() raises.
    """
    if paths.policy.exists():
        return read_document(paths, None if read is None else read())
    inventory = read_inventory(paths)
    return PolicyDocument() if inventory is None else parse_sources((), inventory)


def wants(document: PolicyDocument, vm: str) -> bool:
    """Tell whether a host is to protect a VM that runs on it."""
    return vm in document.vms or document.inventory.protect_all


def read_inventory(paths: Paths) -> tuple[str, str] | None:
    """Return name and text of the host's inventory, None when it has none. Raises VgwError."""
    try:
        return str(paths.inventory), _read_file(paths.inventory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InventoryUnreadableError(
            f"inventory {paths.inventory} cannot be read: {error.strerror}; make it readable, or "
            "name another file by VGW_INVENTORY"
        ) from error


def _read_file(path: Path) -> str:
    """Return the text of a file. What is none, as a FIFO, nobody waits for."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(0, "it is no file", str(path))
    return read_text(path)
