# SPDX-License-Identifier: Apache-2.0
"""The host's endpoints and every change to them: attach, apply, detach, mode, flush.

A `Host` keeps nothing in memory that matters: what is attached is read from the kernel, what it is
called from the state directory. Every change is made under the host's writer lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from vgw import abi, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller import fitness, pinned
from vgw.controller import status as reports
from vgw.controller.batch import ApplyResult, AttachResult, run_changes
from vgw.controller.desired import Desired, Order, desired_state, nothing_to_attach
from vgw.controller.endpoint import BrokenEndpointError, OpenEndpoint
from vgw.controller.expiry import expire_idle
from vgw.controller.images import Images, remove_unused_images
from vgw.controller.lock import WriterLock, remove_stale
from vgw.controller.manifest import Manifest, load_manifest, save_manifest
from vgw.controller.overlay import Overlay
from vgw.controller.paths import Paths
from vgw.controller.pins import remove_tree, settle
from vgw.controller.policy_store import PolicyStore, RuleNames
from vgw.controller.recovery import forget, recovered, remove_unused_records
from vgw.controller.rule_counts import read_steadily, settle_spares
from vgw.controller.state_file import remove_state
from vgw.controller.tools import Once, Tools, open_events
from vgw.errors import PartlyAppliedError, VgwError
from vgw.loader import Artefact, load_artefact
from vgw.policy.model import Hook, PolicyDocument

__all__ = ["ApplyResult", "AttachResult", "Host"]


class Host:
    """All endpoints of this host; may be used from several threads."""

    def __init__(
        self,
        paths: Paths,
        *,
        prefer_link: bool = True,
        progress: Callable[[str], None] | None = None,
        overlay: Overlay | None = None,
    ) -> None:
        """Work under `paths`; `progress` is told what takes long, such as compiling.

        `overlay` is what is known beyond the documents; by default what is leased.
        """
        self.paths = paths
        self.overlay = overlay or Overlay(paths)
        self._progress = progress
        self._lock = WriterLock(paths.bpffs)
        self._artefacts: dict[frozenset[str], Artefact] = {}
        self._artefacts_lock = threading.Lock()
        self._compiled = False
        self._prefer_link = prefer_link

    def artefact(self, programs: Collection[str]) -> Artefact:
        """Return some of the packet programs, compiling those that the cache lacks."""
        wanted = frozenset(programs)
        with self._artefacts_lock:
            if wanted not in self._artefacts:
                self._artefacts[wanted] = load_artefact(
                    self.paths.cache_dir, self._report, programs=wanted
                )
            return self._artefacts[wanted]

    # --- changes ------------------------------------------------------------------------

    def attach(
        self,
        document: PolicyDocument | None,
        vm: str,
        *,
        interfaces: Sequence[str] = (),
        hook: Hook | None = None,
        force: bool = False,
    ) -> AttachResult:
        """Protect a VM by what `document` says of it; an attached one is brought up to date.

        `interfaces` are to be protected besides those that the document lists; a VM that it does
        not name gets its defaults there. `hook` is for all, and holds until ordered otherwise.
        Raises VgwError when an interface is missing or anything fails; nothing is changed then.
        """
        with self._changing() as tools:
            order = Order(interfaces, hook, force)
            owners = pinned.owners(self.paths)
            document = self.overlay.laid(document or PolicyDocument())
            desired = desired_state(self.paths, document, vm, order, owners)
            # Interfaces of earlier orders may be away, any other has to be there.
            away = set(desired.extra).difference(interfaces)
            if not desired.interfaces or not away.issuperset(desired.missing):
                raise nothing_to_attach(desired)
            outcome = self._run(tools, [desired])[vm]
        if isinstance(outcome, VgwError):
            raise outcome
        return outcome

    def attach_many(
        self, document: PolicyDocument, vms: Sequence[str] | None = None, *, force: bool = False
    ) -> ApplyResult:
        """Protect VMs of the document (None: all), each on those of its interfaces that exist.

        Raises PartlyAppliedError naming the VMs that failed, or the error itself when only one was
        asked for; the others are protected then.
        """
        names = list(document.vms) if vms is None else list(vms)
        return self._change_many(document, names, Order(force=force))

    def apply(
        self, document: PolicyDocument, vms: Sequence[str] | None = None, *, dry_run: bool = False
    ) -> ApplyResult:
        """Bring attached VMs (None: all) up to date with a document.

        One that the document does not name keeps its interfaces and gets the defaults. With
        `dry_run` only finds out what would change. Errors are those of `attach_many`.
        """
        attached = self.attached()
        names = attached if vms is None else list(vms)
        strangers = sorted(set(names) - set(attached))
        if strangers:
            raise VgwError(_not_attached(strangers[0]))
        return self._change_many(document, names, Order(), dry_run=dry_run)

    def detach(self, vm: str) -> None:
        """Stop protecting a VM and remove every trace of it. Raises VgwError if it is unknown."""
        with self._changing():
            if vm not in pinned.known_vms(self.paths):
                raise VgwError(f"VM {vm} is not attached, so there is nothing to detach")
            self._detach(vm)
            self._tidy()

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""
        with self._changing():
            names = pinned.known_vms(self.paths)
            for vm in names:
                self._detach(vm)
            self._tidy()
        return names

    def sweep(self) -> list[tuple[str, str]]:
        """Remove endpoints whose interface is gone; return (VM, interface) of each.

        An interface that was renamed or moved is not gone: its programs still protect it. A VM
        left without endpoints is forgotten, but for the mode and interfaces that the user ordered.
        """
        removed: list[tuple[str, str]] = []
        with self._changing():
            for vm in self.attached():
                there = pinned.interfaces_of(self.paths, vm)
                gone = [name for name in there if pinned.is_gone(self.paths, vm, name)]
                for name in gone:
                    endpoints.destroy(self.paths.endpoint_dir(vm, name), None)
                removed += [(vm, name) for name in gone]
                manifest = load_manifest(self.paths.manifest(vm))
                if gone and manifest is not None:
                    self._forget_endpoints(manifest, gone)
            self._tidy()
        return removed

    def set_mode(self, vm: str, mode: abi.Mode) -> bool:
        """Order a mode for a VM, and return whether it had another one, or another order.

        Ordering what its policy says lifts the order.
        """
        with self._changing(), contextlib.ExitStack() as stack:
            self._require_attached(vm)
            opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(vm)]
            old = load_manifest(self.paths.manifest(vm))
            manifest = old or recovered(self.paths, vm, opened)
            override = None if manifest.endpoints and mode is manifest.mode else mode
            ordered = dataclasses.replace(manifest, mode_override=override)
            if ordered != old:
                save_manifest(self.paths.manifest(vm), ordered)
            running = {endpoint.maps.config().mode for endpoint in opened}
            if running != {mode}:
                self._reconfigure(vm, lambda config: setattr(config, "mode", mode))
        return ordered != manifest or running != {mode}

    def flush(self, vm: str) -> int:
        """Forget every flow of a VM; return how many entries its tables had."""
        with self._changing():
            self._require_attached(vm)
            entries = 0

            def next_epoch(config: abi.EndpointConfig) -> None:
                config.flow_epoch += 1
                config.grace_until_ns = 0  # or their next segments would bring them back

            for endpoint in self.open_endpoints(vm):
                with endpoint:
                    entries += endpoint.maps.meta().entries
            self._reconfigure(vm, next_epoch)
        self.expire(vm)
        return entries

    def expire(self, vm: str | None = None) -> int:
        """Free the dead flows of a VM, or of all; return how many there were.

        Changes nothing that a packet could notice, so it needs no lock.
        """
        deleted = 0
        for name in self.attached() if vm is None else [vm]:
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(name)]
                deleted += expire_idle(self.artefact, opened)
        return deleted

    # --- looking ------------------------------------------------------------------------

    def attached(self) -> list[str]:
        """Return the VMs that have endpoints, whole or broken, in order of their names."""
        return pinned.attached_vms(self.paths)

    def endpoints(self) -> list[OpenEndpoint]:
        """Return every whole endpoint, open; the caller closes them."""
        return [endpoint for vm in self.attached() for endpoint in self.open_endpoints(vm)]

    def open_endpoints(self, vm: str) -> list[OpenEndpoint]:
        """Return the whole endpoints of a VM, open; the caller closes them."""
        found: list[OpenEndpoint] = []
        for name in pinned.interfaces_of(self.paths, vm):
            with contextlib.suppress(BrokenEndpointError):
                directory = self.paths.endpoint_dir(vm, name)
                found.append(endpoints.open_endpoint(vm, name, directory))
        return found

    def status(self, vm: str | None = None) -> dict[str, Any]:
        """Return what is attached, read back from the kernel, as JSON. Raises VgwError."""
        if vm is not None:
            self._require_attached(vm)
        names = self.attached() if vm is None else [vm]
        rows = [reports.vm_status(self.paths, name) for name in names]
        return {"schema": reports.SCHEMA, "vms": rows}

    def rules(self, vm: str) -> dict[str, Any]:
        """Return the rules of a VM with their counters, as JSON. Raises VgwError."""
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(vm)]
            return read_steadily(
                self.paths.counts(vm),
                [endpoint.maps for endpoint in opened],
                lambda counts: reports.rule_report(self.manifest(vm), self.store, counts, opened),
            )

    @property
    def store(self) -> PolicyStore:
        """What is kept of the rules of compiled policies."""
        return PolicyStore(self.paths.policies)

    def manifest(self, vm: str) -> Manifest:
        """Return what is remembered of an attached VM; raises VgwError."""
        self._require_attached(vm)
        manifest = load_manifest(self.paths.manifest(vm))
        if manifest is None or not manifest.endpoints:
            raise VgwError(
                f"{self.paths.manifest(vm)} is lost or damaged; {vm} stays protected, apply its "
                "policy to write it anew"
            )
        return manifest

    def ordered_interfaces(self) -> dict[str, str]:
        """Return the VM of each interface that was attached by name, whether it is there or not."""
        found: dict[str, str] = {}
        for vm in pinned.known_vms(self.paths):
            manifest = load_manifest(self.paths.manifest(vm))
            found |= {} if manifest is None else dict.fromkeys(manifest.extra, vm)
        return found

    # --- how ----------------------------------------------------------------------------

    def _require_attached(self, vm: str) -> None:
        if not pinned.interfaces_of(self.paths, vm):
            raise VgwError(_not_attached(vm))

    def _report(self, text: str) -> None:
        self._compiled = True
        if self._progress is not None:
            self._progress(text)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Tools]:
        """Hold the writer lock, and make sure first that changes can be made here."""
        fitness.require_capabilities()
        fitness.allow_many_files()
        fitness.require_bpffs(self.paths.bpffs)
        with self._lock.held(), contextlib.ExitStack() as stack:
            events = Once(lambda: open_events(self.paths, stack))
            images, store = Images(self.paths.images), self.store
            yield Tools(
                self.paths,
                images,
                store,
                RuleNames(store),
                self.artefact,
                events,
                self._prefer_link,
                self._progress,
            )

    def _change_many(
        self,
        document: PolicyDocument,
        names: Sequence[str],
        order: Order,
        *,
        dry_run: bool = False,
    ) -> ApplyResult:
        started = time.monotonic()
        failures: dict[str, VgwError] = {}
        wanted: list[Desired] = []
        with self._changing() as tools:
            document = self.overlay.laid(document)
            owners = pinned.owners(self.paths)
            for vm in names:
                try:
                    desired = desired_state(self.paths, document, vm, order, owners)
                    if not desired.interfaces and not pinned.interfaces_of(self.paths, vm):
                        raise nothing_to_attach(desired)
                    wanted.append(desired)
                except VgwError as error:
                    failures[vm] = error
            outcomes = self._run(tools, wanted, dry_run=dry_run)
        done = [outcome for outcome in outcomes.values() if isinstance(outcome, AttachResult)]
        failures |= {vm: out for vm, out in outcomes.items() if isinstance(out, VgwError)}
        if len(failures) == 1 and not done:
            raise next(iter(failures.values()))
        if failures:
            texts = {vm: str(error) for vm, error in failures.items()}
            raise PartlyAppliedError(texts, [dataclasses.asdict(each) for each in done])
        waiting = {desired.vm: list(desired.missing) for desired in wanted if desired.missing}
        return ApplyResult(done, waiting, time.monotonic() - started)

    def _run(
        self, tools: Tools, wanted: Sequence[Desired], *, dry_run: bool = False
    ) -> dict[str, AttachResult | VgwError]:
        self._compiled = False
        try:
            return run_changes(tools, wanted, lambda: self._compiled, dry_run=dry_run)
        finally:
            self._tidy()

    def _detach(self, vm: str) -> None:
        settle(self.paths.vm_dir(vm))
        for name in pinned.interfaces_of(self.paths, vm):
            endpoints.destroy(self.paths.endpoint_dir(vm, name), pinned.present_ifindex(name))
        remove_tree(self.paths.vm_dir(vm))
        remove_state(self.paths.counts(vm))
        remove_state(self.paths.manifest(vm))
        self.overlay.book.forget(vm)

    def _tidy(self) -> None:
        """Remove what no endpoint uses: policies, and without endpoints all that they shared."""
        remove_unused_images(self.paths)
        remove_unused_records(self.paths, self.store)
        if self.attached():
            return
        self.paths.events.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.paths.pins.rmdir()
        remove_stale(self.paths.bpffs)

    def _forget_endpoints(self, manifest: Manifest, gone: Sequence[str]) -> None:
        left = manifest.only({*manifest.endpoints}.difference(gone).union(manifest.extra))
        if pinned.interfaces_of(self.paths, manifest.vm):
            save_manifest(self.paths.manifest(manifest.vm), left)
        else:
            forget(self.paths, manifest)

    def _reconfigure(self, vm: str, edit: Callable[[abi.EndpointConfig], None]) -> None:
        """Change the configuration of a VM's endpoints, under the policy that they have."""
        staged: list[tuple[OpenEndpoint, int]] = []
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(vm)]
            manifest = load_manifest(self.paths.manifest(vm)) or recovered(self.paths, vm, opened)
            settle_spares(
                self.paths.counts(vm),
                [endpoint.maps for endpoint in opened],
                manifest.in_generation(self.store.labels),
            )
            for endpoint in opened:
                config = endpoint.maps.config()
                edit(config)
                staged.append((endpoint, endpoints.restage(endpoint, config)))
            for endpoint, slot in staged:
                endpoint.maps.switch(slot)
            libbpf.wait_for_programs()
            for endpoint, slot in staged:
                endpoint.maps.release(1 - slot)


def _not_attached(vm: str) -> str:
    return f"VM {vm} is not attached; attach it by `vgw attach --vm {vm}`"
