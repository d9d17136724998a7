# SPDX-License-Identifier: Apache-2.0
"""The VMs of a lab that are measured: one behind a veth, one behind a TAP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bench.lab import CARDS, CONNTRACK_MAX
from bench.policy_text import Endpoint


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM: the kind of its device, its namespace of the lab, its interface on the host."""

    device: str
    node: str
    interface: str

    @property
    def mac(self) -> str:
        """The MAC address of its card."""
        return CARDS[self.node][0]

    @property
    def addresses(self) -> Mapping[int, str]:
        """Its addresses by IP version."""
        return CARDS[self.node][1]

    @property
    def endpoint(self) -> Endpoint:
        """The VM as a policy describes it."""
        addresses = tuple(self.addresses.values())
        return Endpoint(self.node, self.interface, self.mac, addresses, CONNTRACK_MAX)


VMS: Final[Mapping[str, Vm]] = {
    vm.device: vm for vm in (Vm("veth", "vm", "veth-vm"), Vm("tap", "guest", "tap-guest"))
}
