# SPDX-License-Identifier: Apache-2.0
"""The inventory that was last in force, kept for when the host's own cannot be used any more.

A policy that is gone back to, or that a start takes over, protects no less for a file that was lost
or spoilt since.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from vgw.controller.inventory import read_document, read_inventory
from vgw.controller.paths import Paths
from vgw.controller.state_file import read_state, remove_state, write_state
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import Sources, digest_of, parse_sources

_SCHEMA: Final = "vgw/inventory/v1"

_logger = logging.getLogger(__name__)


def keep_inventory(paths: Paths, document: PolicyDocument) -> None:
    """Keep the inventory that a document was made with; whoever calls holds the writer lock.

    It is read anew, and kept only if it is still the same. A failure is only told.
    """
    kept = _kept(paths)
    if document.inventory.digest == ("" if kept is None else digest_of([kept])):
        return
    try:
        inventory = read_inventory(paths)
        if inventory is None and not document.inventory.digest:
            remove_state(_file(paths))
        elif inventory is not None and digest_of([inventory]) == document.inventory.digest:
            name, text = inventory
            write_state(_file(paths), _SCHEMA, {"name": name, "text": text})
    except (OSError, VgwError) as error:
        _logger.error("%s; the inventory is in force and not kept", error)


def last_document(paths: Paths, sources: Sources) -> PolicyDocument:
    """Return a policy that was in force before, together with the host's inventory.

    Where that is lost or wrong, it is the one that was last in force. Raises VgwError.
    """
    try:
        return read_document(paths, sources)
    except VgwError as error:
        kept = _kept(paths)
        if kept is None:
            raise
        _logger.error("%s; the inventory that was last in force is used", error)
        return parse_sources(sources, kept)


def _kept(paths: Paths) -> tuple[str, str] | None:
    body = read_state(_file(paths), _SCHEMA)
    name, text = (None, None) if body is None else (body.get("name"), body.get("text"))
    return (name, text) if isinstance(name, str) and isinstance(text, str) else None


def _file(paths: Paths) -> Path:
    return paths.state_dir / "inventory" / "last.json"
