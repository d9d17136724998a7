# SPDX-License-Identifier: Apache-2.0
"""What was found on the host, laid over what is written: it fills gaps and overrides nothing.

Where both say something and differ, what is written holds, and the difference is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vgw.controller.finding.found import Found, FoundInterface, FoundVm
from vgw.policy.model import Interface, PolicyDocument, Vm
from vgw.policy.yaml_nodes import show


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that was found to be other than it is written; `interface` None: the VM.

    `vm` None: one whose name is no name.
    """

    vm: str | None
    interface: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Filled:
    """A document with what was found, and where that differs from what is written."""

    document: PolicyDocument
    differences: tuple[Difference, ...] = ()


@dataclass(slots=True)
class _Filling:
    """One document being filled: which VM each written interface and MAC belongs to."""

    document: PolicyDocument
    owners: Mapping[str, str]
    mac_owners: Mapping[str, str]
    differences: list[Difference] = field(default_factory=list)

    def differ(self, vm: str | None, interface: str | None, text: str) -> None:
        self.differences.append(Difference(vm, interface, text))


def fill(document: PolicyDocument, found: Found) -> Filled:
    """Lay what was found over a document.

    VMs that a file names get the interfaces and MACs that it does not say. With `protect: all`
    every other VM comes to the document as well, as one that no file names. The same document comes
    back when nothing of that changes it.
    """
    filling = _Filling(document, *_written(document))
    changed: dict[str, Vm] = {}
    for vm in found:
        known = document.vms.get(vm.name)
        after: Vm | None
        if known is not None and not known.found:
            after = _fill_vm(filling, known, vm)
        elif document.inventory.protect_all:
            after = _new_vm(filling, vm)
        else:
            continue
        if after is not None and after != known:
            changed[vm.name] = after
    if changed:
        document = dataclasses.replace(document, vms={**document.vms, **changed})
    return Filled(document, tuple(filling.differences))


def _written(document: PolicyDocument) -> tuple[dict[str, str], dict[str, str]]:
    """Return the VM of each interface and of each MAC that files name."""
    written = [vm for vm in document.vms.values() if not vm.found]
    names = {each.name: vm.name for vm in written for each in vm.interfaces if each.name}
    macs = {each.mac: vm.name for vm in written for each in vm.interfaces if each.mac}
    return names, macs


def _fill_vm(filling: _Filling, vm: Vm, found: FoundVm) -> Vm:
    """Return a VM that files name, with what was found of it."""
    own = _not_of_others(filling, found)
    if not vm.interfaces:
        added = tuple(Interface(each.name, each.mac, tracking=vm.tracking) for each in own)
        return dataclasses.replace(vm, interfaces=added)
    interfaces = _fill_interfaces(filling, vm, own)
    if filling.document.inventory.protect_all:
        listed = {each.name for each in interfaces}
        interfaces += [
            Interface(each.name, each.mac, tracking=vm.tracking)
            for each in own
            if each.name not in listed
        ]
    return dataclasses.replace(vm, interfaces=tuple(interfaces))


def _fill_interfaces(filling: _Filling, vm: Vm, found: Sequence[FoundInterface]) -> list[Interface]:
    """Return the interfaces that are written, with the names and MACs that were found."""
    by_name = {each.name: each for each in found}
    listed = {each.name for each in vm.interfaces}
    by_mac = {each.mac: each for each in found if each.name not in listed}
    filled: list[Interface] = []
    for interface in vm.interfaces:
        if not interface.name:
            there = by_mac.get(interface.mac)
            name = "" if there is None else there.name
            filled.append(dataclasses.replace(interface, name=name))
            continue
        seen = by_name.get(interface.name)
        mac = None if seen is None else seen.mac
        if mac is not None and interface.mac not in (None, mac):
            text = f"it is found with the MAC {mac}, and {interface.mac} is written"
            filling.differ(vm.name, interface.name, text)
        if interface.mac is None and mac is not None:
            interface = dataclasses.replace(interface, mac=mac)  # noqa: PLW2901
        filled.append(interface)
    return filled


def _new_vm(filling: _Filling, found: FoundVm) -> Vm | None:
    """Return a VM that no file names: of its interfaces those that no file gives to another."""
    if not found.is_nameable:
        text = (
            f"{show(found.name)} is no name that vgw can use, so the VM is not protected; rename it"
        )
        filling.differ(None, None, text)
        return None
    own = _not_of_others(filling, found)
    if not own:
        return None
    interfaces = tuple(Interface(each.name, each.mac) for each in own)
    return Vm(found.name, interfaces=interfaces, found=found.source)


def _not_of_others(filling: _Filling, found: FoundVm) -> list[FoundInterface]:
    """Return what was found of a VM and no file gives to another; the rest is reported."""
    own: list[FoundInterface] = []
    for each in found.interfaces:
        owner = filling.owners.get(each.name, found.name)
        mac_owner = filling.mac_owners.get(each.mac or "", found.name)
        if owner != found.name:
            text = (
                f"{found.source} says that it is of {show(found.name)}, not of {owner} as written"
            )
            filling.differ(owner, each.name, text)
        else:
            own.append(each)
            if mac_owner != found.name:
                text = f"{found.source} says that it has the MAC of VM {mac_owner}, {each.mac}"
                filling.differ(found.name, each.name, text)
    return own
