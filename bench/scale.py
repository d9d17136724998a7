# SPDX-License-Identifier: Apache-2.0
"""How large a run of bench.exhaustion is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """The choices of one run.

    `seconds` is the length of the flood, `sample` that of one figure beside it, of which there are
    `rounds`. `live` is the number of open connections, `connections` that of those which come and
    go, `cycles` that of interfaces which do, so many `together`. `half_open` is the timeout in
    seconds of connections that are not answered; None for the usual one.
    """

    seconds: float
    sample: float
    rounds: int
    live: int
    connections: int
    cycles: int
    together: int
    half_open: int | None


FULL = Scale(30.0, 1.0, 9, 1_000, 10_000_000, 10_000, 50, None)
QUICK = Scale(2.0, 0.3, 2, 100, 100_000, 30, 5, 2)
