# SPDX-License-Identifier: Apache-2.0
"""What a source of VMs finds, and what a source is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vgw.errors import VgwError
from vgw.policy import values
from vgw.policy.model import Finder


@dataclass(frozen=True, slots=True)
class FoundInterface:
    """An interface of a VM: its name on the host, and the guest's MAC where that is known."""

    name: str
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class FoundVm:
    """A VM as its source names it, which may be no name that a policy can use.

    `interfaces` are those that it has on the host now: none while it does not run.
    """

    name: str
    source: str
    running: bool
    interfaces: tuple[FoundInterface, ...] = ()

    @property
    def is_nameable(self) -> bool:
        """Whether a policy can name the VM."""
        try:
            values.name(self.name)
        except ValueError:
            return False
        return True


#: All that is found, each VM once, in the order of the sources and of their names.
Found = tuple[FoundVm, ...]
#: Gives what is found by some sources.
FindVms = Callable[[Sequence[Finder]], Found]


def nothing_found(_: Sequence[Finder]) -> Found:
    """Return no VM."""
    return ()


class SourceError(VgwError):
    """A source cannot be looked at now; what it found before still counts."""


class Source(Protocol):
    """Where VMs are found. Used by one thread, which may wait in it as long as it likes."""

    finder: Finder

    def scan(self) -> Sequence[FoundVm]:
        """Return the VMs that there are now. Raises SourceError."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called, by any thread, when it is worth scanning again."""

    def close(self) -> None:
        """Let go of what is open; nothing is called after that."""


def clean_interface(name: object, mac: object) -> FoundInterface | None:
    """Return an interface that others named, None when its name can be none of an interface.

    A MAC that is none, or no single host's, counts as not known.
    """
    try:
        known = values.interface_name(str(name or ""))
    except ValueError:
        return None
    try:
        return FoundInterface(known, values.mac(str(mac or "")))
    except ValueError:
        return FoundInterface(known)


def merged(parts: Iterable[Sequence[FoundVm]]) -> Found:
    """Return what several sources found as one; the earlier source is believed.

    A VM that more than one names has the interfaces of all. An interface is of one VM only, and a
    VM that is left without one by that is left out: it was found under another name before.
    """
    vms: dict[str, FoundVm] = {}
    owners: dict[str, str] = {}
    for vm in (each for part in parts for each in part):
        own = [each for each in vm.interfaces if owners.setdefault(each.name, vm.name) == vm.name]
        known = vms.get(vm.name)
        if known is None:
            if own or not vm.interfaces:
                vms[vm.name] = FoundVm(vm.name, vm.source, vm.running, tuple(own))
            continue
        macs = {each.name: each.mac for each in own} | {
            each.name: each.mac for each in known.interfaces if each.mac is not None
        }
        names = dict.fromkeys(each.name for each in (*known.interfaces, *own))
        vms[vm.name] = FoundVm(
            vm.name,
            known.source,
            known.running or vm.running,
            tuple(FoundInterface(name, macs.get(name)) for name in names),
        )
    return tuple(vms.values())
