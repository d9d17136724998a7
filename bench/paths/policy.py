# SPDX-License-Identifier: Apache-2.0
"""The policy that packets of the bench are judged by: as many rules for both directions."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

from bench.cost.rules import rules_between
from bench.paths import packets
from vgw.policy.model import Direction, EffectivePolicy


def policy(version: int, size: int, shape: str) -> EffectivePolicy:
    """Return `size` rules for each direction; the last three concern the measured packets."""
    owner = ip_network(packets.ADDRESSES[version])
    rules = rules_between(packets.PEERS[version], owner, size, shape)
    outwards = tuple(replace(rule, direction=Direction.EGRESS) for rule in rules)
    return EffectivePolicy("bench", rules, outwards)
