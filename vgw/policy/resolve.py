# SPDX-License-Identifier: Apache-2.0
"""What a policy means for one VM: its rules in the order of evaluation, every name resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    TIERS,
    AppliesTo,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Group,
    Network,
    Policy,
    PolicyDocument,
    Rule,
    Service,
    Vm,
)


def effective_policy(document: PolicyDocument, vm_name: str | None) -> EffectivePolicy:
    """Return everything that decides about a VM, in the order of evaluation.

    A VM that the document does not name, or None, gets the policies that apply to all.
    """
    return _resolver(document).effective_policy(vm_name)


def group_networks(document: PolicyDocument, name: str) -> tuple[Network, ...]:
    """Return what a group stands for: IPv4 before IPv6, collapsed and sorted.

    These are the addresses of the interfaces of its VMs (not link-local ones, not allowed pairs),
    its CIDRs and those of the groups in it. Empty when it has none. KeyError without such a group.
    """
    return _resolver(document).group_networks(name)


def empty_groups(document: PolicyDocument) -> tuple[str, ...]:
    """Return the groups that stand for nothing, in the order of the document."""
    return _resolver(document).empty_groups()


def labels_match(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether labels have every wanted key with its value; wanting none matches none."""
    return bool(wanted) and all(labels.get(key) == value for key, value in wanted.items())


def applies(applies_to: AppliesTo, vm: Vm | None) -> bool:
    """Tell whether a policy is for a VM; None is one that the document does not name."""
    if applies_to.all or vm is None:
        return applies_to.all
    return vm.name in applies_to.vms or labels_match(applies_to.labels, vm.labels)


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Return networks without overlaps, adjacent ones merged, IPv4 before IPv6, sorted."""
    found = tuple(networks)
    if len(found) < 2:
        return found
    ipv4 = (network for network in found if isinstance(network, IPv4Network))
    ipv6 = (network for network in found if isinstance(network, IPv6Network))
    return (*collapse_addresses(ipv4), *collapse_addresses(ipv6))


class _Resolver:
    """Resolves one document and remembers what VMs share: groups and the rules of policies."""

    def __init__(self, document: PolicyDocument) -> None:
        self.document = document
        self._policies = sorted(document.policies, key=lambda policy: TIERS.index(policy.tier))
        self._groups: dict[str, tuple[Network, ...]] = {}
        self._rules: dict[tuple[str, Direction], tuple[EffectiveRule, ...]] = {}
        self._vms_by_label: dict[tuple[str, str], list[Vm]] = {}
        for vm in document.vms.values():
            for label in vm.labels.items():
                self._vms_by_label.setdefault(label, []).append(vm)

    def effective_policy(self, vm_name: str | None) -> EffectivePolicy:
        vm = None if vm_name is None else self.document.vms.get(vm_name)
        policies = [policy for policy in self._policies if applies(policy.applies_to, vm)]
        ingress, egress = (
            tuple(rule for policy in policies for rule in self._policy_rules(policy, direction))
            for direction in Direction
        )
        return EffectivePolicy(
            vm=vm_name or "", ingress=ingress, egress=egress, defaults=self.document.defaults
        )

    def group_networks(self, name: str) -> tuple[Network, ...]:
        if name not in self._groups:
            self._groups[name] = collapse(self._members(name))
        return self._groups[name]

    def _members(self, name: str) -> Iterable[Network]:
        pending = [name]
        seen = {name}
        while pending:
            group = self.document.groups[pending.pop()]
            yield from self._own_members(group)
            for nested in group.groups:
                if nested not in seen:
                    seen.add(nested)
                    pending.append(nested)

    def _own_members(self, group: Group) -> Iterable[Network]:
        """Iterate over what is in a group apart from the groups in it."""
        yield from group.cidrs
        for vm in (*self._vms_with(group.labels), *map(self.document.vms.get, group.vms)):
            for interface in vm.interfaces if vm else ():
                for address in interface.addresses:
                    if not address.is_link_local:
                        yield ip_network(address)

    def empty_groups(self) -> tuple[str, ...]:
        groups = self.document.groups
        containers: dict[str, list[str]] = {}
        for group in groups.values():
            for nested in group.groups:
                containers.setdefault(nested, []).append(group.name)
        pending = [
            group.name for group in groups.values() if any(True for _ in self._own_members(group))
        ]
        filled = set(pending)
        while pending:
            for name in containers.get(pending.pop(), ()):
                if name not in filled:
                    filled.add(name)
                    pending.append(name)
        return tuple(name for name in groups if name not in filled)

    def _vms_with(self, labels: Mapping[str, str]) -> Iterable[Vm]:
        if not labels:
            return ()
        candidates = self._vms_by_label.get(next(iter(labels.items())), ())
        return (vm for vm in candidates if labels_match(labels, vm.labels))

    def _policy_rules(self, policy: Policy, direction: Direction) -> tuple[EffectiveRule, ...]:
        key = policy.name, direction
        if key not in self._rules:
            self._rules[key] = tuple(
                self._effective_rule(policy, direction, rule)
                for rule in policy.rules(direction)
                if rule.enabled
            )
        return self._rules[key]

    def _effective_rule(self, policy: Policy, direction: Direction, rule: Rule) -> EffectiveRule:
        return EffectiveRule(
            direction=direction,
            tier=policy.tier,
            policy=policy.name,
            name=rule.name,
            action=rule.action,
            peers=self._peers(rule),
            local=collapse(rule.local) if rule.local else ANYWHERE,
            services=self._services(rule),
            source_ports=rule.source_ports,
            log=rule.log,
            comment=rule.comment,
            file=rule.file,
            line=rule.line,
        )

    def _peers(self, rule: Rule) -> tuple[Network, ...]:
        if not rule.peers:
            return ANYWHERE
        return collapse(
            network
            for peer in rule.peers
            for network in (self.group_networks(peer) if isinstance(peer, str) else (peer,))
        )

    def _services(self, rule: Rule) -> tuple[Service, ...]:
        if not rule.services:
            return (ANY_SERVICE,)
        found: dict[Service, None] = {}
        for service in rule.services:
            if isinstance(service, Service):
                found[service] = None
            else:
                found.update(dict.fromkeys(self.document.services[service]))
        return tuple(found)


#: The resolver of the document that was asked about last: many VMs of one document follow each
#: other. It is found by identity, because documents cannot be hashed.
_latest: list[_Resolver] = []


def _resolver(document: PolicyDocument) -> _Resolver:
    for resolver in _latest:
        if resolver.document is document:
            return resolver
    resolver = _Resolver(document)
    _latest[:] = [resolver]
    return resolver
