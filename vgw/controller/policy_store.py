# SPDX-License-Identifier: Apache-2.0
"""The effective policy of each VM as it was last put in force, kept for `simulate`.

The compiled image in the kernel cannot be read back into rules; the model needs the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from vgw.abi import Action
from vgw.controller.state_file import read_state, write_state
from vgw.policy.model import (
    ANYWHERE,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Network,
    Service,
    Tier,
)

_SCHEMA = "vgw/effective-policy/v1"


def save_policy(path: Path, policy: EffectivePolicy, generation: int) -> None:
    """Write the policy of a generation, whole or not at all. Raises VgwError."""
    defaults = policy.defaults
    body = {
        "vm": policy.vm,
        "generation": generation,
        "ingress": [_rule_to_json(rule) for rule in policy.ingress],
        "egress": [_rule_to_json(rule) for rule in policy.egress],
        "defaults": [defaults.ingress.name, defaults.egress.name, defaults.log],
    }
    write_state(path, _SCHEMA, body)


def load_policy(path: Path, generation: int) -> EffectivePolicy | None:
    """Return the policy of a generation; None when it is lost or of another generation."""
    body = read_state(path, _SCHEMA)
    if body is None:
        return None
    try:
        if body["generation"] != generation:
            return None
        ingress, egress, log = body["defaults"]
        return EffectivePolicy(
            vm=body["vm"],
            ingress=tuple(_rule_from_json(Direction.INGRESS, row) for row in body["ingress"]),
            egress=tuple(_rule_from_json(Direction.EGRESS, row) for row in body["egress"]),
            defaults=Defaults(Action[ingress], Action[egress], log),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _rule_to_json(rule: EffectiveRule) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tier": str(rule.tier),
        "policy": rule.policy,
        "name": rule.name,
        "action": rule.action.name,
        "services": [dataclasses.astuple(service) for service in rule.services],
    }
    if rule.peers != ANYWHERE:
        row["peers"] = [str(network) for network in rule.peers]
    if rule.local != ANYWHERE:
        row["local"] = [str(network) for network in rule.local]
    if rule.source_ports:
        row["source_ports"] = rule.source_ports
    if rule.log:
        row["log"] = True
    return row


def _rule_from_json(direction: Direction, row: Mapping[str, Any]) -> EffectiveRule:
    return EffectiveRule(
        direction=direction,
        tier=Tier(row["tier"]),
        policy=row["policy"],
        name=row["name"],
        action=Action[row["action"]],
        peers=_networks(row.get("peers")),
        local=_networks(row.get("local")),
        services=tuple(_service(*fields) for fields in row["services"]),
        source_ports=tuple((low, high) for low, high in row.get("source_ports", ())),
        log=row.get("log", False),
    )


def _networks(texts: list[str] | None) -> tuple[Network, ...]:
    return ANYWHERE if texts is None else tuple(ip_network(text) for text in texts)


def _service(
    protocol: int | None,
    ports: list[int] | None,
    icmp_type: int | None,
    icmp_code: int | None,
) -> Service:
    return Service(protocol, None if ports is None else (ports[0], ports[1]), icmp_type, icmp_code)
