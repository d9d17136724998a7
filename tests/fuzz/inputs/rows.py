# SPDX-License-Identifier: Apache-2.0
"""Inputs that something was wrong with once, by what it was; a test gives them to their targets.

Those of state files are in tests/controller/test_hostile_state.py, by what was wrong in the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple


class Row(NamedTuple):
    """An input and what was wrong with what came of it."""

    target: str
    what: str
    data: bytes


ROWS: Final[Sequence[Row]] = (
    Row(
        "socket",
        "a VM name with half of a surrogate pair was an internal error",
        b"POST /v1/status HTTP/1.0\r\nContent-Length: 15\r\n\r\n" + rb'{"vm":"\ud800"}',
    ),
)
