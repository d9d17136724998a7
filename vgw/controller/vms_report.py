# SPDX-License-Identifier: Apache-2.0
"""What `vms` says: the VMs that files name or sources find, what protects them, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vgw.controller import pinned
from vgw.controller.finding.found import Found, FoundVm
from vgw.controller.learning.book import LeaseBook
from vgw.controller.paths import Paths
from vgw.policy.model import Finder, Interface, PolicyDocument, Vm
from vgw.policy.resolve import applies
from vgw.policy.yaml_nodes import show

SCHEMA: Final = "vgw/v1"
Row = dict[str, Any]


def vms_report(
    paths: Paths,
    document: PolicyDocument,
    found: Found,
    problems: Mapping[Finder, str],
    memory: Memory | None = None,
) -> Row:
    """Return all VMs as JSON, by name.

    `document` is the one to enforce, with what was found and leased; `problems` are of sources,
    `memory` is what a controller remembers.
    """
    by_name = {vm.name: vm for vm in found}
    attached = pinned.attached_vms(paths)
    names = sorted({*document.vms, *by_name, *attached})
    report = _Report(paths, document, memory or Memory())
    rows = [report.row(name, by_name.get(name)) for name in names]
    return {
        "schema": SCHEMA,
        "protect": "all" if document.inventory.protect_all else "listed",
        "find": [str(finder) for finder in document.inventory.find],
        "problems": {str(finder): text for finder, text in problems.items()},
        "vms": rows,
    }


@dataclass(frozen=True, slots=True)
class Memory:
    """What only a controller that runs can say.

    `failures` is why VMs could not be protected when that was last tried, `refused` how many leases
    of an interface (VM, name) were not believed.
    """

    failures: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[tuple[str, str], int] | None = None


class _Report:
    """What all rows of one report share."""

    def __init__(self, paths: Paths, document: PolicyDocument, memory: Memory) -> None:
        self._paths = paths
        self._document = document
        self._memory = memory
        self._book = LeaseBook(paths)

    def row(self, name: str, found: FoundVm | None) -> Row:
        """Return what is known of one VM."""
        known = self._document.vms.get(name)
        listed = () if known is None else known.interfaces
        seen = () if found is None else found.interfaces
        macs = {each.name: each.mac for each in seen}
        # Attached by an order, or found before.
        nameable = found is None or found.is_nameable
        attached = pinned.interfaces_of(self._paths, name) if nameable else ()
        names = {each.name for each in listed}
        others = [each for each in dict.fromkeys([*macs, *attached]) if each not in names]
        unlisted = "nothing asks for it" if known is None else "other interfaces of it are listed"
        shown = name
        if found is not None and not found.is_nameable:
            name, shown = "", show(name)
        return {
            "vm": shown,
            "source": None if found is None else found.source,
            "running": None if found is None else found.running,
            "matches": _matches(known),
            "policies": self._policies(known),
            "reason": self._reason(name, known, found),
            "interfaces": [
                *(self._listed(name, each) for each in listed),
                *(self._row(name, each, macs.get(each), unlisted) for each in others),
            ],
        }

    def _policies(self, vm: Vm | None) -> list[str]:
        return [each.name for each in self._document.policies if applies(each.applies_to, vm)]

    def _reason(self, name: str, known: Vm | None, found: FoundVm | None) -> str | None:
        """Return why a VM as a whole is not protected, None when its interfaces say it."""
        if name in self._memory.failures:
            return self._memory.failures[name]
        if found is not None and not found.is_nameable:
            return "its name is none that vgw can use"
        if known is None and found is not None and not self._document.inventory.protect_all:
            return "no file names it, and the inventory does not say `protect: all`"
        if known is not None and not known.interfaces:
            return "no interface of it is known"
        return None

    def _listed(self, vm: str, interface: Interface) -> Row:
        row = self._row(vm, interface.name, interface.mac, "it is not attached")
        if interface.learns:
            row["learned"] = [
                {
                    "address": str(lease.address),
                    "server": str(lease.server),
                    "seconds": None if left is None else round(left),
                }
                for lease, left in self._book.leases(vm)
                if lease.mac == interface.mac
            ]
            if self._memory.refused is not None:
                row["refused"] = self._memory.refused.get((vm, interface.name), 0)
        return row

    def _row(self, vm: str, name: str, mac: str | None, otherwise: str) -> Row:
        """Return an interface; `otherwise` is why it is not protected, if it could be.

        A VM without a name that vgw can use is none that it protects.
        """
        protected = bool(vm and name) and pinned.is_attached(self._paths, vm, name)
        if not name:
            otherwise = "no source finds an interface with this MAC"
        elif pinned.present_ifindex(name) is None:
            otherwise = "it does not exist"
        return {
            "name": name or None,
            "mac": mac,
            "protected": protected,
            "reason": None if protected else otherwise,
            "learned": None,
            "refused": None,
        }


def _matches(vm: Vm | None) -> str | None:
    """Return by what a VM is protected: it is written, or the defaults for what is found."""
    if vm is None:
        return None
    return "defaults" if vm.found else "written"
