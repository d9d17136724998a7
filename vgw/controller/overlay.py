# SPDX-License-Identifier: Apache-2.0
"""What a host knows beyond its files, laid over the document that they make: finds and leases.

Every change of the host is made by the document that comes of it, so no other module asks where an
interface's name, MAC or address came from.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection

from vgw.controller.finding.fill import Difference, Filled, fill
from vgw.controller.finding.found import FindVms, Found, nothing_found
from vgw.controller.learning.book import LeaseBook
from vgw.controller.paths import Paths
from vgw.policy.model import Address, Interface, PolicyDocument, Vm
from vgw.policy.resolve import effective_policy

#: (VM, MAC) -> the addresses that it is leased.
_Leased = dict[tuple[str, str], tuple[Address, ...]]
#: Documents that are remembered: the one in force and those that are being looked at.
_REMEMBERED = 4


class Overlay:
    """Lays over documents what is found and leased now; for use by one thread at a time."""

    def __init__(self, paths: Paths, found: FindVms = nothing_found) -> None:
        """Know the leases under `paths`; `found` gives the VMs that sources find."""
        self.book = LeaseBook(paths)
        self._found = found
        self._done: deque[tuple[PolicyDocument, Found, _Leased, Filled]] = deque(maxlen=_REMEMBERED)

    def laid(self, document: PolicyDocument) -> PolicyDocument:
        """Return the document to enforce; the same object as long as nothing changes."""
        return self._laid(document).document

    def differences(self, document: PolicyDocument) -> tuple[Difference, ...]:
        """Return where what was found differs from what is written."""
        return self._laid(document).differences

    def _laid(self, document: PolicyDocument) -> Filled:
        found = self._found(document.inventory.find)
        for known, known_found, leased, result in self._done:
            if known is document and known_found == found and leased == self._leased(result):
                return result
        filled = fill(document, found)
        leased = self._leased(filled)
        result = Filled(_with_leases(filled.document, leased), filled.differences)
        self._done.append((document, found, leased, result))
        return result

    def _leased(self, filled: Filled) -> _Leased:
        return {
            (vm.name, interface.mac): self.book.addresses(vm.name, interface.mac)
            for vm in filled.document.vms.values()
            for interface in vm.interfaces
            if interface.learns and interface.mac is not None
        }


def _with_leases(document: PolicyDocument, leased: _Leased) -> PolicyDocument:
    changed = {
        name: dataclasses.replace(vm, interfaces=_learned(vm, leased))
        for name, vm in document.vms.items()
        if any(interface.learns for interface in vm.interfaces)
    }
    return dataclasses.replace(document, vms={**document.vms, **changed}) if changed else document


def _learned(vm: Vm, leased: _Leased) -> tuple[Interface, ...]:
    return tuple(
        dataclasses.replace(each, addresses=leased.get((vm.name, each.mac or ""), ()))
        if each.learns
        else each
        for each in vm.interfaces
    )


def concerned(before: PolicyDocument, after: PolicyDocument, attached: Collection[str]) -> set[str]:
    """Return the VMs for which another document means something else.

    Those are the VMs of which it says something else, and of the attached ones those that it
    judges by other rules: a group means other addresses.
    """
    # One document after the other: policies that mean the same are then the same lists, and
    # nothing has to be compared rule by rule.
    old = {name: effective_policy(before, name) for name in attached}
    new = {name: effective_policy(after, name) for name in attached}
    judged_anew = {
        name
        for name in attached
        if old[name].ingress is not new[name].ingress or old[name].egress is not new[name].egress
    }
    names = {*before.vms, *after.vms}
    return judged_anew | {name for name in names if before.vms.get(name) != after.vms.get(name)}
