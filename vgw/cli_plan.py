# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the functions keep the start of the command fast
"""What applying a policy would change, rule by rule, for `apply --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgw.controller.reconcile import Host
    from vgw.policy.model import EffectivePolicy, EffectiveRule, PolicyDocument

Row = dict[str, Any]


def plan(host: Host, document: PolicyDocument) -> Row:
    """Return what applying `document` would change, without changing anything.

    {"vms": [{"vm", "changed", "generation", "named", "pending", "added", "removed", "modified",
    "reordered", "defaults"}], "waiting"}: rules are named by direction/tier/policy/rule,
    `generation` is the one that the VM would run, `defaults` tells whether they differ; `named` and
    `pending` are those of AttachResult. The rule lists are null when the policy in force is not
    remembered. Raises what Host.apply raises.
    """
    document = host.overlay.laid(document)
    outcome = host.apply(document, dry_run=True)
    rows = []
    for result in outcome.vms:
        rows.append(
            {
                "vm": result.vm,
                "changed": result.changed,
                "generation": result.generation,
                "named": result.named,
                "pending": result.pending,
                **compare(_now(host, result.vm), _then(host, document, result.vm)),
            }
        )
    return {"vms": rows, "waiting": outcome.waiting}


def compare(now: EffectivePolicy | None, then: EffectivePolicy) -> Row:
    """Return how one policy of a VM differs from another; `now` None: nobody knows."""
    if now is None:
        keys = ("added", "removed", "modified", "reordered", "defaults")
        return dict.fromkeys(keys)
    old, new = _by_key(now), _by_key(then)
    kept = [key for key in new if key in old]
    return {
        "added": [key for key in new if key not in old],
        "removed": [key for key in old if key not in new],
        "modified": [key for key in kept if new[key] != old[key]],
        "reordered": kept != [key for key in old if key in new],
        "defaults": now.defaults != then.defaults,
    }


def _now(host: Host, vm: str) -> EffectivePolicy | None:
    """Return the policy that a VM has, without rules that match nothing; None: nobody knows."""
    from vgw.controller.recovery import policy_of

    manifest = host.manifest(vm)
    return policy_of(manifest, manifest.generation, host.store)


def _then(host: Host, document: PolicyDocument, vm: str) -> EffectivePolicy:
    """Return the policy that a VM would have, without rules that match nothing."""
    from vgw.abi import Path
    from vgw.controller.desired import Order, desired_interfaces, sources_of
    from vgw.policy.compile import compile_policy
    from vgw.policy.resolve import effective_policy

    wanted, _ = desired_interfaces(host.paths, document, vm, Order())
    effective = effective_policy(document, vm)
    images = compile_policy(effective, sources=sources_of(wanted.values()))
    return replace(effective, ingress=images[Path.TO_VM].rules, egress=images[Path.FROM_VM].rules)


def _by_key(policy: EffectivePolicy) -> Mapping[str, EffectiveRule]:
    """Return the rules in their order, without what says nothing about packets."""
    return {
        rule.key: replace(rule, comment="", file="", line=0)
        for rule in (*policy.ingress, *policy.egress)
    }
