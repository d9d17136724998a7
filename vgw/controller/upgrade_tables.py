# SPDX-License-Identifier: Apache-2.0
"""Upgrade to another ABI: a VM's endpoints made anew beside those of another version.

The new programs run in the same chain as the old ones, at first only watching: they open flows and
drop nothing, while the old ones judge. Then come the flows that were there before, until the new
table has all that the old one has; then the new programs judge too, and only then the old ones
go. Whoever finds this unfinished begins it anew, or, when the new ones judge already, ends it.

Where two programs cannot run beside each other (XDP, or no links) the new one is filled first
and takes the place of the old one by one call; what was opened in between follows at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np

from vgw import abi, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller import links, pinned
from vgw.controller.builds import mark_build
from vgw.controller.change import Change
from vgw.controller.clock import coarse_now_ns
from vgw.controller.columns import Columns
from vgw.controller.desired import Desired, sources_of
from vgw.controller.elsewhere import UNFINISHED, Elsewhere, is_unfinished
from vgw.controller.endpoint import Blueprint, OpenEndpoint
from vgw.controller.flow_table import Filled, keys_of, put_flows, read_flows
from vgw.controller.foreign_tables import ForeignTables
from vgw.controller.images import Images
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.paths import Paths
from vgw.controller.pins import quietly
from vgw.controller.recovery import STRICTNESS, policy_of
from vgw.controller.replacement import destroy
from vgw.controller.rule_counts import RuleCounts, add, load_counts, named, save_counts
from vgw.controller.tools import Tools
from vgw.errors import VgwError
from vgw.loader import Artefact
from vgw.policy.model import REJECT_PER_SECOND, Hook

#: How often tables are compared at most; the second time finds what changed during the first.
_PASSES: Final = 8
#: The coarse clock's steps: flows whose beginnings differ by less are the same one.
_SAME_NS: Final = 20_000_000
#: How far a flow is in its life, by state: what only goes up.
_STAGE: Final = {
    abi.FlowState.TCP_ESTABLISHED: 2,
    abi.FlowState.TCP_FIN: 3,
    abi.FlowState.TCP_CLOSED: 4,
    abi.FlowState.UDP_REPLIED: 2,
}
_STAGES: Final = np.array([_STAGE.get(state, 1) for state in abi.FlowState], np.int8)


def take_over(tools: Tools, vm: str, old: Sequence[Elsewhere], known: Desired | None) -> int:
    """Make the endpoints of a VM anew from those of another version; return the flows carried.

    `known` is what the VM shall have in case that is not remembered. Raises VgwError, and the old
    endpoints go on alone then.
    """
    with contextlib.ExitStack() as stack:
        tables = {
            each.interface: stack.enter_context(ForeignTables(tools.paths, each)) for each in old
        }
        desired = _desired(tools, vm, tables, known)
        change = _TakeOver(tools, desired, tables)
        stack.enter_context(change)
        change.prepare()
        change.commit()
        libbpf.wait_for_programs()
        change.finish()
        if change.counts:
            save_counts(tools.paths.counts(vm), RuleCounts(change.counts))
        for each in old:
            destroy(each.directory, pinned.present_ifindex(each.interface))
        return change.carried


def settle_beside(paths: Paths, vm: str, old: Sequence[Elsewhere]) -> list[Elsewhere]:
    """Settle what a process that died left: return the endpoints that are still to be taken over.

    Of an interface with endpoints of two versions one is unfinished, or both have all there is:
    then this version's stays.
    """
    left: list[Elsewhere] = []
    for each in old:
        ours = paths.endpoint_dir(vm, each.interface)
        ifindex = pinned.present_ifindex(each.interface)
        if each.is_unfinished:
            destroy(each.directory, ifindex)
        elif not ours.exists():
            left.append(each)
        elif is_unfinished(ours) or not _is_attached(ours, ifindex):
            destroy(ours, ifindex)
            left.append(each)
        else:
            destroy(each.directory, ifindex)
    return left


def _is_attached(directory: pathlib.Path, ifindex: int | None) -> bool:
    """Tell whether an endpoint's programs are on both paths."""
    return ifindex is not None and all(
        links.read_attachment(ifindex, path, directory) is not None for path in abi.Path
    )


def _desired(
    tools: Tools, vm: str, tables: Mapping[str, ForeignTables], known: Desired | None
) -> Desired:
    """Return what a VM had under the other version, by what is remembered of it."""
    manifest = load_manifest(tools.paths.manifest(vm))
    generation = max(each.field("generation") for each in tables.values())
    effective = None if manifest is None else policy_of(manifest, generation, tools.store)
    # Some may have been taken over before a process died; they are not to go now.
    names = {*tables, *pinned.interfaces_of(tools.paths, vm)}
    if manifest is None or effective is None or names - set(manifest.endpoints):
        if known is None or names - set(known.interfaces):
            raise VgwError(
                f"the policy that {', '.join(tables)} runs is not remembered; attach the VM by its "
                "policy"
            )
        return dataclasses.replace(
            known, interfaces={name: known.interfaces[name] for name in names}, missing=()
        )
    interfaces = {name: manifest.endpoints[name].interface for name in sorted(names)}
    rejects = (each.field("reject_per_second", REJECT_PER_SECOND) for each in tables.values())
    return Desired(
        vm=vm,
        effective=effective,
        mode=manifest.mode,
        policy=manifest.policy,
        named=manifest.named,
        interfaces=interfaces,
        sources=sources_of(entry.interface for entry in manifest.endpoints.values()),
        extra=manifest.extra,
        reject_per_second=max(rejects),
    )


class _TakeOver(Change):
    """The change of a VM from endpoints of another version to new ones with their flows."""

    def __init__(self, tools: Tools, desired: Desired, tables: Mapping[str, ForeignTables]) -> None:
        super().__init__(tools, desired)
        self._tools = tools
        self._tables = tables
        self._wanted_mode = desired.mode
        #: What rules have counted under the policies before, by their keys.
        self.counts = dict(load_counts(tools.paths.counts(desired.vm)).carried)
        #: Flows that came over.
        self.carried = 0

    def remembered(self) -> Manifest:
        """Return what is known of the VM; where that is lost, the mode that it runs is an order."""
        found = super().remembered()
        generation = max(found.generation, *self.replaced_generations())
        found = dataclasses.replace(found, generation=generation)
        if found.endpoints:
            return found
        mode = max((tables.mode() for tables in self._tables.values()), key=STRICTNESS.index)
        override = None if mode is self._wanted_mode else mode
        return dataclasses.replace(found, mode_override=override)

    def replaced_generations(self) -> set[int]:
        """Return the generations of the old endpoints, which flows bring with them."""
        theirs = {tables.field("generation") for tables in self._tables.values()}
        return theirs | super().replaced_generations()

    def place(
        self,
        artefact: Artefact,
        directory: pathlib.Path,
        plan: Blueprint,
        undo: contextlib.ExitStack,
    ) -> None:
        """Make an endpoint beside the old one, or in its place, with its flows."""
        tables = self._tables.get(plan.interface.name)
        if tables is None:
            super().place(artefact, directory, plan, undo)
            return
        self._count(tables)
        plan.config.grace_until_ns = tables.field("grace_until_ns")
        mode = plan.config.mode
        beside = self._tools.prefer_link and _fits_beside(tables.where, plan)
        build = plan.build
        plan = dataclasses.replace(plan, build=f"{build}{UNFINISHED}", seed=tables.seed)
        if beside:
            plan.config.mode = abi.Mode.MONITOR
        else:
            plan = dataclasses.replace(
                plan, takes_from=tables.where.directory, seed=self._seed_all(tables)
            )
        placing = endpoints.create(artefact, directory, self._tools.events_fd(), plan)
        if beside:
            undo.callback(quietly, placing.undo)
        else:  # the old one is gone, and nothing must open the interface
            placing.finish()
        with endpoints.open_endpoint(plan.vm, plan.interface.name, directory) as endpoint:
            self.carried += copy_flows(self._tools.artefact, tables, endpoint)
            if beside:
                _set_mode(self._tools.images, endpoint, mode)
        mark_build(directory, build)

    def _count(self, tables: ForeignTables) -> None:
        """Add what the rules of an old endpoint have counted to that of the policies before."""
        labels_of = self.remembered().in_generation(self._tools.names.labels)
        add(self.counts, named(tables.rule_counts(), tables.field("generation"), labels_of))

    def _seed_all(self, tables: ForeignTables) -> Callable[[Mapping[str, int]], None]:
        """Return what fills tables that no packet has met with all that the old ones have."""

        def seed(fds: Mapping[str, int]) -> None:
            tables.seed(fds)
            tables.carry_fragments(fds["fragments"])
            self.carried += put_flows(self._tools.artefact, fds, tables.flows()).added

        return seed


def _fits_beside(old: Elsewhere, plan: Blueprint) -> bool:
    """Tell whether the new programs can run in the same chains as those of the old endpoint."""
    ifindex = plan.interface.ifindex
    there = [links.read_attachment(ifindex, path, old.directory) for path in abi.Path]
    on_xdp = plan.hook is Hook.XDP and any(each and each.hook == "xdp" for each in there)
    return not on_xdp and all(each is None or each.link for each in there)


def _set_mode(images: Images, endpoint: OpenEndpoint, mode: int) -> None:
    """Have an endpoint go on in another mode, under the same policy."""
    config = endpoint.maps.config()
    config.mode = mode
    slot = endpoints.restage(endpoint, config, images.in_force(endpoint.maps))
    endpoint.maps.switch(slot)
    libbpf.wait_for_programs()
    endpoint.maps.release(1 - slot)


def copy_flows(
    artefact: Callable[[Collection[str]], Artefact], old: ForeignTables, new: OpenEndpoint
) -> int:
    """Bring the flows of a table into another one while packets go through both; return how many.

    Raises VgwError when some find no room: the new table would not have what the old one has.
    """
    filled = Filled()
    for _ in range(_PASSES):
        now = coarse_now_ns()
        theirs = old.flows()
        old.carry_fragments(new.fds["fragments"])
        missing = _ahead(theirs, read_flows(new), now)
        if not len(missing):
            break
        missing["flow"]["claim"] = 1
        done = put_flows(artefact, new.fds, missing)
        filled += done
        if done.full:
            raise VgwError(f"{done.full} connections find no room in the new table")
    return filled.added


def _ahead(theirs: Columns, ours: Columns, now_ns: int) -> Columns:
    """Return the flows of which the old table, read at `now_ns`, knows more than the new one.

    The new one was read later, so what is new in it may not be in the old one's picture.
    """
    place = {key: number for number, key in enumerate(keys_of(ours))}
    found = np.array([place.get(key, -1) for key in keys_of(theirs)], np.int64)
    if not len(ours):
        return theirs.copy()
    old, new = theirs["flow"], ours["flow"][found]
    age = old["created_ns"].astype(np.int64) - new["created_ns"].astype(np.int64)
    another = (np.abs(age) > _SAME_NS) & (new["created_ns"] < now_ns)
    older = _STAGES[old["state"]] > _STAGES[new["state"]]
    for field in ("tcp_acked", "tcp_end"):
        older |= ((old[field] - new[field]).view(np.int32) > 0).any(axis=1)
    behind = (np.abs(age) <= _SAME_NS) & older
    told: Columns = theirs[(found < 0) | another | behind]
    return told.copy()
