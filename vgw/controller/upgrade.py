# SPDX-License-Identifier: Apache-2.0
"""Upgrade and downgrade: endpoints that another version made, brought to this one.

Programs of another build are replaced in place. What cannot be upgraded stays in force as it is,
and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from vgw.controller import pinned
from vgw.controller.batch import AttachResult
from vgw.controller.builds import build_of
from vgw.controller.replacement import settle
from vgw.controller.tools import Tools
from vgw.controller.upgrade_build import is_outdated, upgrade_programs
from vgw.errors import VgwError

_WORKERS: Final = 8


@dataclass(frozen=True, slots=True)
class Upgraded:
    """An endpoint that was brought to this version: from which build to which."""

    vm: str
    interface: str
    before: str | None
    after: str


@dataclass(frozen=True, slots=True)
class Upgrades:
    """What became of VMs.

    `failures` says by VM why something of it stays as it was.
    """

    done: Sequence[Upgraded] = ()
    failures: Mapping[str, str] = field(default_factory=dict)

    def noted(
        self, outcomes: Mapping[str, AttachResult | VgwError]
    ) -> dict[str, AttachResult | VgwError]:
        """Return what became of changes, with a note of what was not upgraded before them."""
        found = dict(outcomes)
        for vm, text in self.failures.items():
            outcome = found.get(vm)
            if isinstance(outcome, AttachResult):
                found[vm] = dataclasses.replace(outcome, pending=[*outcome.pending, text])
        return found


def upgrade_vms(tools: Tools, vms: Iterable[str]) -> Upgrades:
    """Bring the endpoints of VMs to this version; what fails for one keeps no other back."""
    done: list[Upgraded] = []
    failures: dict[str, str] = {}
    names = list(vms)
    for vm in names:
        settle(tools.paths.vm_dir(vm))
    there = [(vm, name) for vm in names for name in pinned.interfaces_of(tools.paths, vm)]
    if not there:
        return Upgrades()
    try:
        build = tools.build()
    except VgwError as error:
        text = f"its programs go on; whether they are of this build is not known: {error}"
        return Upgrades(failures={vm: text for vm, _ in there})
    outdated = [each for each in there if is_outdated(tools.paths.endpoint_dir(*each), build)]
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="vgw-upgrade") as pool:
        futures = {each: pool.submit(_upgrade_build, tools, *each) for each in outdated}
        for (vm, name), future in futures.items():
            try:
                upgraded = future.result()
            except (VgwError, OSError) as error:
                failures[vm] = f"{name} goes on with the programs of another build: {error}"
                continue
            if upgraded is not None:
                done.append(upgraded)
    return Upgrades(done, failures)


def _upgrade_build(tools: Tools, vm: str, name: str) -> Upgraded | None:
    ifindex = pinned.present_ifindex(name)
    before = build_of(tools.paths.endpoint_dir(vm, name))
    if ifindex is None or not upgrade_programs(tools, vm, name, ifindex):
        return None
    return Upgraded(vm, name, before, tools.build())
