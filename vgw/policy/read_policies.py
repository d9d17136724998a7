# SPDX-License-Identifier: Apache-2.0
"""The `services`, `policies` and `defaults` sections of a policy file."""

from __future__ import annotations

from typing import Final

from vgw.abi import Action
from vgw.policy import services as notation
from vgw.policy import values
from vgw.policy.draft import Draft, Kind
from vgw.policy.fields import Fields, Keys, read_entries, read_list, read_scalar
from vgw.policy.model import AppliesTo, Defaults, Direction, Network, Policy, Rule, Service, Tier
from vgw.policy.read_vms import read_selector
from vgw.policy.yaml_nodes import ListNode, Node, show

_POLICY_KEYS: Final = Keys(
    "a policy",
    ("name", "tier", "applies_to", "ingress", "egress"),
    required=("name", "tier", "applies_to"),
)
_APPLIES_TO_KEYS: Final = Keys("`applies_to`", ("all", "labels", "vms"))
_PEER_KEY: Final = {Direction.INGRESS: "from", Direction.EGRESS: "to"}
_RULE_KEYS: Final = {
    direction: Keys(
        f"an {direction} rule",
        (
            "name",
            "action",
            _PEER_KEY[direction],
            "local",
            "services",
            "source_ports",
            "log",
            "enabled",
            "comment",
        ),
        required=("name", "action"),
        hints={
            _PEER_KEY[other]: f"an {direction} rule has `{_PEER_KEY[direction]}`, not "
            f"`{_PEER_KEY[other]}`; the VM's own side is `local`"
        },
    )
    for direction, other in zip(Direction, reversed(Direction), strict=True)
}
_DEFAULTS_KEYS: Final = Keys("`defaults`", ("ingress", "egress", "log"))
_ACTIONS: Final = {action.name.lower(): action for action in Action}
_tier: Final = values.choice({str(tier): tier for tier in Tier})
_action: Final = values.choice(_ACTIONS)
_decision: Final = values.choice({word: _ACTIONS[word] for word in _ACTIONS if word != "pass"})
_NOTHING: Final = "selecting nothing is not selecting everything"
_NO_LOCAL: Final = f"{_NOTHING}: leave `local` out for every one"
_NO_SOURCE_PORTS: Final = f"{_NOTHING}: leave `source_ports` out for every one"
_NO_ENTRY: Final = f"{_NOTHING}: write [any] or leave it out"


def read_services(draft: Draft, node: Node) -> None:
    """Read the `services` section into the draft."""
    for key, value in read_entries(draft.report, node):
        name = draft.define(Kind.SERVICE, key, notation.service_name)
        items = read_list(draft.report, value)
        if isinstance(value, ListNode) and not items:
            draft.report.add(value, f"a service without alternatives; {_NOTHING}")
        found = (read_scalar(draft.report, item, notation.service) for item in items)
        draft.services[name] = tuple(each for each in found if each is not None)


def read_policies(draft: Draft, node: Node) -> None:
    """Read the `policies` section into the draft."""
    for index, item in enumerate(read_list(draft.report, node)):
        found = Fields(draft.report, item, _POLICY_KEYS)
        place = found.value("name")
        name = "" if place is None else draft.define(Kind.POLICY, place, values.name)
        rule_names: dict[str, Node] = {}
        draft.policies.append(
            Policy(
                name=name,
                tier=found.scalar("tier", _tier, Tier.VM),
                applies_to=_read_applies_to(draft, found.value("applies_to")),
                ingress=_read_rules(draft, found, Direction.INGRESS, rule_names),
                egress=_read_rules(draft, found, Direction.EGRESS, rule_names),
                path=f"policies[{index}]",
            )
        )


def read_defaults(draft: Draft, key: Node, node: Node) -> None:
    """Read the `defaults` section into the draft; `key` is where it begins."""
    draft.define_once("defaults", key)
    found = Fields(draft.report, node, _DEFAULTS_KEYS)
    draft.defaults = Defaults(
        ingress=found.scalar("ingress", _default_action, Defaults().ingress),
        egress=found.scalar("egress", _default_action, Defaults().egress),
        log=found.scalar("log", values.boolean, Defaults().log),
    )


def _default_action(text: str) -> Action:
    if text == "pass":
        raise ValueError("a default cannot be pass: nothing comes after it; write accept or drop")
    return _decision(text)


def _read_applies_to(draft: Draft, node: Node | None) -> AppliesTo:
    if node is None:
        return AppliesTo()
    found = Fields(draft.report, node, _APPLIES_TO_KEYS)
    given = [key for key in _APPLIES_TO_KEYS.allowed if key in found]
    if found.is_mapping and len(given) != 1:
        count = " and ".join(f"`{key}`" for key in given) or "none"
        message = f"`applies_to` needs exactly one of all, labels or vms, not {count}"
        draft.report.add(node, message)
    vms = found.scalars("vms", values.name, if_empty=_NOTHING)
    for place, vm in vms:
        draft.refer(Kind.VM, vm, place)
    return AppliesTo(
        all=found.scalar("all", _true, False),
        labels=read_selector(draft.report, found.value("labels")),
        vms=tuple(vm for _, vm in vms),
    )


def _true(text: str) -> bool:
    if text != "true":
        raise ValueError(f"`all` can only be true, not {show(text)}; write labels or vms instead")
    return True


def _read_rules(
    draft: Draft, policy: Fields, direction: Direction, names: dict[str, Node]
) -> tuple[Rule, ...]:
    """Read one direction; `names` holds those of the policy's rules so far."""
    rules = []
    for node in policy.items(direction):
        found = Fields(draft.report, node, _RULE_KEYS[direction])
        rule = _read_rule(draft, found, direction)
        if rule.name:
            first = names.setdefault(rule.name, node)
            if first is not node:
                message = f"the policy has a rule {show(rule.name)} already, on line {first.line}"
                draft.report.add(found.value("name") or node, message)
        if rule.source_ports:
            draft.port_rules.append((found.key("source_ports"), rule))
        rules.append(rule)
    return tuple(rules)


def _read_rule(draft: Draft, found: Fields, direction: Direction) -> Rule:
    local = found.scalars("local", _local, if_empty=_NO_LOCAL)
    ports = found.scalars("source_ports", notation.port_range, if_empty=_NO_SOURCE_PORTS)
    return Rule(
        name=found.scalar("name", values.name, ""),
        action=found.scalar("action", _action, Action.DROP),
        peers=_read_peers(draft, found, _PEER_KEY[direction]),
        local=tuple(network for _, network in local),
        services=_read_rule_services(draft, found),
        source_ports=tuple(span for _, span in ports),
        log=found.scalar("log", values.boolean, False),
        enabled=found.scalar("enabled", values.boolean, True),
        comment=found.scalar("comment", values.comment, ""),
        file=found.node.source.name,
        line=found.node.line,
        column=found.node.column,
    )


def _local(text: str) -> Network:
    if text == values.ANY:
        raise ValueError("`local` has CIDRs only; leave it out for every address of the VM")
    return values.network(text)


def _read_peers(draft: Draft, found: Fields, key: str) -> tuple[str | Network, ...]:
    peers = found.scalars(key, values.peer, if_empty=_NO_ENTRY)
    for node, peer in peers:
        if isinstance(peer, str) and peer != values.ANY:
            draft.refer(Kind.GROUP, peer, node)
        elif peer == values.ANY and len(peers) > 1:
            draft.report.add(node, "`any` covers the other entries; write it alone or leave it out")
    return tuple(peer for _, peer in peers if peer != values.ANY)


def _read_rule_services(draft: Draft, found: Fields) -> tuple[str | Service, ...]:
    services = found.scalars("services", notation.service_or_name, if_empty=_NO_ENTRY)
    for node, service in services:
        if isinstance(service, str):
            draft.refer(Kind.SERVICE, service, node)
    return tuple(service for _, service in services)
