# SPDX-License-Identifier: Apache-2.0
"""Interfaces that were renamed: their endpoints go on, and are called by the new name.

The pins and the remembered facts of an endpoint are filed under the name of its interface. When
that changes both are filed anew; the facts keep the name that the policy uses (`Interface.name`),
by which the policy still finds its interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from vgw import files
from vgw.controller import links, pinned
from vgw.controller.alarms import Alarms
from vgw.controller.endpoint import open_endpoint
from vgw.controller.interfaces import InterfaceNames
from vgw.controller.manifest import EndpointEntry, Manifest, load_manifest, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.pins import moving
from vgw.controller.replacement import destroy, settle
from vgw.errors import VgwError
from vgw.policy.model import Interface

_ALARM: Final = "renamed"


@dataclass(frozen=True, slots=True)
class Renamed:
    """An endpoint whose interface has another name now; both names as the host has them."""

    vm: str
    old: str
    new: str


def follow_renames(paths: Paths) -> list[Renamed]:
    """File endpoints under the names that their interfaces have now; return which were renamed.

    To be called under the writer lock; a process that dies on the way leaves what the next call
    completes. An endpoint keeps its old name while the new one is no UTF-8 text. Raises VgwError
    when the state directory cannot be written, with the endpoints filed as before.
    """
    for vm in pinned.pinned_vms(paths):
        settle(paths.vm_dir(vm))
    found: dict[str, dict[str, str]] = {}
    with InterfaceNames() as present:
        for old, vms in pinned.owners(paths).items():
            for vm in vms:
                new = _other_name(paths, vm, old, present)
                if new is not None:
                    found.setdefault(vm, {})[old] = new
    for vm, names in found.items():
        _file_anew(paths, vm, names)
    return [Renamed(vm, old, new) for vm, names in found.items() for old, new in names.items()]


def policy_names(manifest: Manifest) -> dict[str, str]:
    """Return what the policy calls each interface that has another name, by that name."""
    return {
        name: entry.interface.name
        for name, entry in manifest.endpoints.items()
        if entry.interface.name != name
    }


def say_renamed(paths: Paths, vms: Iterable[str], alarms: Alarms) -> None:
    """Raise an alarm for each interface whose name is not that of the policy; end the others'."""
    standing = {alarm.vm for alarm in alarms.current() if alarm.alarm == _ALARM and alarm.vm}
    for vm in standing.union(vms):
        manifest = load_manifest(paths.manifest(vm))
        names = {} if manifest is None else policy_names(manifest)
        for alarm in alarms.current():
            if (alarm.alarm, alarm.vm) == (_ALARM, vm) and alarm.interface not in names:
                alarms.clear(_ALARM, vm=vm, interface=alarm.interface)
        for new, old in names.items():
            text = (
                f"the policy calls this interface {old}; it stays protected as that; correct its "
                f"name in the policy, or name it {old} again"
            )
            alarms.set(_ALARM, text, vm=vm, interface=new)


def with_renamed(
    paths: Paths, vm: str, wanted: Mapping[str, Interface], manifest: Manifest | None
) -> dict[str, Interface]:
    """Return a VM's wanted interfaces by the names that they have now.

    One that was renamed stands for the name that the policy uses. If there is an interface of that
    name too, both are wanted: the one has the VM's programs, the other the VM's name.
    """
    names = dict(wanted)
    for new, old in ({} if manifest is None else policy_names(manifest)).items():
        if old in wanted and new not in wanted and pinned.is_attached(paths, vm, new):
            names[new] = wanted[old]
            if pinned.present_ifindex(old) is None:
                names.pop(old, None)
    return names


def _other_name(paths: Paths, vm: str, old: str, present: InterfaceNames) -> str | None:
    """Return the name that an endpoint's interface has now if it is another one."""
    ifindex = links.attached_ifindex(paths.endpoint_dir(vm, old))
    if ifindex is None or present.of(ifindex) == old:
        return None
    facts = pinned.located(paths, vm, old)
    return None if facts is None or not _is_text(facts.name) else facts.name


def _file_anew(paths: Paths, vm: str, names: Mapping[str, str]) -> None:
    manifest = load_manifest(paths.manifest(vm))
    if manifest is not None:
        entries = _entries(paths, manifest, names)
        if entries != manifest.endpoints:
            save_manifest(paths.manifest(vm), dataclasses.replace(manifest, endpoints=entries))
    exchanged = [old for old in names if old in names.values()]
    for old in exchanged:  # leave their places first, for each other
        aside = moving(paths.endpoint_dir(vm, names[old]))
        if aside.exists():
            destroy(aside, None)
        files.rename(paths.endpoint_dir(vm, old), aside)
    for old, new in names.items():
        place = paths.endpoint_dir(vm, new)
        if place.exists():  # left of an interface of this name that is gone
            destroy(place, None)
        source = moving(place) if old in exchanged else paths.endpoint_dir(vm, old)
        files.rename(source, place)


def _entries(
    paths: Paths, manifest: Manifest, names: Mapping[str, str]
) -> dict[str, EndpointEntry]:
    """Return a manifest's entries by the new names.

    They are told apart by the endpoints' identities, for a process that died may have filed them
    anew already.
    """
    by_identity = {entry.endpoint: entry for entry in manifest.endpoints.values()}
    moved: dict[str, EndpointEntry] = {}
    for old, new in names.items():
        entry = manifest.endpoints.get(old)
        with (
            contextlib.suppress(VgwError),
            open_endpoint(manifest.vm, old, paths.endpoint_dir(manifest.vm, old)) as endpoint,
        ):
            entry = by_identity.get(endpoint.maps.config().endpoint)
        if entry is not None:
            moved[new] = entry
    identities = {entry.endpoint for entry in moved.values()}
    kept = {
        name: entry
        for name, entry in manifest.endpoints.items()
        if name not in moved and entry.endpoint not in identities
    }
    return kept | moved


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
