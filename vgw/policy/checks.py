# SPDX-License-Identifier: Apache-2.0
"""What only the whole policy shows: unknown names, cycles, conflicts, and warnings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Final

from vgw.policy.draft import Draft, InterfacePlace, Kind, Reference
from vgw.policy.guards import missing_guards
from vgw.policy.model import ANY_SERVICE, PORT_PROTOCOLS, PolicyDocument, Rule, Service
from vgw.policy.report import Report
from vgw.policy.resolve import applies, empty_groups
from vgw.policy.yaml_nodes import Node, show

#: Groups of a cycle that are listed.
_LONGEST_CYCLE: Final = 8


def check_draft(draft: Draft) -> None:
    """Report what is wrong between the parts of a policy."""
    if not draft.report.unread_files:
        _check_references(draft)
    _check_cycles(draft)
    _check_interfaces(draft)
    _check_source_ports(draft)


def _check_references(draft: Draft) -> None:
    for reference in draft.references:
        known = draft.places[reference.kind]
        if reference.name not in known:
            near = draft.report.suggestion(reference.name, known)
            where = "no file of the policy defines it"
            message = f"unknown {reference.kind} {show(reference.name)}: {where}{near}"
            draft.report.add(reference.node, message)


def _check_cycles(draft: Draft) -> None:
    """Report each reference that closes a cycle of groups."""
    edges: dict[str, list[Reference]] = {}
    for reference in draft.references:
        if reference.owner:
            edges.setdefault(reference.owner, []).append(reference)
    finished: set[str] = set()
    for start, references in edges.items():
        # Depth first without recursion: `trail` holds the groups from `start` to the current one.
        trail = {} if start in finished else {start: iter(references)}
        while trail:
            group = next(reversed(trail))
            inner = next(trail[group], None)
            if inner is None:
                finished.add(group)
                del trail[group]
            elif inner.name in trail:
                names = list(trail)
                cycle = [*names[names.index(inner.name) :], inner.name]
                if len(cycle) > _LONGEST_CYCLE:
                    cycle = [*cycle[: _LONGEST_CYCLE - 2], "...", cycle[-2], cycle[-1]]
                message = f"groups cannot contain themselves: {' -> '.join(cycle)}"
                draft.report.add(inner.node, message)
            elif inner.name not in finished:
                trail[inner.name] = iter(edges.get(inner.name, ()))


def _check_interfaces(draft: Draft) -> None:
    """Report interfaces and MAC addresses that two VMs claim."""
    names: dict[str, tuple[str, Node]] = {}
    macs: dict[str, tuple[str, Node]] = {}
    for place in draft.interfaces:
        if place.name is not None:
            vm, node = names.setdefault(place.interface.name, (place.vm, place.name))
            if node is not place.name:
                owner = f"VM {show(vm)} at {node.place}"
                message = f"the interface {show(place.interface.name)} belongs to {owner} already"
                draft.report.add(place.name, message)
        if place.mac is None or place.interface.mac is None:
            continue
        vm, node = macs.setdefault(place.interface.mac, (place.vm, place.mac))
        # Of one VM's interfaces several may have the same MAC, if it is not what they are found by.
        if vm != place.vm or (node is not place.mac and place.name is None):
            owner = f"VM {show(vm)} at {node.place}"
            message = f"the MAC address {place.interface.mac} belongs to {owner} already"
            draft.report.add(place.mac, message)


def _check_source_ports(draft: Draft) -> None:
    """Report rules that would restrict the source ports of protocols without ports."""
    for node, rule in draft.port_rules:
        if portless := _portless(draft, rule):
            message = f"`source_ports` needs services with ports, {portless} has none"
            draft.report.add(node, f"{message}; name services such as tcp/1-65535 or udp/53")


def _portless(draft: Draft, rule: Rule) -> str:
    """Return the first service of a rule that has no ports, or nothing."""
    if not rule.services:
        return "`any` (no `services` given)"
    for service in rule.services:
        if isinstance(service, Service):
            alternatives: Iterable[Service] = (service,)
        else:
            alternatives = draft.services.get(service, ())
        for each in alternatives:
            if each == ANY_SERVICE or each.protocol not in PORT_PROTOCOLS:
                if isinstance(service, str):
                    return f"the service {show(service)}"
                return "`any`" if each == ANY_SERVICE else f"protocol {each.protocol}"
    return ""


def warn(draft: Draft, document: PolicyDocument) -> Report:
    """Return what is valid but probably not meant, of a document without problems."""
    warnings = Report()
    warnings.roots = draft.report.roots
    for name in empty_groups(document):
        node = draft.places[Kind.GROUP][name]
        warnings.add(node, f"the group {show(name)} has no addresses and matches nothing")
    for policy in document.policies:
        applies_to = policy.applies_to
        if not applies_to.all and not any(applies(applies_to, vm) for vm in document.vms.values()):
            node = draft.places[Kind.POLICY][policy.name]
            warnings.add(node, f"the policy {show(policy.name)} applies to no VM")
    for name, node in draft.places[Kind.VM].items():
        if not document.vms[name].interfaces:
            warnings.add(node, f"the VM {show(name)} has no interfaces; nothing of it is protected")
    _warn_about_guards(draft, warnings)
    _warn_about_what_is_found(draft, warnings)
    return warnings


def _warn_about_guards(draft: Draft, warnings: Report) -> None:
    for place in draft.interfaces:
        guards = place.interface.guards
        reasons = missing_guards(place.interface)
        reasons |= {
            each.name: "`guards` turns it off"
            for each in fields(guards)
            if not getattr(guards, each.name)
        }
        for reason in dict.fromkeys(reasons.values()):
            names = ", ".join(name for name, why in reasons.items() if why == reason)
            where = f"{_shown(place)} of VM {show(place.vm)}"
            warnings.add(place.node, f"{where} is without the guards {names}: {reason}")


def _warn_about_what_is_found(draft: Draft, warnings: Report) -> None:
    """Warn of what has to be found by the host, where it does not look for VMs."""
    if draft.inventory.find:
        return
    for place in draft.interfaces:
        where = f"{_shown(place)} of VM {show(place.vm)}"
        if place.name is None:
            message = "has no `name` and is protected only where the host's inventory has `find`"
            warnings.add(place.node, f"{where} {message}")
        if place.interface.learns and place.mac is None:
            warnings.add(place.node, f"{where} learns no addresses: it has no `mac`")


def _shown(place: InterfacePlace) -> str:
    return f"interface {show(place.interface.name or str(place.interface.mac))}"
