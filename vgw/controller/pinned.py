# SPDX-License-Identifier: Apache-2.0
"""What is pinned on this host, by name: VMs and their interfaces, whole or broken."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from vgw import abi
from vgw.controller import links
from vgw.controller.paths import Paths, unpin_name
from vgw.controller.pins import endpoint_dirs
from vgw.errors import VgwError


def interfaces_of(paths: Paths, vm: str) -> list[str]:
    """Return the interfaces of a VM for which something is pinned."""
    found = (unpin_name(entry.name) for entry in endpoint_dirs(paths.vm_dir(vm)))
    return sorted(name for name in found if name is not None)


def attached_vms(paths: Paths) -> list[str]:
    """Return the VMs that have endpoints, in order of their names."""
    return [vm for vm in _pinned_vms(paths) if interfaces_of(paths, vm)]


def known_vms(paths: Paths) -> list[str]:
    """Return the VMs of which there is any trace, pinned or remembered."""
    remembered = (unpin_name(file.stem) for file in paths.manifests.glob("*.json"))
    return sorted({*_pinned_vms(paths), *(name for name in remembered if name is not None)})


def owners(paths: Paths) -> dict[str, list[str]]:
    """Return the VMs that have something pinned for an interface, by interface."""
    found: dict[str, list[str]] = defaultdict(list)
    for vm in _pinned_vms(paths):
        for name in interfaces_of(paths, vm):
            found[name].append(vm)
    return found


def is_attached(paths: Paths, vm: str, interface: str) -> bool:
    """Tell whether a program of a VM's endpoint is on the interface of that name now."""
    ifindex = present_ifindex(interface)
    directory = paths.endpoint_dir(vm, interface)
    return ifindex is not None and any(
        links.read_attachment(ifindex, path, directory) is not None for path in abi.Path
    )


def is_gone(paths: Paths, vm: str, interface: str) -> bool:
    """Tell whether the interface of an endpoint is no more: not there, and not renamed or moved."""
    if present_ifindex(interface) is not None:
        return False
    return links.linked_ifindex(paths.endpoint_dir(vm, interface)) is None


def present_ifindex(interface: str) -> int | None:
    """Return the index of an interface, None when there is none to protect of that name."""
    try:
        return links.find_interface(interface).ifindex
    except VgwError:
        return None


def _pinned_vms(paths: Paths) -> list[str]:
    names = (unpin_name(entry.name) for entry in _directories(paths.pins))
    return sorted(name for name in names if name is not None)


def _directories(directory: Path) -> list[Path]:
    try:
        return [entry for entry in directory.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []
