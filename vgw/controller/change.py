# SPDX-License-Identifier: Apache-2.0
"""One VM's change: from what is attached to what a policy asks of it, all of it or nothing.

`prepare` finds out what has to be done and compiles, without touching anything. `commit` does it,
and undoes what it did when a part fails. `finish` frees what was replaced; between the two the
caller waits, once for all VMs, until no packet is judged by what was replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from vgw import abi
from vgw.controller import endpoint as endpoints
from vgw.controller import links, pinned
from vgw.controller.desired import Desired
from vgw.controller.endpoint import Blueprint, BrokenEndpointError, OpenEndpoint
from vgw.controller.links import InterfaceFacts
from vgw.controller.manifest import (
    EndpointEntry,
    Manifest,
    load_manifest,
    save_manifest,
)
from vgw.controller.paths import Paths, unpin_name
from vgw.controller.pins import endpoint_dirs, quietly, settle
from vgw.controller.policy_store import save_policy
from vgw.controller.state_file import remove_state
from vgw.errors import VgwError
from vgw.loader import Artefact
from vgw.policy.compile import compile_policy
from vgw.policy.model import Hook

_DIGEST_CHARACTERS: Final = 32
#: Modes from that which lets most through to that which lets nothing through.
_STRICTNESS: Final = (abi.Mode.MONITOR, abi.Mode.ENFORCE, abi.Mode.QUARANTINE)


@dataclass(frozen=True, slots=True)
class Tools:
    """What changes are made with.

    `artefact` gives packet programs by name, `events_fd` the host's perf buffer; both are asked
    for only when needed.
    """

    paths: Paths
    artefact: Callable[[Collection[str]], Artefact]
    events_fd: Callable[[], int]
    prefer_link: bool = True


@dataclass(frozen=True, slots=True)
class _Kept:
    """An endpoint that stays, how it is attached, and the configuration it shall have."""

    endpoint: OpenEndpoint
    facts: InterfaceFacts
    hook: Hook
    wanted_hook: Hook
    config: abi.EndpointConfig


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
        self._staged: dict[str, int] = {}
        self._restage = False
        self._image = b""
        self._old: Manifest | None = None
        self._manifest = Manifest(desired.vm)

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *_: object) -> None:
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
        base = self._manifest = self._base_manifest()
        effective = self._desired.effective
        numbered = base.with_rules((*effective.ingress, *effective.egress))
        self._image = compile_policy(effective, numbered.rule_ids())
        digest = hashlib.sha256(self._image).hexdigest()[:_DIGEST_CHARACTERS]
        self._restage = any(self._differs(name, digest) for name in self._kept)
        generation = base.generation + (1 if self._restage or not self._kept else 0)
        self._manifest = dataclasses.replace(
            numbered,
            generation=generation,
            endpoints=self._absent()
            | {name: self._entry(name, digest) for name in self.interfaces},
        )
        moved = any(kept.hook is not kept.wanted_hook for kept in self._kept.values())
        return bool(self._restage or self._new or self._dropped or moved)

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
        if self._restage:
            self._stage(undo)
        if self._manifest != self._old:
            save_manifest(self._file, self._manifest)
            undo.callback(quietly, self._restore_manifest)
        for name in self._new:
            self._create(name, undo)
        for kept in self._kept.values():
            if kept.hook is not kept.wanted_hook:
                self._move(kept, kept.wanted_hook)
                undo.callback(quietly, self._move, kept, kept.hook)
        for name, slot in self._staged.items():
            maps = self._kept[name].endpoint.maps
            maps.switch(slot)
            undo.callback(quietly, maps.switch, 1 - slot)

    def finish(self) -> None:
        """Free what was replaced; no packet is judged by it any more."""
        for name, slot in self._staged.items():
            self._kept[name].endpoint.maps.release(1 - slot)
        for name in self._dropped:
            directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
            endpoints.destroy(directory, pinned.present_ifindex(name))
        if self.interfaces:
            record = self._tools.paths.policy_record(self._desired.vm)
            save_policy(record, self._desired.effective, self.generation)
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
        """Return the endpoint of an interface if it is whole and attached."""
        directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
        try:
            endpoint = endpoints.open_endpoint(self._desired.vm, name, directory)
        except BrokenEndpointError:
            return None
        self._open.callback(endpoint.close)
        self._opened.append(endpoint)
        from_vm = endpoint.attachment(facts.ifindex, abi.Path.FROM_VM)
        to_vm = endpoint.attachment(facts.ifindex, abi.Path.TO_VM)
        if from_vm is None or to_vm is None:
            return None
        wanted = links.choose_hook(facts.kind, self._hook(name))
        return _Kept(endpoint, facts, Hook(from_vm.hook), wanted, endpoint.maps.config())

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
        """Return the manifest to go on from: ids of rules live as long as an endpoint does."""
        old = self._old or recovered(self._desired.vm, self._opened)
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
        if not self._kept:
            return dataclasses.replace(base, rules={}, next_rule_id=0, carried={})
        generation = max(kept.config.generation for kept in self._kept.values())
        return dataclasses.replace(base, generation=max(base.generation, generation))

    def _differs(self, name: str, image: str) -> bool:
        """Tell whether an endpoint needs another policy or configuration."""
        kept = self._kept[name]
        entry = self._old.endpoints.get(name) if self._old is not None else None
        if entry is None or self._old is None or entry.image != image:
            return True
        now = kept.config
        if now.generation != self._old.generation:
            return True  # a process died between writing the manifest and switching
        return bytes(self._config(name, now.generation)) != bytes(now)

    def _config(self, name: str, generation: int) -> abi.EndpointConfig:
        """Return the configuration that an endpoint shall have."""
        kept = self._kept.get(name)
        return endpoints.build_config(
            self._desired.interfaces[name],
            self._manifest.effective_mode,
            generation,
            self._manifest.endpoints[name].endpoint if kept is None else kept.config.endpoint,
            0 if kept is None else kept.config.flow_epoch,
        )

    def _absent(self) -> dict[str, EndpointEntry]:
        """Return what is remembered of interfaces that were ordered and do not exist now."""
        known = {} if self._old is None else self._old.endpoints
        absent = set(self._desired.extra).intersection(self._desired.missing, known)
        return {name: known[name] for name in sorted(absent)}

    def _entry(self, name: str, image: str) -> EndpointEntry:
        kept = self._kept.get(name)
        identity = endpoints.new_endpoint_id() if kept is None else kept.config.endpoint
        interface = self._desired.interfaces[name]
        return EndpointEntry(identity, interface, image, self._ordered_hook(name))

    def _stage(self, undo: contextlib.ExitStack) -> None:
        """Write policy and configuration beside those in force, and make room for new rules."""
        artefact = self._tools.artefact(endpoints.TABLES)
        for name, kept in self._kept.items():
            if self._manifest.next_rule_id > kept.endpoint.maps.rule_capacity():
                self._grow_counters(kept.endpoint, artefact)
            config = self._config(name, self.generation)
            with endpoints.policy_map(artefact, self._image) as policy:
                slot = kept.endpoint.maps.stage(config, policy)
            undo.callback(quietly, kept.endpoint.maps.release, slot)
            self._staged[name] = slot

    def _grow_counters(self, endpoint: OpenEndpoint, artefact: Artefact) -> None:
        """Move an endpoint to a larger counter map; what the old one had counted is carried."""
        final = endpoints.replace_counters(artefact, endpoint, self._manifest.next_rule_id)
        self._manifest = self._manifest.carrying(final)
        if self._old is not None:
            # Also when the rest of the change fails: these counts are in no map any more.
            self._old = self._old.carrying(final)
            save_manifest(self._file, self._old)

    def _create(self, name: str, undo: contextlib.ExitStack) -> None:
        facts = self._new[name]
        directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
        plan = Blueprint(
            vm=self._desired.vm,
            interface=facts,
            hook=links.choose_hook(facts.kind, self._hook(name)),
            config=self._config(name, self.generation),
            image=self._image,
            conntrack_max=self._desired.interfaces[name].conntrack_max,
            rules=self._manifest.next_rule_id,
            force=self._desired.force,
            prefer_link=self._tools.prefer_link,
            replaces=self._former(facts.ifindex),
        )
        artefact = self._tools.artefact(endpoints.programs_of(plan.hook).values())
        endpoints.create(artefact, directory, self._tools.events_fd(), plan)
        undo.callback(quietly, endpoints.destroy, directory, facts.ifindex)

    def _former(self, ifindex: int) -> pathlib.Path | None:
        """Return the endpoint to drop that is on an interface, from before that was renamed."""
        for name in self._dropped:
            directory = self._tools.paths.endpoint_dir(self._desired.vm, name)
            if links.linked_ifindex(directory) == ifindex:
                return directory
        return None

    def _move(self, kept: _Kept, hook: Hook) -> None:
        artefact = self._tools.artefact((endpoints.FROM_VM_PROGRAM[hook],))
        events_fd = self._tools.events_fd()
        ifindex, force = kept.facts.ifindex, self._desired.force
        endpoints.move_hook(artefact, kept.endpoint, events_fd, ifindex, hook, force=force)

    def _restore_manifest(self) -> None:
        if self._old is None:
            remove_state(self._file)
        else:
            save_manifest(self._file, self._old)


def recovered(vm: str, opened: Sequence[OpenEndpoint]) -> Manifest:
    """Return what the kernel knows of a VM whose manifest is lost.

    The mode that it runs counts as ordered. What the ids of rules stand for is lost: new ones
    begin behind all of them.
    """
    if not opened:
        return Manifest(vm)
    configs = [endpoint.maps.config() for endpoint in opened]
    return Manifest(
        vm,
        generation=max(config.generation for config in configs),
        mode_override=max((abi.Mode(config.mode) for config in configs), key=_STRICTNESS.index),
        next_rule_id=max(endpoint.maps.rule_capacity() for endpoint in opened),
    )


def forget(paths: Paths, manifest: Manifest) -> None:
    """Remove what is remembered of a VM without endpoints, but for what the user ordered."""
    remove_state(paths.policy_record(manifest.vm))
    left = manifest.only(manifest.extra)
    if left.mode_override is None and not left.extra:
        remove_state(paths.manifest(manifest.vm))
    else:
        save_manifest(paths.manifest(manifest.vm), left)
