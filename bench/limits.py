# SPDX-License-Identifier: Apache-2.0
"""A VM's limits on its connection table, as its policy says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vgw.abi import Reason

#: Why a packet that would open a flow is dropped when there are too many.
REFUSALS: Final = frozenset({Reason.CT_FULL, Reason.CT_HALF_OPEN})


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds by state, as `tcp_syn`, and the most half-open flows; defaults for the rest.

    No connection that nobody knows of is taken over, so one that was cut stays cut.
    """

    timeouts: Mapping[str, int] = field(default_factory=dict)
    half_open_max: int | None = None

    def key(self) -> str:
        """Return the key of a VM in a policy file and its value, on one line."""
        timeouts = ", ".join(f"{state}: {seconds}s" for state, seconds in self.timeouts.items())
        parts = [f"timeouts: {{{timeouts}}}"] if timeouts else []
        if self.half_open_max is not None:
            parts.append(f"half_open_max: {self.half_open_max}")
        return f"conntrack: {{{', '.join([*parts, 'grace: 0s'])}}}"
