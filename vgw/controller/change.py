# SPDX-License-Identifier: Apache-2.0
"""One VM's change: from what is attached to what a policy asks of it, all of it or nothing.

`prepare` finds out what has to be done and compiles, without touching anything. `commit` does it,
and undoes what it did when a part fails. `finish` frees what was replaced; between the two the
caller waits, once for all VMs, until no packet is judged by what was replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from dataclasses import dataclass

from vgw import abi, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller import links, pinned
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.controller.desired import Desired
from vgw.controller.endpoint import Blueprint, BrokenEndpointError, OpenEndpoint
from vgw.controller.floods import flood_drops
from vgw.controller.hook_move import move_hook
from vgw.controller.last_flows import recorded
from vgw.controller.links import InterfaceFacts
from vgw.controller.manifest import (
    EndpointEntry,
    Manifest,
    PolicyEntry,
    load_manifest,
    save_manifest,
)
from vgw.controller.paths import unpin_name
from vgw.controller.pins import endpoint_dirs, quietly
from vgw.controller.recovery import forget, recovered, restore_manifest
from vgw.controller.replacement import Placing, destroy, settle
from vgw.controller.restore import pinned_hook, put_back
from vgw.controller.rule_counts import keep_counts, load_counts, save_counts, settle_spares
from vgw.controller.stages import (
    load_stages,
    missing_stages,
    unload_stages,
    with_stages,
)
from vgw.controller.state_file import remove_state
from vgw.controller.tools import Tools
from vgw.errors import VgwError
from vgw.loader import Artefact
from vgw.maps import place_counters
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.model import Hook


@dataclass(frozen=True, slots=True)
class _Kept:
    """An endpoint that stays, how it is attached, and the configuration it has.

    `missing` is the path whose program is not on the interface, while that of the other path is.
    """

    endpoint: OpenEndpoint
    facts: InterfaceFacts
    hook: Hook
    wanted_hook: Hook
    config: abi.EndpointConfig
    missing: abi.Path | None = None

    @property
    def is_moving(self) -> bool:
        """Whether the program for packets from the VM goes to another hook."""
        return self.hook is not self.wanted_hook

    @property
    def is_to_be_put_back(self) -> bool:
        """Whether a program is missing that no move to another hook brings."""
        return self.missing is not None and not (
            self.missing is abi.Path.FROM_VM and self.is_moving
        )


class Change:
    """The change of one VM; use as a context manager. Nothing is changed before `commit`."""

    def __init__(self, tools: Tools, desired: Desired) -> None:
        self._tools = tools
        self._desired = desired
        self._directory = tools.paths.vm_dir(desired.vm)
        self._file = tools.paths.manifest(desired.vm)
        self._open = contextlib.ExitStack()
        self._opened: list[OpenEndpoint] = []
        self._kept: dict[str, _Kept] = {}
        self._new: dict[str, InterfaceFacts] = {}
        self._dropped: list[str] = []
        #: Whole endpoints in whose place new ones are made: none of their programs is on the
        #: interface, so that may be another one by the name.
        self._replaced: list[OpenEndpoint] = []
        self._staged: dict[str, int] = {}
        self._placings: list[Placing] = []
        #: Endpoints of which the staged slot has counters of its own.
        self._counting_anew: list[str] = []
        self._restage = False
        self._needed = False
        self._images: dict[abi.Path, PolicyImage] = {}
        self._old: Manifest | None = None
        self._base = Manifest(desired.vm)
        self._manifest = self._base

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the endpoints that are open for this; may be called again."""
        self._open.close()

    @property
    def generation(self) -> int:
        """The generation that the VM runs after the change."""
        return self._manifest.generation

    @property
    def interfaces(self) -> list[str]:
        """The interfaces that are protected after the change."""
        return sorted([*self._kept, *self._new])

    @property
    def named(self) -> bool:
        """Whether the policy has the VM."""
        return self._desired.named

    @property
    def kept(self) -> bool:
        """Whether it is an earlier policy that has the VM."""
        return self._desired.kept

    def pending(self) -> list[str]:
        """Return what the policy asks for that endpoints get only when they are made anew."""
        notes = {
            name: endpoints.pending_note(kept.endpoint, self._desired.interfaces[name])
            for name, kept in self._kept.items()
        }
        return [f"{name}: {note}" for name, note in notes.items() if note is not None]

    def prepare(self) -> bool:
        """Compare, compile, and return whether anything has to change. Raises VgwError."""
        self._old = load_manifest(self._file)
        settle(self._directory)
        self._sort_endpoints()
        self._base = self._manifest = self._base_manifest()
        self._images = compile_policy(
            self._desired.effective, sources=self._desired.sources, progress=self._tools.progress
        )
        self._restage = any(self._differs(name) for name in self._kept)
        self._manifest = dataclasses.replace(
            self._base,
            generation=self._base.generation + (1 if self._restage or not self._kept else 0),
            endpoints=self._absent() | {name: self._entry(name) for name in self.interfaces},
        )
        self._manifest = dataclasses.replace(self._manifest, policies=self._policies())
        anew = any(kept.is_moving or kept.missing is not None for kept in self._kept.values())
        self._needed = bool(self._restage or self._new or self._dropped or anew)
        return self._needed

    def commit(self) -> None:
        """Make the change. Raises VgwError, and everything is as before then."""
        with contextlib.ExitStack() as undo:
            try:
                self._commit(undo)
            except VgwError as error:
                if not self._kept:
                    raise
                text = f"{self._desired.vm} keeps what it had, changing it failed: {error}"
                raise endpoints.reworded(error, text) from error
            undo.pop_all()

    def _commit(self, undo: contextlib.ExitStack) -> None:
        if self._needed:
            self._tools.lower_shields(self._desired.vm)
        opened = [kept.endpoint.maps for kept in self._kept.values()]
        labels_of = self._base.in_generation(self._tools.names.labels)
        settle_spares(self._counts_file, opened, labels_of)
        # Now, for a process that dies leaves neither their pins nor what their rules were called.
        keep_counts(self._counts_file, [each.maps for each in self._replaced], labels_of)
        if self._restage:
            # Both wait, one for the kernel and one for the disk.
            libbpf.side_by_side(lambda: self._stage(undo), lambda: self._remember(undo))
        else:
            self._remember(undo)
        for name in self._new:
            self._create(name, undo)
        for kept in self._kept.values():
            if kept.is_to_be_put_back:
                self._put_back(kept, undo)
            if kept.is_moving:
                self._move(kept, undo)
        if self._staged:
            # Switched back, no packet is judged any more by what is released then.
            undo.callback(quietly, libbpf.wait_for_programs)
        for name, slot in self._staged.items():
            maps = self._kept[name].endpoint.maps
            maps.switch(slot)
            undo.callback(quietly, maps.switch, 1 - slot)

    def finish(self) -> None:
        """Free what was replaced; no packet is judged by it any more."""
        try:
            self._harvest()  # while the pins of the counters are there
        finally:
            for placing in self._placings:
                placing.finish()
        for name, slot in self._staged.items():
            self._kept[name].endpoint.maps.release(1 - slot)
        for name in self._dropped:
            directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
            with recorded(self._tools.last_flows, self._desired.vm, name):
                destroy(directory, pinned.present_ifindex(name))
        if self.interfaces:
            self._keep_matches()
        else:
            forget(self._tools.paths, self._manifest)

    def _sort_endpoints(self) -> None:
        """Open what is pinned and decide for each endpoint: keep, make anew, drop."""
        wanted = {name: links.find_interface(name) for name in self._desired.interfaces}
        for directory in endpoint_dirs(self._directory):
            name = unpin_name(directory.name)
            if name is not None and name not in wanted:
                self._dropped.append(name)
        for name, facts in wanted.items():
            kept = self._keep(name, facts)
            if kept is None:
                self._new[name] = facts
            else:
                self._kept[name] = kept

    def _keep(self, name: str, facts: InterfaceFacts) -> _Kept | None:
        """Return the endpoint of an interface if it is whole and attached, if only on one path.

        The program that is there shows that the interface is the one that the endpoint was on.
        """
        directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
        try:
            endpoint = endpoints.open_endpoint(self._desired.vm, name, directory)
        except BrokenEndpointError:
            return None
        self._open.callback(endpoint.close)
        self._opened.append(endpoint)
        there = {path: endpoint.attachment(facts.ifindex, path) for path in abi.Path}
        missing = [path for path, attachment in there.items() if attachment is None]
        if len(missing) == len(abi.Path):
            self._replaced.append(endpoint)
            return None
        return _Kept(
            endpoint,
            facts,
            pinned_hook(endpoint, abi.Path.FROM_VM),
            links.choose_hook(self._hook(name)),
            endpoint.maps.config(),
            missing[0] if missing else None,
        )

    def _wanted_hook(self, name: str) -> Hook:
        """Return where the from_vm program of an endpoint is attached after the change."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept.wanted_hook
        return links.choose_hook(self._hook(name))

    def _hook(self, name: str) -> Hook:
        """Return which hook is asked for: by the user now, or before, or by the policy."""
        ordered = self._ordered_hook(name)
        return self._desired.interfaces[name].hook if ordered is None else ordered

    def _ordered_hook(self, name: str) -> Hook | None:
        now = self._desired.hooks.get(name)
        if now is not None:
            return None if now is Hook.AUTO else now
        entry = self._old.endpoints.get(name) if self._old is not None else None
        return None if entry is None else entry.hook_override

    def _base_manifest(self) -> Manifest:
        """Return the manifest to go on from."""
        old = self.remembered()
        override = old.mode_override
        if self._opened and not old.endpoints and override is self._desired.mode:
            override = None  # it was read from the kernel, and needs no order
        base = dataclasses.replace(
            old,
            mode_override=override,
            mode=self._desired.mode,
            policy=self._desired.policy,
            named=self._desired.named,
            extra=self._desired.extra,
        )
        # A change that was undone had a number too: flows may carry it, so nothing else gets it.
        used = (kept.endpoint.maps.latest_generation() for kept in self._kept.values())
        return dataclasses.replace(base, generation=max(base.generation, *used, 0))

    def remembered(self) -> Manifest:
        """Return what is known of the VM, from the state directory or else from the kernel."""
        return self._old or recovered(self._tools.paths, self._desired.vm, self._opened)

    def _policies(self) -> dict[int, PolicyEntry]:
        """Return the policies to remember: the one to be in force and those that it replaces."""
        entry = PolicyEntry(
            images={path: image.digest for path, image in self._images.items()},
            rules={path: len(image.rules) for path, image in self._images.items()},
            staged=self._is_staged,
            defaults=self._desired.effective.defaults,
        )
        replaced = self.replaced_generations()
        before = {
            generation: policy
            for generation, policy in self._base.policies.items()
            if generation in replaced or (self._kept and not self._restage)
        }
        return before | {self.generation: entry}

    def replaced_generations(self) -> set[int]:
        """Return the generations that flows and events may still carry after the change."""
        return {kept.config.generation for kept in self._kept.values()}

    def _differs(self, name: str) -> bool:
        """Tell whether an endpoint needs another policy or configuration."""
        kept = self._kept[name]
        if self._old is None or name not in self._old.endpoints or not self._has_images(kept):
            return True
        digests = {path: image.digest for path, image in self._images.items()}
        if not self._tools.images.are_in_force(digests, kept.endpoint.maps):
            return True  # without the pins nobody could change the configuration alone
        now = kept.config
        if now.generation != self._old.generation:
            return True  # a process died between writing the manifest and switching
        return bytes(self._config(name, now.generation)) != bytes(now)

    def _has_images(self, kept: _Kept) -> bool:
        """Tell whether an endpoint has the images already that it shall have."""
        generation = kept.config.generation
        return all(
            self._base.digest(generation, path) == image.digest
            for path, image in self._images.items()
        )

    @property
    def _is_staged(self) -> bool:
        return any(image.staged for image in self._images.values())

    @property
    def _counts_file(self) -> pathlib.Path:
        return self._tools.paths.counts(self._desired.vm)

    def _config(self, name: str, generation: int) -> abi.EndpointConfig:
        """Return the configuration that an endpoint shall have."""
        kept = self._kept.get(name)
        config = endpoints.build_config(
            self._desired.interfaces[name],
            self._manifest.effective_mode,
            generation,
            self._manifest.endpoints[name].endpoint if kept is None else kept.config.endpoint,
            0 if kept is None else kept.config.flow_epoch,
        )
        grace_ns = self._desired.interfaces[name].tracking.grace_seconds * SECOND_NS
        config.grace_until_ns = (
            coarse_now_ns() + grace_ns if kept is None else kept.config.grace_until_ns
        )
        config.reject_per_second = self._desired.reject_per_second
        config.log_per_second = self._desired.log.per_second
        config.log_flows = self._desired.log.flows
        config.reply_mark = endpoints.reply_mark(config.endpoint, self._wanted_hook(name))
        config.flood_drops = flood_drops(self._hook(name), self._facts(name).kind)
        self._place_counters(config)
        return config

    def _facts(self, name: str) -> InterfaceFacts:
        """Return what the kernel says of an interface that is protected after the change."""
        kept = self._kept.get(name)
        return self._new[name] if kept is None else kept.facts

    def _place_counters(self, config: abi.EndpointConfig) -> int:
        """Say where the counters of each path begin; return how many there have to be."""
        rules = {path: len(image.rules) for path, image in self._images.items()}
        return place_counters(config, rules)

    def _absent(self) -> dict[str, EndpointEntry]:
        """Return what is remembered of interfaces that were ordered and do not exist now."""
        known = {} if self._old is None else self._old.endpoints
        absent = set(self._desired.extra).intersection(self._desired.missing, known)
        return {name: known[name] for name in sorted(absent)}

    def _entry(self, name: str) -> EndpointEntry:
        kept = self._kept.get(name)
        identity = endpoints.new_endpoint_id() if kept is None else kept.config.endpoint
        interface = self._desired.interfaces[name]
        return EndpointEntry(identity, interface, self._ordered_hook(name))

    def _stage(self, undo: contextlib.ExitStack) -> None:
        """Write policy, configuration and counters beside those in force."""
        artefact = self._tools.artefact(endpoints.TABLES)
        policies = self._tools.images.ready(artefact, self._images)
        for name, kept in self._kept.items():
            config = self._config(name, self.generation)
            maps = kept.endpoint.maps
            undo.callback(quietly, maps.release, 1 - maps.active_slot())
            if self._has_images(kept):
                slot = endpoints.restage(kept.endpoint, config, policies)
            else:
                counters = self._place_counters(config)
                with endpoints.counters_map(artefact, counters) as counters_fd:
                    slot = maps.stage(config, policies, counters_fd)
                self._counting_anew.append(name)
            self._staged[name] = slot
            self._load_stages(kept, undo)

    def _load_stages(self, kept: _Kept, undo: contextlib.ExitStack) -> None:
        if not self._is_staged:
            return
        programs = list(endpoints.programs_of(kept.hook).values())
        artefact = self._tools.artefact(with_stages(programs))
        fds = kept.endpoint.fds
        undo.callback(quietly, unload_stages, fds, missing_stages(artefact, programs, fds))
        load_stages(artefact, programs, fds, self._tools.events_fd())

    def _remember(self, undo: contextlib.ExitStack) -> None:
        """Write the names of rules and the manifest: before an event can carry their numbers."""
        for image in self._images.values():
            self._tools.store.keep_names(image.digest, image.rules)
        if not self._needed:
            self._keep_matches()  # which a process that died has not come to
        if not (self._kept or self._replaced):
            remove_state(self._counts_file)
        if self._manifest != self._old:
            undo.callback(quietly, restore_manifest, self._file, self._old)
            save_manifest(self._file, self._manifest)

    def _keep_matches(self) -> None:
        for image in self._images.values():
            self._tools.store.keep_matches(image.digest, image.rules)

    def _harvest(self) -> None:
        """Add up what the replaced policies had counted, for the rules that are still there."""
        labels_of = self._base.in_generation(self._tools.names.labels)
        counts = old = load_counts(self._counts_file)
        for name in self._counting_anew:
            maps = self._kept[name].endpoint.maps
            counts = counts.harvesting(maps, 1 - self._staged[name], labels_of)
        for endpoint in self._replaced:
            counts = counts.with_all_of(endpoint.maps, labels_of)
        if counts != old:
            known = {entry.endpoint for entry in self._manifest.endpoints.values()}
            rules = [self._tools.names.keys(image.digest) for image in self._images.values()]
            save_counts(self._counts_file, counts.only(set[str]().union(*rules), known))

    def _create(self, name: str, undo: contextlib.ExitStack) -> None:
        facts = self._new[name]
        directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
        hook = self._wanted_hook(name)
        programs = endpoints.programs_of(hook).values()
        artefact = self._tools.artefact(with_stages(programs) if self._is_staged else programs)
        config = self._config(name, self.generation)
        counters = self._place_counters(config)
        plan = Blueprint(
            vm=self._desired.vm,
            interface=facts,
            hook=hook,
            config=config,
            policies=self._tools.images.ready(artefact, self._images),
            counters=counters,
            conntrack_max=self._desired.interfaces[name].conntrack_max,
            build=self._tools.build(),
            staged=self._is_staged,
            force=self._desired.force,
            prefer_link=self._tools.prefer_link,
            replaces=self._former(facts.ifindex),
        )
        self.place(artefact, directory, plan, undo)

    def place(
        self,
        artefact: Artefact,
        directory: pathlib.Path,
        plan: Blueprint,
        undo: contextlib.ExitStack,
    ) -> None:
        """Make one endpoint, which upgrades do in another way. Raises VgwError."""
        with recorded(self._tools.last_flows, plan.vm, plan.interface.name):
            placing = endpoints.create(artefact, directory, self._tools.events_fd(), plan)
        undo.callback(quietly, placing.undo)
        self._placings.append(placing)

    def _former(self, ifindex: int) -> pathlib.Path | None:
        """Return the endpoint to drop that is on an interface, from before that was renamed."""
        for name in self._dropped:
            directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
            if links.linked_ifindex(directory) == ifindex:
                return directory
        return None

    def _put_back(self, kept: _Kept, undo: contextlib.ExitStack) -> None:
        """Attach the program again that is missing; what the endpoint has counted goes on."""
        endpoint, ifindex, path = kept.endpoint, kept.facts.ifindex, kept.missing
        if path is None:
            return
        pin = links.link_pin(endpoint.directory, path)
        undo.callback(quietly, links.detach, ifindex, path, pin)
        put_back(
            endpoint,
            ifindex,
            path,
            prefer_link=self._tools.prefer_link,
            force=self._desired.force,
        )

    def _move(self, kept: _Kept, undo: contextlib.ExitStack) -> None:
        """Attach the program for packets from the VM at its other hook too, until finish()."""
        placing = move_hook(
            self._tools,
            kept.endpoint,
            kept.facts.ifindex,
            kept.wanted_hook,
            # Until the switch the program judges by the policy before.
            staged=self._manifest.is_staged,
            force=self._desired.force,
        )
        undo.callback(quietly, placing.undo)
        self._placings.append(placing)
