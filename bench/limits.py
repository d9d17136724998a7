# SPDX-License-Identifier: Apache-2.0
"""A VM's limits on its connection table, as its policy says them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vgw import abi, libbpf
from vgw.controller.reconcile import Host
from vgw.policy.flows import SECOND_NS

#: Whether policies have the key `conntrack`; without it timeouts are written into the kernel.
IN_POLICY: Final = "CT_HALF_OPEN" in abi.Reason.__members__
#: Why a packet that would open a flow is dropped when there are too many.
REFUSALS: Final = frozenset(
    abi.Reason[name] for name in ("CT_FULL", "CT_HALF_OPEN") if name in abi.Reason.__members__
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds by state, as `tcp_syn`, and the most half-open flows; defaults for the rest."""

    timeouts: Mapping[str, int] = field(default_factory=dict)
    half_open_max: int | None = None

    def key(self) -> str:
        """Return the key of a VM in a policy file and its value, on one line."""
        if not IN_POLICY:
            return ""
        timeouts = ", ".join(f"{state}: {seconds}s" for state, seconds in self.timeouts.items())
        parts = [f"timeouts: {{{timeouts}}}"] if timeouts else []
        if self.half_open_max is not None:
            parts.append(f"half_open_max: {self.half_open_max}")
        return f"conntrack: {{{', '.join(parts)}}}"

    def enforce(self, host: Host, vm: str) -> None:
        """Put the timeouts in force for an attached VM whose policy cannot say them."""
        if IN_POLICY:
            return
        for endpoint in host.open_endpoints(vm):
            with endpoint:
                config = endpoint.maps.config()
                for state, seconds in self.timeouts.items():
                    config.timeout_ns[abi.FlowState[state.upper()]] = seconds * SECOND_NS
                slot = endpoint.maps.active_slot().to_bytes(4, sys.byteorder)
                libbpf.map_update(endpoint.fds["configs"], slot, bytes(config))
