# SPDX-License-Identifier: Apache-2.0
"""Upgrade and downgrade: endpoints that another version made, brought to this one.

Programs of another build are replaced in place; endpoints with tables of another ABI are made anew
beside the old ones and get their flows. What cannot be upgraded stays in force as it is, and
says so.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vgw.controller import pinned
from vgw.controller.batch import AttachResult, each_of
from vgw.controller.builds import build_of
from vgw.controller.desired import Desired
from vgw.controller.elsewhere import (
    Elsewhere,
    endpoints_elsewhere,
    is_gone,
    remove_elsewhere,
    tidy_elsewhere,
)
from vgw.controller.layouts import LayoutError, keep_layout
from vgw.controller.replacement import settle
from vgw.controller.tools import Tools
from vgw.controller.upgrade_build import is_outdated, upgrade_programs
from vgw.errors import VgwError

_WORKERS: Final = 8


@dataclass(frozen=True, slots=True)
class Upgraded:
    """An endpoint that was brought to this version.

    `before` and `after` name builds; where the tables are of another ABI, `abi` is which it was and
    `flows` how many flows came from there for the whole VM.
    """

    vm: str
    interface: str
    before: str | None
    after: str
    abi: int | None = None
    flows: int | None = None


@dataclass(frozen=True, slots=True)
class Upgrades:
    """What became of VMs.

    `failures` says by VM why something of it stays as it was. Of `elsewhere` that is all of it: the
    VM goes on with tables of another ABI, and nothing of it can be changed.
    """

    done: Sequence[Upgraded] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, Sequence[Elsewhere]] = field(default_factory=dict)

    def noted(
        self, outcomes: Mapping[str, AttachResult | VgwError]
    ) -> dict[str, AttachResult | VgwError]:
        """Return what became of changes, with a note of what was not upgraded before them."""
        found = dict(outcomes)
        for vm, text in self.failures.items():
            outcome = found.get(vm)
            if isinstance(outcome, AttachResult):
                found[vm] = dataclasses.replace(outcome, pending=[*outcome.pending, text])
            elif outcome is None:
                found[vm] = VgwError(text)
        return found


def upgrade_vms(
    tools: Tools, vms: Iterable[str] | None, known: Mapping[str, Desired] | None = None
) -> Upgrades:
    """Bring the endpoints of VMs, None: of all, to this version.

    What fails for one keeps no other back. `known` is what VMs shall have where that is not
    remembered.
    """
    names = None if vms is None else set(vms)
    old: defaultdict[str, list[Elsewhere]] = defaultdict(list)
    for each in endpoints_elsewhere(tools.paths):
        if names is None or each.vm in names:
            old[each.vm].append(each)
    attached = pinned.attached_vms(tools.paths) if names is None else sorted(names)
    for vm in attached:
        settle(tools.paths.vm_dir(vm))
    if not (old or attached):
        return Upgrades()
    try:
        keep_layout(tools.paths.state_dir)  # without it there is no way back
        build = tools.build()
    except VgwError as error:
        text = f"nothing of it was upgraded: {error}"
        return Upgrades(failures=dict.fromkeys([*old, *attached], text), elsewhere=old)
    done, failures = _upgrade_tables(tools, old, known or {})
    left = {vm: old[vm] for vm in failures}
    for outcome in _upgrade_programs(tools, attached, build):
        if isinstance(outcome, Upgraded):
            done.append(outcome)
        else:
            failures |= outcome
    return Upgrades(done, failures, left)


def give_up_flows(
    tools: Tools, upgrades: Upgrades, outcomes: Mapping[str, AttachResult | VgwError]
) -> None:
    """Remove the old endpoints of VMs that were attached beside them, on demand without flows."""
    for vm, old in upgrades.elsewhere.items():
        if isinstance(outcomes.get(vm), AttachResult):
            for each in old:
                remove_elsewhere(
                    tools.paths, each, pinned.present_ifindex(each.interface), force=True
                )


def _upgrade_tables(
    tools: Tools, old: Mapping[str, Sequence[Elsewhere]], known: Mapping[str, Desired]
) -> tuple[list[Upgraded], dict[str, str]]:
    """Bring VMs with tables of another ABI to this one; return what was done, and why not."""
    done: list[Upgraded] = []
    failures: dict[str, str] = {}

    def take(vm: str) -> list[Upgraded]:
        return _take_over(tools, vm, old[vm], known.get(vm))

    for vm, outcome in each_of(take, old, _WORKERS, tools.alive):
        if isinstance(outcome, list):
            done += outcome
        elif isinstance(outcome, LayoutError):
            failures[vm] = str(outcome)
        else:
            text = f"it goes on filtering with the tables of ABI {old[vm][0].abi}: {outcome}"
            failures[vm] = text
    if old:
        tidy_elsewhere(tools.paths)
    return done, failures


def _take_over(
    tools: Tools, vm: str, old: Sequence[Elsewhere], known: Desired | None
) -> list[Upgraded]:
    # numpy, which this needs, is nothing for each start.
    from vgw.controller.upgrade_tables import settle_beside, take_over  # noqa: PLC0415

    for each in old:
        each.layout(tools.paths)
        if is_gone(each):
            remove_elsewhere(tools.paths, each, None)
    present = [each for each in old if pinned.present_ifindex(each.interface) is not None]
    left = settle_beside(tools.paths, vm, present)
    if not left:
        return []
    before = {each.interface: build_of(each.directory) for each in left}
    flows = take_over(tools, vm, left, known)
    return [
        Upgraded(vm, each.interface, before[each.interface], tools.build(), each.abi, flows)
        for each in left
    ]


def _upgrade_programs(
    tools: Tools, vms: Iterable[str], build: str
) -> Iterator[Upgraded | dict[str, str]]:
    """Bring the programs of VMs to a build; yield what was done, and why not by VM."""
    outdated = [
        (vm, name)
        for vm in vms
        for name in pinned.interfaces_of(tools.paths, vm)
        if is_outdated(tools.paths.endpoint_dir(vm, name), build)
    ]

    def upgrade(each: tuple[str, str]) -> Upgraded | None:
        vm, name = each
        ifindex = pinned.present_ifindex(name)
        before = build_of(tools.paths.endpoint_dir(vm, name))
        if ifindex is None or not upgrade_programs(tools, vm, name, ifindex):
            return None
        return Upgraded(vm, name, before, build)

    for (vm, name), outcome in each_of(upgrade, outdated, _WORKERS, tools.alive):
        if isinstance(outcome, Exception):
            yield {vm: f"{name} goes on with the programs of another build: {outcome}"}
        elif outcome is not None:
            yield outcome
