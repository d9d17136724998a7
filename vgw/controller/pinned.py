# SPDX-License-Identifier: Apache-2.0
"""What is pinned on this host, by name: VMs and their interfaces, whole or broken."""

from __future__ import annotations

import socket
from collections import defaultdict

from vgw import abi
from vgw.controller import links
from vgw.controller.links import InterfaceFacts
from vgw.controller.paths import Paths, unpin_name
from vgw.controller.pins import directories, names
from vgw.errors import VgwError


def interfaces_of(paths: Paths, vm: str) -> list[str]:
    """Return the interfaces of a VM for which something is pinned."""
    found = map(unpin_name, names(paths.vm_dir(vm)))  # what is on its way has no name
    return sorted(name for name in found if name is not None)


def attached_vms(paths: Paths) -> list[str]:
    """Return the VMs that have endpoints, in order of their names."""
    return [vm for vm in pinned_vms(paths) if interfaces_of(paths, vm)]


def known_vms(paths: Paths) -> list[str]:
    """Return the VMs of which there is any trace, pinned or remembered."""
    remembered = (unpin_name(file.stem) for file in paths.manifests.glob("*.json"))
    return sorted({*pinned_vms(paths), *(name for name in remembered if name is not None)})


def owners(paths: Paths) -> dict[str, list[str]]:
    """Return the VMs that have something pinned for an interface, by interface."""
    found: dict[str, list[str]] = defaultdict(list)
    for vm in pinned_vms(paths):
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


def located(paths: Paths, vm: str, interface: str) -> InterfaceFacts | None:
    """Return the interface here that an endpoint's programs are on, whatever its name is now.

    None when they are on none, or on one in another network namespace.
    """
    directory = paths.endpoint_dir(vm, interface)
    ifindex = links.attached_ifindex(directory)
    if ifindex is None:
        return None
    try:
        # Another interface may have the index here that ours has elsewhere.
        if any(links.read_attachment(ifindex, path, directory) for path in abi.Path):
            return links.find_interface(socket.if_indextoname(ifindex))
    except (OSError, VgwError):
        pass  # there is no interface of that index here
    return None


def present_ifindex(interface: str) -> int | None:
    """Return the index of an interface, None when there is none to protect of that name."""
    try:
        return links.find_interface(interface).ifindex
    except VgwError:
        return None


def pinned_vms(paths: Paths) -> list[str]:
    """Return the VMs for which there is a directory, in order of their names."""
    found = map(unpin_name, directories(paths.pins))
    return sorted(name for name in found if name is not None)
