# SPDX-License-Identifier: Apache-2.0
"""What a policy means for one VM: its rules in the order of evaluation, every name resolved.

VMs to which the same policies apply get the same tuples of rules, and a document that differs from
an earlier one in little gets the earlier one's objects for everything that means the same: whoever
reads effective policies may go by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Final, Generic, TypeVar

from vgw.policy.groups import Groups, collapse, labels_match
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    TIERS,
    AppliesTo,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Network,
    Policy,
    PolicyDocument,
    Rule,
    Service,
    Vm,
)

_T = TypeVar("_T")
_Rules = tuple[EffectiveRule, ...]
#: What a VM's list of rules is made of: the direction and the names of the policies.
_ListKey = tuple[Direction, tuple[str, ...]]
#: The rules of each policy of a list, and all of them in one tuple.
_Joined = tuple[list[_Rules], _Rules]

#: Documents that are remembered: the one in force and the one that is being looked at.
_REMEMBERED: Final = 2
_ANY_SERVICES: Final = (ANY_SERVICE,)


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
    return _resolver(document).groups.networks(name)


def empty_groups(document: PolicyDocument) -> tuple[str, ...]:
    """Return the groups that stand for nothing, in the order of the document."""
    return _resolver(document).groups.empty()


def applies(applies_to: AppliesTo, vm: Vm | None) -> bool:
    """Tell whether a policy is for a VM; None is one that the document does not name."""
    if applies_to.all or vm is None:
        return applies_to.all
    return vm.name in applies_to.vms or labels_match(applies_to.labels, vm.labels)


class _Names(Generic[_T]):
    """The groups or the services in a list of rules: what each stood for, and where it is used."""

    def __init__(self) -> None:
        self._meanings: dict[str, tuple[_T, ...]] = {}
        self._users: dict[str, list[int]] = {}

    def note(self, name: str, meaning: tuple[_T, ...], user: int) -> None:
        """Note what a name stands for in the rule of a position."""
        self._meanings[name] = meaning
        self._users.setdefault(name, []).append(user)

    def update(self, meaning: Callable[[str], tuple[_T, ...]]) -> tuple[_Names[_T], set[int]]:
        """Return the names with what they stand for now, and where that is something else."""
        updated: _Names[_T] = _Names()
        updated._users = self._users
        updated._meanings = {name: meaning(name) for name in self._meanings}
        others = (
            name for name, now in updated._meanings.items() if now is not self._meanings[name]
        )
        return updated, {user for name in others for user in self._users[name]}


@dataclass(frozen=True, slots=True)
class _Part:
    """The rules of one direction of a policy that are enabled, as written and as they hold."""

    policy: Policy
    direction: Direction
    written: tuple[Rule, ...]
    rules: _Rules
    groups: _Names[Network]
    services: _Names[Service]


class _Resolver:
    """Resolves one document and remembers what VMs and the next document share."""

    def __init__(self, document: PolicyDocument, earlier: _Resolver | None = None) -> None:
        self.document = document
        self.groups: Groups = Groups(document, earlier.groups if earlier else None)
        self._policies = sorted(document.policies, key=lambda policy: TIERS.index(policy.tier))
        self._parts: dict[tuple[str, Direction], _Part] = {}
        self._lists: dict[_ListKey, _Joined] = {}
        self._networks: dict[tuple[str | Network, ...], tuple[Network, ...]] = {}
        self._services: dict[tuple[str | Service, ...], tuple[Service, ...]] = {}
        # What an earlier document had and this one was not asked about yet.
        self._earlier_parts: dict[tuple[str, Direction], _Part] = {}
        self._earlier_lists: dict[_ListKey, _Joined] = {}
        if earlier is not None:
            self._take_over(earlier)

    def _take_over(self, earlier: _Resolver) -> None:
        policies = {policy.name: policy for policy in self._policies}
        for parts in (earlier._earlier_parts, earlier._parts):
            for key, part in parts.items():
                if policies.get(part.policy.name) is part.policy:
                    self._earlier_parts[key] = part
        self._earlier_lists = earlier._lists or earlier._earlier_lists

    def effective_policy(self, vm_name: str | None) -> EffectivePolicy:
        vm = None if vm_name is None else self.document.vms.get(vm_name)
        policies = [policy for policy in self._policies if applies(policy.applies_to, vm)]
        ingress, egress = (self._list(policies, direction) for direction in Direction)
        return EffectivePolicy(
            vm=vm_name or "", ingress=ingress, egress=egress, defaults=self.document.defaults
        )

    def _list(self, policies: Sequence[Policy], direction: Direction) -> _Rules:
        """Return the rules of policies one after the other; of the same ones, the same tuple."""
        key = direction, tuple(policy.name for policy in policies)
        if key not in self._lists:
            parts = [self._part(policy, direction).rules for policy in policies]
            earlier = self._earlier_lists.get(key)
            if earlier is None or not all(map(is_, earlier[0], parts)):
                earlier = parts, parts[0] if len(parts) == 1 else tuple(chain.from_iterable(parts))
            self._lists[key] = earlier
        return self._lists[key][1]

    def _part(self, policy: Policy, direction: Direction) -> _Part:
        key = policy.name, direction
        if key not in self._parts:
            earlier = self._earlier_parts.pop(key, None)
            self._parts[key] = (
                self._resolved(policy, direction) if earlier is None else self._updated(earlier)
            )
        return self._parts[key]

    def _resolved(self, policy: Policy, direction: Direction) -> _Part:
        groups: _Names[Network] = _Names()
        services: _Names[Service] = _Names()
        written = tuple(rule for rule in policy.rules(direction) if rule.enabled)
        for position, rule in enumerate(written):
            for peer in rule.peers:
                if isinstance(peer, str):
                    groups.note(peer, self.groups.networks(peer), position)
            for service in rule.services:
                if isinstance(service, str):
                    services.note(service, self.document.services[service], position)
        rules = tuple(self._effective_rule(policy, direction, rule) for rule in written)
        return _Part(policy, direction, written, rules, groups, services)

    def _updated(self, part: _Part) -> _Part:
        """Return a part of an earlier document as it holds in this one."""
        groups, with_groups = part.groups.update(self.groups.networks)
        services, with_services = part.services.update(self.document.services.__getitem__)
        positions = with_groups | with_services
        if not positions:
            return part
        rules = list(part.rules)
        for position in positions:
            rule = part.written[position]
            rules[position] = self._effective_rule(part.policy, part.direction, rule)
        return _Part(part.policy, part.direction, part.written, tuple(rules), groups, services)

    def _effective_rule(self, policy: Policy, direction: Direction, rule: Rule) -> EffectiveRule:
        return EffectiveRule(
            direction=direction,
            tier=policy.tier,
            policy=policy.name,
            name=rule.name,
            action=rule.action,
            peers=self._networks_of(rule.peers) if rule.peers else ANYWHERE,
            local=self._networks_of(rule.local) if rule.local else ANYWHERE,
            services=self._services_of(rule.services) if rule.services else _ANY_SERVICES,
            source_ports=rule.source_ports,
            log=rule.log,
            comment=rule.comment,
            file=rule.file,
            line=rule.line,
        )

    def _networks_of(self, entries: tuple[str | Network, ...]) -> tuple[Network, ...]:
        found = self._networks.get(entries)
        if found is None:
            members = [
                self.groups.networks(entry) if isinstance(entry, str) else (entry,)
                for entry in entries
            ]
            if len(members) == 1:
                found = members[0]
            else:
                self.groups.members.add(sum(map(len, members)), f"a list of {len(entries)} peers")
                found = collapse(chain.from_iterable(members))
            self._networks[entries] = found
        return found

    def _services_of(self, entries: tuple[str | Service, ...]) -> tuple[Service, ...]:
        found = self._services.get(entries)
        if found is None:
            alternatives: dict[Service, None] = {}
            for entry in entries:
                if isinstance(entry, Service):
                    alternatives[entry] = None
                else:
                    alternatives.update(dict.fromkeys(self.document.services[entry]))
            found = self._services[entries] = tuple(alternatives)
        return found


#: The resolvers of the documents that were asked about last, newest first: many VMs of one document
#: follow each other. They are found by identity, because documents cannot be hashed.
_latest: list[_Resolver] = []


def _resolver(document: PolicyDocument) -> _Resolver:
    latest = tuple(_latest)
    for resolver in latest:
        if resolver.document is document:
            return resolver
    # A document with the policies of another one is a later state of it and takes its place.
    same = [each for each in latest if each.document.policies is document.policies]
    others = [each for each in latest if each not in same]
    resolver = _Resolver(document, (*same, *others, None)[0])
    _latest[:] = [resolver, *others][:_REMEMBERED]
    return resolver
