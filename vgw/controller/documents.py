# SPDX-License-Identifier: Apache-2.0
"""The texts of policies that were applied, in the state directory: each once, by its digest."""

from __future__ import annotations

import base64
import contextlib
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from vgw.controller.machine import machine_id
from vgw.controller.pins import entries
from vgw.controller.state_file import is_whole, read_state, remove_state, write_state
from vgw.errors import VgwError
from vgw.policy.parse import digest_of

_SCHEMA: Final = "vgw/policy-texts/v1"
#: All texts of a policy: what is read back into memory has to have a bound.
MAX_BYTES: Final = 256 << 20
#: A text is repetitive: the lowest level makes a tenth of it in little time.
_LEVEL: Final = 1
_DAMAGED: Final = (ValueError, KeyError, TypeError, zlib.error)


class Documents:
    """Texts of policies in a directory; the writers of the host take turns."""

    def __init__(self, directory: Path) -> None:
        """Use a directory, which is made when something is kept."""
        self._directory = directory

    def keep(self, digest: str, texts: Sequence[str]) -> None:
        """Write the texts of a policy unless they are there. Raises VgwError."""
        file = self._file(digest)
        if not is_whole(file, _SCHEMA) or self.texts(digest) is None:
            write_state(file, _SCHEMA, _packed(texts))

    def texts(self, digest: str) -> list[str] | None:
        """Return the texts of a policy; None when they are not kept, damaged or of another host."""
        body = read_state(self._file(digest), _SCHEMA)
        if body is None:
            return None
        try:
            found = _unpacked(body)
        except _DAMAGED:
            return None
        return found if digest_of([("", text) for text in found]) == digest else None

    def sizes(self) -> dict[str, int]:
        """Return the bytes on disk of what is kept, by digest."""
        found = {}
        for file in entries(self._directory):
            with contextlib.suppress(OSError):
                if file.suffix == ".json":
                    found[file.stem] = file.stat().st_size
        return found

    def remove_but(self, wanted: Collection[str]) -> None:
        """Forget every policy but some; the last one takes the directory with it."""
        for digest in self.sizes():
            if digest not in wanted:
                remove_state(self._file(digest))

    def _file(self, digest: str) -> Path:
        return self._directory / f"{digest}.json"


def _packed(texts: Sequence[str]) -> dict[str, Any]:
    data = [text.encode() for text in texts]
    if sum(map(len, data)) > MAX_BYTES:
        raise VgwError(f"the policy is larger than {MAX_BYTES >> 20} MiB; use groups and services")
    packed = zlib.compress(b"".join(data), _LEVEL)
    return {
        "machine": machine_id(),
        "lengths": [len(each) for each in data],
        "texts": base64.b64encode(packed).decode(),
    }


def _unpacked(body: dict[str, Any]) -> list[str]:
    """Return the texts; raises one of _DAMAGED."""
    if body["machine"] != machine_id():
        raise ValueError("the state of another host")
    lengths = [int(length) for length in body["lengths"]]
    limit = min(sum(lengths), MAX_BYTES)
    data = zlib.decompressobj().decompress(base64.b64decode(body["texts"]), limit + 1)
    if len(data) != sum(lengths):
        raise ValueError("another length")
    texts, start = [], 0
    for length in lengths:
        texts.append(data[start : start + length].decode())
        start += length
    return texts
