# SPDX-License-Identifier: Apache-2.0
"""Files of the state directory: JSON with a schema, the host and a checksum, replaced as a whole.

The body comes last in the file, and the checksum is that of the body's own bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vgw import files
from vgw.abi import ABI_VERSION
from vgw.errors import VgwError

_MACHINE_ID: Final = Path("/etc/machine-id")
_BODY: Final = b',"body":'
_END: Final = b"}"


def read_state(path: Path, schema: str) -> dict[str, Any] | None:
    """Return the body of a file; None when there is none, or it is damaged or another host's.

    A damaged file counts as none: it is written anew by the next change, and never half used.
    """
    try:
        text = _body(path, schema)
        body = None if text is None else json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def is_whole(path: Path, schema: str) -> bool:
    """Tell whether a file is there and not damaged, which takes less than to read it."""
    try:
        return _body(path, schema) is not None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_state(path: Path, schema: str, body: Mapping[str, Any]) -> None:
    """Write a file so that a crash leaves the old one or the new one. Raises VgwError."""
    text = json.dumps(body, separators=(",", ":")).encode()
    described = {
        "schema": schema,
        "abi": ABI_VERSION,
        "host": _host(),
        "checksum": _checksum(text),
    }
    head = json.dumps(described, separators=(",", ":")).encode().removesuffix(_END)
    try:
        files.mkdir(path.parent, 0o755, exist_ok=True)
        draft = _draft(path)
        try:
            files.write(draft, b"".join((head, _BODY, text, _END)), 0o600)
            files.rename(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                files.unlink(draft)
            raise
        files.sync_directory(path.parent)
    except OSError as error:
        raise VgwError(
            f"cannot write {path}: {error.strerror}; {files.advice(error)}choose "
            "another directory by VGW_STATE_DIR"
        ) from error


def remove_state(path: Path) -> None:
    """Remove a file and what a write that was killed left of it; the last takes the directory."""
    files.unlink(_draft(path))
    files.unlink(path)
    with contextlib.suppress(OSError):
        files.rmdir(path.parent)


def _body(path: Path, schema: str) -> bytes | None:
    """Return the bytes of a file's body, None when they are not those that were written."""
    head, _, rest = path.read_bytes().partition(_BODY)
    text = rest.removesuffix(_END)
    described = json.loads(head + _END)
    whole = described["schema"] == schema and described["checksum"] == _checksum(text)
    return text if whole and described["host"] == _host() else None


@functools.cache
def _host() -> str:
    """Return what tells this host from others, which must not go on from each other's files."""
    try:
        return _MACHINE_ID.read_text().strip()
    except OSError:
        return ""


def _draft(path: Path) -> Path:
    """Return where a file is written before it takes its place; writers hold the host's lock."""
    return path.with_name(f".{path.name}.tmp")


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
