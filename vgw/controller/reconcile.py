# SPDX-License-Identifier: Apache-2.0
"""The host's endpoints and every change to them: attach, apply, detach, mode, flush.

A `Host` keeps nothing in memory that matters: what is attached is read from the kernel, what it is
called from the state directory. Every change is made under the host's writer lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from vgw import abi, files
from vgw.controller import endpoint as endpoints
from vgw.controller import fitness, pinned
from vgw.controller import status as reports
from vgw.controller.batch import ApplyResult, AttachResult, run_changes
from vgw.controller.desired import Desired, Order, desired_state, nothing_to_attach
from vgw.controller.elsewhere import endpoints_elsewhere, remove_elsewhere
from vgw.controller.endpoint import BrokenEndpointError, OpenEndpoint
from vgw.controller.expiry import Expiry, vms_to_look_at
from vgw.controller.images import Images, remove_unused_images
from vgw.controller.kept_maps import KeptMaps
from vgw.controller.last_flows import LastFlows, recorded
from vgw.controller.last_known import LastKnown
from vgw.controller.layouts import layout_file
from vgw.controller.lock import WriterLock, remove_stale
from vgw.controller.manifest import Manifest, load_manifest, save_manifest
from vgw.controller.mode_order import with_order
from vgw.controller.overlay import Overlay
from vgw.controller.paths import Paths
from vgw.controller.pins import quietly, remove_empty, remove_tree
from vgw.controller.policy_store import PolicyStore, RuleNames
from vgw.controller.reconfigure import reconfigure
from vgw.controller.recovery import (
    forget,
    recovered,
    remove_unused_records,
    restore_manifest,
)
from vgw.controller.renames import Renamed, follow_renames
from vgw.controller.replacement import destroy, settle
from vgw.controller.restore import Restored, Suspect, restore
from vgw.controller.rule_counts import keep_counts, read_steadily, settle_spares
from vgw.controller.shield import Shields
from vgw.controller.state_file import remove_state
from vgw.controller.tools import Once, Tools, open_events
from vgw.controller.upgrade import Upgrades, give_up_flows, upgrade_vms
from vgw.errors import PartlyAppliedError, VgwError, out_of_memory
from vgw.loader import Artefact, load_artefact, packet_build
from vgw.policy.model import Hook, PolicyDocument

_logger = logging.getLogger(__name__)

__all__ = ["ApplyResult", "AttachResult", "Host", "Upgrades"]


class Host:
    """All endpoints of this host; may be used from several threads."""

    def __init__(  # noqa: PLR0913 - what a host may be given
        self,
        paths: Paths,
        *,
        prefer_link: bool = True,
        progress: Callable[[str], None] | None = None,
        overlay: Overlay | None = None,
        last_flows: LastFlows | None = None,
        alive: Callable[[], None] = lambda: None,
        shields: Shields | None = None,
    ) -> None:
        """Work under `paths`.

        `progress` is told what takes long, such as compiling; `overlay` is what is known beyond the
        documents, by default what is leased; `last_flows` logs the flows of endpoints that go;
        `alive` is called whenever a part of a change is done. `shields` are those that this process
        holds up.
        """
        self._alive = alive
        self.paths = paths
        self.overlay = overlay or Overlay(paths)
        self._progress = progress
        #: For what is looked at often: metrics, lost events, dead flows.
        self.kept = KeptMaps(paths)
        self._lock = WriterLock(paths.bpffs)
        self._artefacts: dict[frozenset[str], Artefact] = {}
        self._artefacts_lock = threading.Lock()
        self._build = Once(packet_build)
        self._compiled = False
        self._prefer_link = prefer_link
        self._last_flows = last_flows
        self.shields = shields or Shields()
        self._expiry = Expiry(paths.events)

    def artefact(self, programs: Collection[str]) -> Artefact:
        """Return some of the packet programs, compiling those that the cache lacks."""
        wanted = frozenset(programs)
        with self._artefacts_lock:
            if wanted not in self._artefacts:
                self._artefacts[wanted] = load_artefact(
                    self.paths.cache_dir,
                    self._report,
                    programs=wanted,
                    trusted=fitness.trusted_users(self.paths.bpffs),
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
            follow_renames(self.paths)
            order = Order(interfaces, hook, force)
            known = LastKnown(self.paths, document or PolicyDocument(), self.overlay)
            desired = self._desired(known, vm, order, pinned.owners(self.paths))
            if isinstance(desired, AttachResult):
                return desired
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

        One that the document does not name keeps what the last one said that did; if there was
        none, it gets the defaults on the interfaces that it has. With `dry_run` only finds out what
        would change. Errors are those of `attach_many`.
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
            follow_renames(self.paths)
            if vm not in self._known():
                raise VgwError(f"VM {vm} is not attached, so there is nothing to detach")
            self._detach(vm)
            self._tidy()

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names.

        Raises PartlyAppliedError when that failed for some; the others are not protected any more.
        """
        done: list[str] = []
        failures: dict[str, str] = {}
        with self._changing():
            follow_renames(self.paths)
            for vm in self._known():
                try:
                    self._detach(vm)
                except (OSError, VgwError) as error:
                    failures[vm] = str(error)
                else:
                    done.append(vm)
            self._tidy()
        if failures:
            raise PartlyAppliedError(failures, [{"vm": vm} for vm in done])
        return done

    def follow_renames(self) -> list[Renamed]:
        """Call endpoints as their interfaces are called now; return which were renamed."""
        with self._changing():
            return follow_renames(self.paths)

    def restore(self, suspect: Suspect) -> Restored | None:
        """Put back what somebody took off an endpoint; None: it has to be made anew.

        Raises VgwError.
        """
        with self._changing() as tools:
            self.shields.lower_all_of(suspect.vm)
            restored = restore(tools, suspect)
            moved = None if restored is None else restored.moved
            if moved is not None:
                self._reconfigure(suspect.vm, lambda config: _judge_at_tc(config, moved))
        return restored

    def raise_shield(self, identity: int, vm: str, interface: str) -> None:
        """Have what an endpoint drops dropped at XDP, for as long as this process holds it up.

        Raises VgwError when it cannot be: there is another endpoint of that name, it is not whole
        or not at tc, is to be left alone by policy or by its kind, or XDP is taken.
        """
        with self._changing() as tools:
            directory = self.paths.endpoint_dir(vm, interface)
            with endpoints.open_endpoint(vm, interface, directory) as endpoint:
                ifindex = pinned.present_ifindex(interface)
                if ifindex is None:
                    raise VgwError(f"interface {interface} does not exist")
                config = endpoint.maps.config()
                if config.endpoint != identity:
                    raise VgwError("it was attached anew")
                if not config.flood_drops:
                    raise VgwError("its hook or its kind of interface rules out a shield")
                judge = endpoint.attachment(ifindex, abi.Path.FROM_VM)
                if judge is None or judge.hook != "tc":
                    raise VgwError("its program is not attached at tc")
                self.shields.raise_for(tools, endpoint, ifindex)

    def sweep(
        self, tell: Callable[[str, str], object] = lambda _vm, _interface: None
    ) -> list[tuple[str, str]]:
        """Remove endpoints whose interface is gone; return (VM, interface) of each.

        `tell` is called with each as soon as it is removed, also if what comes after it fails.
        An interface that was renamed or moved is not gone: its programs still protect it. A VM
        left without endpoints is forgotten, but for the mode and interfaces that the user ordered.
        Raises PartlyAppliedError when that failed for some VMs; it is done for the others then.
        """
        removed: list[tuple[str, str]] = []
        failures: dict[str, str] = {}

        def note(vm: str, interface: str) -> None:
            removed.append((vm, interface))
            tell(vm, interface)

        with self._changing():
            follow_renames(self.paths)
            for vm in pinned.known_vms(self.paths):
                try:
                    self._sweep(vm, note)
                except (OSError, VgwError) as error:
                    failures[vm] = str(error)
            self._tidy()
        if failures:
            raise PartlyAppliedError(failures)
        return removed

    def _sweep(self, vm: str, tell: Callable[[str, str], object]) -> None:
        """Remove a VM's endpoints whose interface is gone, and tell of each. Raises OSError."""
        there = pinned.interfaces_of(self.paths, vm)
        gone = [name for name in there if pinned.is_gone(self.paths, vm, name)]
        if there and not gone:
            return
        manifest = load_manifest(self.paths.manifest(vm))
        if manifest is not None and len(gone) < len(there):
            self._keep_counts(manifest, gone)
        if gone:
            self.shields.lower_all_of(vm)
        for name in gone:
            with recorded(self._last_flows, vm, name):
                destroy(self.paths.endpoint_dir(vm, name), None)
            tell(vm, name)
        # Without endpoints but with their policies: one that died had removed only those.
        if manifest is not None and (gone or manifest.policies):
            self._forget_endpoints(manifest, gone)

    def upgrade(self) -> Upgrades:
        """Bring what is attached to this version, packets and flows untouched.

        Raises VgwError only when nothing at all could be tried.
        """
        with self._changing() as tools:
            try:
                return upgrade_vms(tools, None)
            finally:
                self._tidy()

    def set_mode(self, vm: str, mode: abi.Mode | None, reason: str = "", by: str = "") -> bool:
        """Order a mode for a VM, and return whether it had another one, or another order.

        Without a reason, ordering what its policy says lifts the order; None lifts any. Raises
        VgwError when the VM is not attached, or when nobody knows what its policy says.
        """
        with self._changing(), contextlib.ExitStack() as stack:
            self._require_attached(vm)
            opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(vm)]
            old = load_manifest(self.paths.manifest(vm))
            manifest = (
                self.manifest(vm) if mode is None else old or recovered(self.paths, vm, opened)
            )
            ordered = with_order(manifest, mode, reason, by)
            wanted = manifest.mode if mode is None else mode
            running = {endpoint.maps.config().mode for endpoint in opened}
            with contextlib.ExitStack() as undo:
                if ordered != old:
                    undo.callback(quietly, restore_manifest, self.paths.manifest(vm), old)
                    save_manifest(self.paths.manifest(vm), ordered)
                if running != {wanted}:
                    self._reconfigure(vm, lambda config: setattr(config, "mode", wanted))
                else:  # one that died may have put it in force and freed nothing
                    maps = [endpoint.maps for endpoint in opened]
                    labels = ordered.in_generation(self.store.labels)
                    settle_spares(self.paths.counts(vm), maps, labels)
                undo.pop_all()
        return ordered != manifest or running != {wanted}

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
        for name in vms_to_look_at(self.kept) if vm is None else [vm]:
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(name)]
                deleted += self._expiry.run(self.artefact, opened)
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
        others = reports.elsewhere_status(self.paths, vm)
        if vm is not None and not others:
            self._require_attached(vm)
        names = [name for name in self.attached() if vm in (None, name)]
        build = None
        with contextlib.suppress(VgwError):  # which only a change needs to know
            build = self._build()
        rows = [reports.vm_status(self.paths, name, build) for name in names] + others
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

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the writer lock over several changes; raises VgwError when it stays taken."""
        return self._lock.held()

    # --- how ----------------------------------------------------------------------------

    def _require_attached(self, vm: str) -> None:
        if not pinned.interfaces_of(self.paths, vm):
            raise VgwError(_not_attached(vm))

    def _report(self, text: str) -> None:
        self._compiled = True
        if self._progress is not None:
            self._progress(text)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Be the one who changes this host's endpoints for a `with` block. Raises VgwError."""
        with self._changing():
            yield

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Tools]:
        """Hold the writer lock, and make sure first that changes can be made here."""
        fitness.require_capabilities()
        fitness.require_host_clock()
        fitness.allow_many_files()
        fitness.require_bpffs(self.paths.bpffs)
        fitness.require_own(self.paths.bpffs, self.paths.pins)
        with _saying_what_failed(), self._lock.held(), contextlib.ExitStack() as stack:
            events = Once(lambda: open_events(self.paths, stack))
            images, store = Images(self.paths.images), self.store
            yield Tools(
                self.paths,
                images,
                store,
                RuleNames(store),
                self.artefact,
                events,
                self._build,
                self._prefer_link,
                self._progress,
                self._last_flows,
                self._alive,
                self.shields.lower_all_of,
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
        untouched: list[AttachResult] = []
        with self._changing() as tools:
            follow_renames(self.paths)
            owners = pinned.owners(self.paths)
            known = LastKnown(self.paths, document, self.overlay)
            for vm in names:
                try:
                    desired = self._desired(known, vm, order, owners)
                    if isinstance(desired, AttachResult):
                        untouched.append(desired)
                        continue
                    if not desired.interfaces and not pinned.interfaces_of(self.paths, vm):
                        raise nothing_to_attach(desired)
                    wanted.append(desired)
                except VgwError as error:
                    failures[vm] = error
            outcomes = self._run(tools, wanted, dry_run=dry_run)
        done = [outcome for outcome in outcomes.values() if isinstance(outcome, AttachResult)]
        done += untouched
        failures |= {vm: out for vm, out in outcomes.items() if isinstance(out, VgwError)}
        if len(failures) == 1 and not done:
            raise next(iter(failures.values()))
        if failures:
            texts = {vm: str(error) for vm, error in failures.items()}
            raise PartlyAppliedError(texts, [dataclasses.asdict(each) for each in done])
        waiting = {desired.vm: list(desired.missing) for desired in wanted if desired.missing}
        return ApplyResult(done, waiting, time.monotonic() - started)

    def _desired(
        self, known: LastKnown, vm: str, order: Order, owners: Mapping[str, Sequence[str]]
    ) -> Desired | AttachResult:
        """Return what a VM shall have; or what became of it, when it is left as it is.

        That is where the policy does not name it any more and the last one that did is lost.
        """
        document = known.document_of(vm)
        interfaces = pinned.interfaces_of(self.paths, vm)
        manifest = load_manifest(self.paths.manifest(vm))
        if document is None and interfaces and manifest is not None:
            return AttachResult(
                vm, interfaces, manifest.generation, False, False, 0.0, manifest.named, kept=True
            )
        document = document or known.asked
        return known.keeping(desired_state(self.paths, document, vm, order, owners), document)

    def _run(
        self, tools: Tools, wanted: Sequence[Desired], *, dry_run: bool = False
    ) -> dict[str, AttachResult | VgwError]:
        self._compiled = False
        if dry_run:
            return run_changes(tools, wanted, lambda: self._compiled, dry_run=True)
        try:
            known = {desired.vm: desired for desired in wanted}
            upgrades = upgrade_vms(tools, known, known)
            changed = [each for each in wanted if each.force or each.vm not in upgrades.elsewhere]
            outcomes = run_changes(tools, changed, lambda: self._compiled)
            give_up_flows(tools, upgrades, outcomes)
            return upgrades.noted(outcomes)
        finally:
            self._tidy()

    def _known(self) -> list[str]:
        """Return the VMs of which there is any trace, of this version or another."""
        others = {each.vm for each in endpoints_elsewhere(self.paths)}
        return sorted(others.union(pinned.known_vms(self.paths)))

    def _detach(self, vm: str) -> None:
        self.shields.lower_all_of(vm)
        others = endpoints_elsewhere(self.paths, vm)
        for each in others:
            each.layout(self.paths)
        for each in others:
            remove_elsewhere(self.paths, each, pinned.present_ifindex(each.interface))
        settle(self.paths.vm_dir(vm))
        for name in pinned.interfaces_of(self.paths, vm):
            with recorded(self._last_flows, vm, name):
                destroy(self.paths.endpoint_dir(vm, name), pinned.present_ifindex(name))
        remove_tree(self.paths.vm_dir(vm))
        remove_state(self.paths.counts(vm))
        remove_state(self.paths.flow_import(vm))
        remove_state(self.paths.manifest(vm))
        self.overlay.book.forget(vm)

    def _tidy(self) -> None:
        """Remove what no endpoint uses, if that can be; the change before it is made all the same.

        Whoever made it has its result to tell, and to log.
        """
        try:
            self._remove_unused()
        except (OSError, VgwError, MemoryError) as error:
            _logger.warning("what no VM uses any more stays until the next change: %s", error)

    def _remove_unused(self) -> None:
        """Remove policies that no endpoint uses, and without endpoints all that they shared."""
        remove_unused_images(self.paths)
        remove_unused_records(self.paths, self.store)
        remove_empty(self.paths.pins)
        if self.attached():
            return
        with contextlib.suppress(OSError):  # a directory that cannot be has nothing to remove
            remove_state(layout_file(self.paths.state_dir, abi.ABI_VERSION))
        files.unlink(self.paths.events)
        with contextlib.suppress(OSError):
            files.rmdir(self.paths.pins)
        remove_stale(self.paths.bpffs)

    def _keep_counts(self, manifest: Manifest, gone: Collection[str]) -> None:
        """Keep for the rules of a VM what they had counted on interfaces that are gone."""
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(each) for each in self.open_endpoints(manifest.vm)]
            keep_counts(
                self.paths.counts(manifest.vm),
                [endpoint.maps for endpoint in opened if endpoint.interface in gone],
                manifest.in_generation(self.store.labels),
            )

    def _forget_endpoints(self, manifest: Manifest, gone: Sequence[str]) -> None:
        left = manifest.only({*manifest.endpoints}.difference(gone).union(manifest.extra))
        if pinned.interfaces_of(self.paths, manifest.vm):
            save_manifest(self.paths.manifest(manifest.vm), left)
        else:
            forget(self.paths, manifest)

    def _reconfigure(self, vm: str, edit: Callable[[abi.EndpointConfig], None]) -> None:
        """Change the configuration of a VM's endpoints, under the policy that they have."""
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(endpoint) for endpoint in self.open_endpoints(vm)]
            reconfigure(self.paths, self.store, vm, opened, edit)


@contextlib.contextmanager
def _saying_what_failed() -> Iterator[None]:
    """Raise as VgwError that a file could not be changed, or that memory is short."""
    try:
        yield
    except OSError as error:
        raise files.failure(error) from error
    except MemoryError:
        raise out_of_memory() from None


def _judge_at_tc(config: abi.EndpointConfig, moved: int) -> None:
    """Have the endpoint of an identity know that its programs meet each other's answers."""
    if config.endpoint == moved:
        config.reply_mark = endpoints.reply_mark(moved, Hook.TC)


def _not_attached(vm: str) -> str:
    return f"VM {vm} is not attached; attach it by `vgw attach --vm {vm}`"
