# SPDX-License-Identifier: Apache-2.0
"""What the controller does with its host: by the verbs of its socket, and by itself.

One policy document is the current one: that of the last reload or apply. Changes are made one at
a time, each is in the log of events, and what failed by itself is tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vgw import __version__, abi
from vgw.controller.actor import one_line, this_process
from vgw.controller.alarms import Alarms
from vgw.controller.api import Verb
from vgw.controller.conntrack import list_flows
from vgw.controller.events import LogWriter, control_record
from vgw.controller.facts import Facts
from vgw.controller.finding.told import told_vm
from vgw.controller.health import Health
from vgw.controller.host_policy import HostPolicy, Loaded
from vgw.controller.inspection import Inspector, Outcome
from vgw.controller.inventory import read_document, read_host_document, wants
from vgw.controller.metrics import ApplyTimes
from vgw.controller.parameters import Parameters
from vgw.controller.pinned import is_gone
from vgw.controller.policy_keeper import ApplyOrder, PolicyKeeper
from vgw.controller.policy_source import SourceReader, Texts
from vgw.controller.reconcile import ApplyResult, AttachResult, Host
from vgw.controller.recording import Work, results_of
from vgw.controller.renames import say_renamed
from vgw.controller.restore import Suspect
from vgw.controller.samples import sample, talkers
from vgw.controller.vms_report import Memory, vms_report
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import Hook, PolicyDocument

_logger = logging.getLogger(__name__)


class Operations:
    """Everything by which this process changes the host; may be used from several threads."""

    def __init__(  # noqa: PLR0913 - what a controller has one of
        self,
        host: Host,
        log: LogWriter,
        applies: ApplyTimes,
        alarms: Alarms | None = None,
        health: Health | None = None,
        *,
        facts: Facts | None = None,
    ) -> None:
        """Work on a host; `log` gets a record of each change, `applies` its duration.

        What stands wrong is in `alarms`, `health` is told of changes that are under way, and
        `facts` are what is known of VMs beyond the files.
        """
        self._health = Health() if health is None else health
        self._host = host
        self._log = log
        self._alarms = Alarms(log) if alarms is None else alarms
        self._facts = facts or Facts(host.paths, log, self._alarms)
        #: Called when interfaces have other names than before.
        self.on_rename: Callable[[], None] = lambda: None
        self._inspector = Inspector(host, self._alarms, log)
        #: Whether all endpoints were looked at for a name that the policy does not use.
        self._names_known = False
        self._applies = applies
        self._lock = threading.RLock()
        self._reload_lock = threading.Lock()
        self._finished = False
        self._keeper = PolicyKeeper(host, log.add, SourceReader(host.paths.policy))
        self._policy = HostPolicy(self._keeper, host.paths)
        #: Interface -> the index it had when it was protected; of these nothing is to be done.
        self._protected: dict[str, int] = {}
        #: VM -> why it could not be protected.
        self._failures: dict[str, str] = {}
        #: Why endpoints whose interface is gone could not be forgotten.
        self._sweep_failure: str | None = None

    def verbs(self) -> dict[str, Verb]:
        """Return what serves each verb of the socket."""
        return {
            "ping": self._ping,
            "attach": self._attach,
            "detach": self._detach,
            "apply": self._apply,
            "rollback": self._rollback,
            "confirm": self._confirm,
            "settle": self._settle,
            "status": self._status,
            "rules": lambda parameters: self._host.rules(parameters.text("vm")),
            "conntrack": lambda parameters: list_flows(self._host, parameters.text("vm")),
            "conntrack_import": self._put_flows,
            "sample": lambda _: {**sample(self._host), "alarms": self._alarm_reports(None)},
            "talkers": lambda parameters: talkers(self._host, parameters.text("vm")),
            "flush": self._flush,
            "mode": self._set_mode,
            "vms": self._vms,
            "wants": self._wants,
        }

    # --- what happens by itself -----------------------------------------------------------

    def reload(self, event: str = "reload") -> None:
        """Read the policy and bring the host to it; `event` says why it is read.

        A policy that is missing, invalid or not for this host changes nothing: what is in force
        stays, VMs that come get the last good one, and an alarm says why.
        """
        with self._reload_lock:  # what was read first is not put in force last
            texts = self._policy.read_file()  # which may take a while, and nobody waits for it
            self._reload(event, texts)

    def _reload(self, event: str, texts: Texts | VgwError) -> None:
        with self._changing():
            self._follow_renames()
            self._sweep()
            self._upgrade()
            found = self._policy.load(event, texts)
            self._tell_of_the_file()
            if self._document is None:
                return
            self._settle_facts()
            self._protected.clear()
            present, attached = self._present_vms(), self._host.attached()
            if found.everywhere:
                self._protect(present.union(attached), self._remembering(event, found))
            else:
                self._protect(present.difference(attached))

    def look_after_policy(self) -> None:
        """Do what has become due: go back from a policy, read a file that may be back."""
        with self._changing():
            due = self._policy.is_put_off and self._keeper.waiting() is None
        if due or self._policy.may_be_back():
            self.reload()

    def _upgrade(self) -> None:
        """Bring what an older or newer version left attached to this one."""
        try:
            upgrades = self._host.upgrade()
        except VgwError as error:
            self._complain(f"nothing was upgraded: {error}")
            return
        for done in upgrades.done:
            self._log.add(control_record("upgrade", **dataclasses.asdict(done)))
        for vm, text in upgrades.failures.items():
            self._complain(text, vm)

    def facts_changed(self) -> None:
        """Bring those VMs up to date that something found or leased since concerns."""
        with self._changing():
            there = self._present_vms().union(self._host.attached())
            self._protect(self._settle_facts().intersection(there))

    def _settle_facts(self) -> set[str]:
        document = self._document or PolicyDocument()
        self._facts.follow(document)
        try:
            return self._facts.settle(document, self._host.attached())
        except VgwError as error:  # of the state directory: the next lease tries it again
            self._complain(str(error))
            return set()

    def links_changed(self, came: Mapping[str, int], gone: Iterable[str]) -> None:
        """Protect VMs whose interfaces came (name: index), forget those whose went."""
        with self._changing():
            lost = list(gone)
            for name in lost:
                self._protected.pop(name, None)
            if lost:
                self._follow_renames()
                self._sweep()
                self._facts.search.forget(lost)
            if came:
                self._facts.search.look()
                owners = self._owners()
                fresh = (name for name, index in came.items() if self._protected.get(name) != index)
                self._protect({owners[name] for name in fresh if name in owners})

    def idle(self) -> None:
        """Free dead flows, and try again what failed: to protect VMs, to forget endpoints."""
        with self._changing():
            with contextlib.suppress(VgwError):  # it will be tried again, and nothing depends on it
                self._host.expire()
            self._inspector.end_alarms()
            self._say_names([] if self._names_known else self._host.attached())
            self._names_known = True
            if self._sweep_failure is not None:
                self._sweep()
            if self._failures:
                there = self._present_vms().union(self._host.attached())
                self._protect(there.intersection(self._failures))

    def inspect(self, suspects: Sequence[Suspect]) -> list[Suspect]:
        """Look at endpoints that somebody may have taken apart; return those that stay so.

        What was taken off is put back; an endpoint of which too little is left is made anew.
        """
        with self._changing():
            outcomes = {suspect: self._inspector.inspect(suspect) for suspect in suspects}
            anew = [each for each in suspects if outcomes[each] is Outcome.MAKE_ANEW]
            if anew:
                self._protect({suspect.vm for suspect in anew})
            wrong = [each for each in anew if not self._inspector.made_anew(each)]
            if any(is_gone(self._host.paths, each.vm, each.interface) for each in suspects):
                self._sweep()
        return wrong + [each for each in suspects if outcomes[each] is Outcome.WRONG]

    def finish(self) -> None:
        """Wait for the change under way and refuse others: the process is about to end."""
        with self._lock:
            self._finished = True

    def _follow_renames(self) -> None:
        """Call endpoints as their interfaces are called now."""
        try:
            renamed = self._host.follow_renames()
        except VgwError as error:
            self._complain(str(error))
            return
        for each in renamed:
            self._log.add(
                control_record("renamed", vm=each.vm, interface=each.new, before=each.old)
            )
        if renamed:
            self.on_rename()
        self._say_names(each.vm for each in renamed)

    def _say_names(self, vms: Iterable[str]) -> None:
        say_renamed(self._host.paths, vms, self._alarms)

    def _owners(self) -> dict[str, str]:
        """Return which VM each interface belongs to, by the current policy or by an order."""
        document = self._facts.overlay.laid(self._document or PolicyDocument())
        vms = document.vms.values()
        listed = {each.name: vm.name for vm in vms for each in vm.interfaces if each.name}
        return self._host.ordered_interfaces() | listed

    def _present_vms(self) -> set[str]:
        """Return the VMs that have an interface on this host now."""
        present = {name for _, name in socket.if_nameindex()}
        return {vm for name, vm in self._owners().items() if name in present}

    @property
    def _document(self) -> PolicyDocument | None:
        return self._policy.document

    def _tell_of_the_file(self) -> None:
        """Raise or end the alarm about the policy's file."""
        problem = self._policy.problem
        if problem is None:
            self._alarms.clear("policy_unreadable")
            return
        text = f"{problem}; what is in force stays in force"
        if text not in {alarm.text for alarm in self._alarms.current()}:
            self._applies.record(0.0, failures=1)
            self._complain(text)
        self._alarms.set("policy_unreadable", text)

    def _remembering(self, event: str, found: Loaded) -> Callable[[Work], ApplyResult] | None:
        """Return what makes a change and remembers the policy of the file, None: it is known."""
        document, sources = self._document, found.sources
        if document is None or sources is None:
            return None
        who = this_process("controller")
        return lambda work: self._keeper.record_reload(event, sources, document, who, work)

    def _protect(
        self, names: Iterable[str], remembering: Callable[[Work], ApplyResult] | None = None
    ) -> None:
        """Attach VMs, or bring them up to date; failures are logged and remembered."""
        before = set(self._host.attached())
        # Without a policy what is in force stays; where nothing is, the defaults protect.
        vms = sorted(names if self._document is not None else set(names).difference(before))
        if not vms:
            if remembering is not None:
                remembering(ApplyResult)
            return
        started = time.monotonic()
        document = self._document or PolicyDocument()
        results, failures = self._attach_all(document, vms, remembering)
        self._applies.record(time.monotonic() - started, len(failures))
        for result in results:
            if result.vm not in before:
                self._record("attach", result)
            elif result.changed:
                self._record("apply", result)
            self._note_protected(result)
        self._alarm_of_kept(results)
        known = {vm: self._failures.pop(vm, None) for vm in vms}
        self._failures.update(failures)
        for vm, text in failures.items():
            if known.get(vm) != text:
                self._complain(text, vm)

    def _attach_all(
        self,
        document: PolicyDocument,
        vms: Sequence[str],
        remembering: Callable[[Work], ApplyResult] | None,
    ) -> tuple[Sequence[AttachResult], dict[str, str]]:
        """Return what became of the VMs that are protected now, and why others are not."""
        work = functools.partial(self._host.attach_many, document, vms)
        try:
            return (work() if remembering is None else remembering(work)).vms, {}
        except PartlyAppliedError as error:
            return results_of(error), error.failures
        except VgwError as error:
            return (), dict.fromkeys(vms, str(error))

    def _sweep(self) -> None:
        """Forget endpoints whose interface is gone."""
        try:
            removed = self._host.sweep()
        except VgwError as error:
            if self._sweep_failure != str(error):
                self._sweep_failure = str(error)
                self._complain(str(error))
            return
        self._sweep_failure = None
        for vm, interface in removed:
            self._log.add(control_record("detach", vm=vm, interface=interface))

    def _note_protected(self, result: AttachResult) -> None:
        for name in result.interfaces:
            with contextlib.suppress(OSError):
                self._protected[name] = socket.if_nametoindex(name)

    # --- verbs ----------------------------------------------------------------------------

    def _ping(self, _: Parameters) -> dict[str, object]:
        return {"pid": os.getpid(), "version": __version__, "abi": abi.ABI_VERSION}

    def _status(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.optional_text("vm")
        return {
            **self._host.status(vm),
            "host_policy": self._keeper.report(),
            "alarms": self._alarm_reports(vm),
            "health": self._health.report(),
        }

    def _alarm_reports(self, vm: str | None) -> list[dict[str, object]]:
        """Return the alarms that stand, None: of all VMs and of the host."""
        alarms = self._alarms.current()
        return [alarm.report() for alarm in alarms if vm in (None, alarm.vm)]

    def _vms(self, _: Parameters) -> dict[str, object]:
        with self._lock:
            written = self._document or PolicyDocument()
            document = self._facts.overlay.laid(written)
            found = self._facts.search.found(written.inventory.find)
            memory = Memory(dict(self._failures), dict(self._facts.learner.refused))
        return vms_report(self._host.paths, document, found, self._facts.search.problems, memory)

    def _wants(self, parameters: Parameters) -> dict[str, object]:
        # Without a policy in force the files say it, or that nobody can say it.
        document = self._document or read_host_document(self._host.paths, self._keeper.source.read)
        return {"wanted": wants(document, parameters.text("vm"))}

    def _attach(self, parameters: Parameters) -> dict[str, object]:
        sources, force = parameters.sources(), parameters.flag("force")
        given = None if sources is None else read_document(self._host.paths, sources)
        vms = parameters.texts("vms")
        told = told_vm(parameters)
        with self._changing(), self._timed():
            if told is not None:
                self._facts.search.tell(told)
            document = given or self._document
            if given is not None and sources is not None:
                held = self._keeper.held(given) if parameters.flag("own") else None
                document = self._document if held is not None else given
                self._keeper.admit(given, force=force)
            asked = [parameters.text("vm")] if vms is None else vms
            many = vms is not None

            def work() -> ApplyResult:
                if many:
                    return self._host.attach_many(document or PolicyDocument(), asked, force=force)
                one = self._host.attach(
                    document,
                    asked[0],
                    interfaces=parameters.texts("interfaces") or (),
                    hook=parameters.choice("hook", Hook),
                    force=force,
                )
                return ApplyResult([one])

            with self._taking_part("attach"):
                if given is None or sources is None or document is not given:
                    result = work()
                else:
                    who = parameters.who()
                    result = self._keeper.record_attach(sources, given, who, asked, work)
            self._policy.refresh()
            self._take("attach", result.vms)
        return dataclasses.asdict(result if many else result.vms[0])

    def _apply(self, parameters: Parameters) -> dict[str, object]:
        sources = parameters.sources()
        if sources is None:
            raise VgwError("the request has no sources: the policy as [[name, text], ...]")
        order = ApplyOrder(
            parameters.texts("vms"),
            force=parameters.flag("force"),
            confirm_seconds=parameters.seconds("confirm_seconds"),
            supersede=parameters.flag("supersede"),
        )
        with self._changing(), self._timed():
            document = read_document(self._host.paths, sources)
            if parameters.flag("dry_run"):
                return dataclasses.asdict(self._host.apply(document, order.vms, dry_run=True))
            with self._taking_part("apply"):
                try:
                    result = self._keeper.apply(sources, document, parameters.who(), order)
                except PartlyAppliedError as error:
                    if error.done:  # some VMs have it now, so it is this host's
                        self._policy.document = document
                    raise
            self._policy.document = document
            self._alarms.clear("rollback_failed")
            self._take("apply", result.vms)
        return dataclasses.asdict(result)

    def _rollback(self, parameters: Parameters) -> dict[str, object]:
        with self._changing(), self._timed(), self._taking_part("apply"):
            entry, result = self._keeper.rollback(
                parameters.optional_number("number"), parameters.who()
            )
            self._policy.refresh()
            self._alarms.clear("rollback_failed")
            self._take("apply", result.vms)
        return {"policy": entry.number, "back": entry.back, **dataclasses.asdict(result)}

    def _confirm(self, parameters: Parameters) -> dict[str, object]:
        with self._changing():
            return {"policy": self._keeper.confirm(parameters.who())}

    def _settle(self, parameters: Parameters) -> dict[str, object]:
        with self._changing():
            done = self._keeper.settle_overdue(parameters.who())
        return {"rolled_back": done}

    def _detach(self, parameters: Parameters) -> dict[str, object]:
        with self._changing():
            if parameters.flag("all"):
                detached = self._host.detach_all()
            else:
                detached = [parameters.text("vm")]
                self._host.detach(detached[0])
            for vm in detached:
                self._failures.pop(vm, None)
                self._alarms.forget(vm)
                self._log.add(control_record("detach", vm=vm))
        return {"detached": detached}

    def _put_flows(self, parameters: Parameters) -> dict[str, int]:
        # numpy takes memory that a host from which and to which no VM moves can spare.
        from vgw.controller.flow_import import Piece, put_piece  # noqa: PLC0415

        piece = Piece(
            parameters.text("vm"),
            parameters.text("interface"),
            parameters.text("stream"),
            parameters.number("sequence"),
            parameters.data("records"),
            parameters.flag("last"),
        )
        with self._changing():
            filled = put_piece(self._host, piece)
            if piece.last:
                self._log.add(control_record("import", vm=piece.vm, sequence=piece.sequence))
        return filled

    def _flush(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.text("vm")
        with self._changing():
            entries = self._host.flush(vm)
            self._log.add(control_record("flush", vm=vm))
        return {"vm": vm, "entries": entries}

    def _set_mode(self, parameters: Parameters) -> dict[str, object]:
        vm, reason = parameters.text("vm"), parameters.optional_text("reason") or ""
        mode = parameters.choice("mode", abi.Mode)
        lifted = parameters.flag("release")
        if (mode is None) != lifted:
            raise VgwError("the request has no mode")
        by = parameters.who().text()
        with self._changing():
            changed = self._host.set_mode(vm, mode, reason, by)
            if mode is None:
                mode = self._host.manifest(vm).mode
            name = mode.name.lower()
            if changed:
                text = one_line(reason) or None
                self._log.add(control_record("mode", vm=vm, mode=name, user=by, message=text))
        return {"vm": vm, "mode": name}

    # --- what all have in common ----------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock for a change; its records are in the file when it is done."""
        with self._lock, self._health.changing():
            if self._finished:
                raise VgwError("the controller is stopping; try again when it is gone")
            try:
                self._go_back_if_due()
                self._policy.refresh()
                yield
            finally:
                if self._document is not None:
                    self._facts.follow(self._document)
                self._log.flush()

    def _go_back_if_due(self) -> None:
        """Go back from a policy that was not confirmed in time, whatever else is to be done."""
        try:
            if self._keeper.settle_overdue(this_process("controller")):
                self._alarms.clear("rollback_failed")
        except VgwError as error:
            self._alarms.set("rollback_failed", str(error))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time and the failures of a change of policy."""
        started = time.monotonic()
        failures = 0
        try:
            yield
        except VgwError as error:
            failures = len(error.failures) if isinstance(error, PartlyAppliedError) else 1
            raise
        finally:
            self._applies.record(time.monotonic() - started, failures)

    @contextlib.contextmanager
    def _taking_part(self, event: str) -> Iterator[None]:
        """Remember what a verb did for some VMs when it fails for others."""
        try:
            yield
        except PartlyAppliedError as error:
            self._take(event, results_of(error))
            for vm, text in error.failures.items():
                self._complain(text, vm)
            raise

    def _alarm_of_kept(self, results: Iterable[AttachResult]) -> None:
        """Raise or end the alarms about VMs that the policy does not name any more."""
        for result in results:
            if result.kept:
                text = "not in the policy any more; keeps its last one, `vgw detach` ends that"
                self._alarms.set("vm_not_in_policy", text, vm=result.vm)
            else:
                self._alarms.clear("vm_not_in_policy", vm=result.vm)

    def _take(self, event: str, results: Sequence[AttachResult]) -> None:
        """Remember what a verb did for VMs."""
        self._alarm_of_kept(results)
        for result in results:
            if result.changed:
                self._record(event, result)
            self._note_protected(result)
            self._failures.pop(result.vm, None)
        self._say_names(())

    def _record(self, event: str, result: AttachResult) -> None:
        self._log.add(
            control_record(
                event,
                vm=result.vm,
                interface=result.interfaces[0] if len(result.interfaces) == 1 else None,
                generation=result.generation,
                duration_ms=round(result.seconds * 1000),
            )
        )

    def _complain(self, message: str, vm: str | None = None) -> None:
        """Say what went wrong where there is nobody to raise it to."""
        _logger.error("%s%s", "" if vm is None else f"{vm}: ", message)
        self._log.add(control_record("error", vm=vm, message=message))
