# SPDX-License-Identifier: Apache-2.0
"""The rules of a measurement: as many as wanted, of which the last accepts what is measured."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Final

from bench.cost.vms import Vm
from bench.lab import CLIENT_ADDRESSES
from bench.rulesets import is_within, rule, untouched
from vgw.abi import Action
from vgw.policy.model import ANY_SERVICE, TCP, UDP, EffectiveRule, Network, Service

#: TCP to it is dropped by the last rule but one.
DROPPED_PORT: Final = 19_999
#: UDP to it is what a flood of denied packets goes to; the last rule but two drops it.
DENIED_PORT: Final = 19_998
#: The rules that every set ends with.
_OWN: Final = 3


def measured_rules(size: int, shape: str, version: int, vm: Vm) -> tuple[EffectiveRule, ...]:
    """Return `size` rules of one IP version, of which only the last ones concern the client.

    They drop DENIED_PORT and DROPPED_PORT of the VM and accept everything else.
    """
    client, owner = ip_network(CLIENT_ADDRESSES[version]), ip_network(vm.addresses[version])
    return rules_between(client, owner, size, shape)


def rules_between(
    remote: Network, owner: Network, size: int, shape: str
) -> tuple[EffectiveRule, ...]:
    """Return `size` such rules, of which only the last ones concern a network and the VM."""
    version = owner.version
    kept = untouched(size - _OWN, size, shape, version, lambda one: _touches(one, remote, owner))
    drops = ((UDP, DENIED_PORT, "denied"), (TCP, DROPPED_PORT, "control"))
    return (
        *kept,
        *(
            rule(name, Action.DROP, (remote,), (owner,), (Service(protocol, (port, port)), ()))
            for protocol, port, name in drops
        ),
        rule("measured", Action.ACCEPT, (remote,), (owner,), (ANY_SERVICE, ())),
    )


def _touches(one: EffectiveRule, remote: Network, vm: Network) -> bool:
    """Tell whether a rule could match anything that the network sends the VM."""
    return any(_overlap(remote, network) for network in one.peers) and any(
        is_within(vm, network) for network in one.local
    )


def _overlap(one: Network, other: Network) -> bool:
    """Tell whether two networks of any version have an address in common."""
    if one.version != other.version:
        return False
    return one.network_address in other or other.network_address in one
