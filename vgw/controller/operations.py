# SPDX-License-Identifier: Apache-2.0
"""What the controller does with its host: by the verbs of its socket, and by itself.

One policy document is the current one: that of the last reload or apply. Changes are made one at
a time, each is in the log of events, and what failed by itself is tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from vgw import __version__, abi
from vgw.controller.alarms import Alarms
from vgw.controller.api import Verb
from vgw.controller.conntrack import list_flows
from vgw.controller.events import LogWriter, control_record
from vgw.controller.facts import Facts
from vgw.controller.finding.told import told_vm
from vgw.controller.inventory import read_document, read_host_document, wants
from vgw.controller.metrics import ApplyTimes
from vgw.controller.parameters import Parameters
from vgw.controller.reconcile import AttachResult, Host
from vgw.controller.vms_report import Memory, vms_report
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import Hook, PolicyDocument

_logger = logging.getLogger(__name__)


class Operations:
    """Everything by which this process changes the host; may be used from several threads."""

    def __init__(
        self,
        host: Host,
        log: LogWriter,
        applies: ApplyTimes,
        alarms: Alarms | None = None,
        facts: Facts | None = None,
    ) -> None:
        """Work on a host; `log` gets a record of each change, `applies` its duration.

        `facts` are what is known of VMs beyond the files.
        """
        self._host = host
        self._log = log
        self._alarms = Alarms(log) if alarms is None else alarms
        self._facts = facts or Facts(host.paths, log, self._alarms)
        self._applies = applies
        self._lock = threading.RLock()
        self._finished = False
        self._document: PolicyDocument | None = None
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
            "status": self._status,
            "rules": lambda parameters: self._host.rules(parameters.text("vm")),
            "conntrack": lambda parameters: list_flows(self._host, parameters.text("vm")),
            "flush": self._flush,
            "mode": self._set_mode,
            "vms": self._vms,
            "wants": self._wants,
        }

    # --- what happens by itself -----------------------------------------------------------

    def reload(self) -> None:
        """Read the policy and bring the host to it.

        A policy that is missing or invalid changes nothing: what is in force stays, and the log
        says why.
        """
        with self._changing():
            self._sweep()
            try:
                document = read_document(self._host.paths)
            except VgwError as error:
                self._applies.record(0.0, failures=1)
                self._complain(f"{error}; what is in force stays in force")
                return
            self._document = document
            self._facts.follow(document)
            self._settle_facts()
            self._protected.clear()
            self._protect(self._present_vms().union(self._host.attached()))

    def facts_changed(self) -> None:
        """Bring those VMs up to date that something found or leased since concerns."""
        with self._changing():
            there = self._present_vms().union(self._host.attached())
            self._protect(self._settle_facts().intersection(there))

    def _settle_facts(self) -> set[str]:
        try:
            return self._facts.settle(self._document or PolicyDocument(), self._host.attached())
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
            if self._sweep_failure is not None:
                self._sweep()
            if self._failures:
                there = self._present_vms().union(self._host.attached())
                self._protect(there.intersection(self._failures))

    def finish(self) -> None:
        """Wait for the change under way and refuse others: the process is about to end."""
        with self._lock:
            self._finished = True

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

    def _protect(self, names: Iterable[str]) -> None:
        """Attach VMs, or bring them up to date; failures are logged and remembered."""
        before = set(self._host.attached())
        # Without a policy what is in force stays; where nothing is, the defaults protect.
        vms = sorted(names if self._document is not None else set(names).difference(before))
        if not vms:
            return
        started = time.monotonic()
        results, failures = self._attach_all(self._document or PolicyDocument(), vms)
        self._applies.record(time.monotonic() - started, len(failures))
        for result in results:
            if result.vm not in before:
                self._record("attach", result)
            elif result.changed:
                self._record("apply", result)
            self._note_protected(result)
        known = {vm: self._failures.pop(vm, None) for vm in vms}
        self._failures.update(failures)
        for vm, text in failures.items():
            if known.get(vm) != text:
                self._complain(text, vm)

    def _attach_all(
        self, document: PolicyDocument, vms: Sequence[str]
    ) -> tuple[Sequence[AttachResult], dict[str, str]]:
        """Return what became of the VMs that are protected now, and why others are not."""
        try:
            return self._host.attach_many(document, vms).vms, {}
        except PartlyAppliedError as error:
            return _results(error), error.failures
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
        alarms = [alarm for alarm in self._alarms.current() if vm in (None, alarm.vm)]
        return {**self._host.status(vm), "alarms": [alarm.report() for alarm in alarms]}

    def _vms(self, _: Parameters) -> dict[str, object]:
        with self._lock:
            written = self._document or PolicyDocument()
            document = self._facts.overlay.laid(written)
            found = self._facts.search.found(written.inventory.find)
            memory = Memory(dict(self._failures), dict(self._facts.learner.refused))
        return vms_report(self._host.paths, document, found, self._facts.search.problems, memory)

    def _wants(self, parameters: Parameters) -> dict[str, object]:
        # Without a policy in force the files say it, or that nobody can say it.
        document = self._document or read_host_document(self._host.paths)
        return {"wanted": wants(document, parameters.text("vm"))}

    def _attach(self, parameters: Parameters) -> dict[str, object]:
        sources = parameters.sources()
        document = None if sources is None else read_document(self._host.paths, sources)
        vms = parameters.texts("vms")
        told = told_vm(parameters)
        with self._changing(), self._timed():
            if told is not None:
                self._facts.search.tell(told)
            document = document or self._document
            if vms is not None:
                with self._taking_part("attach"):
                    many = self._host.attach_many(
                        document or PolicyDocument(), vms, force=parameters.flag("force")
                    )
                self._take("attach", many.vms)
                return dataclasses.asdict(many)
            one = self._host.attach(
                document,
                parameters.text("vm"),
                interfaces=parameters.texts("interfaces") or (),
                hook=parameters.choice("hook", Hook),
                force=parameters.flag("force"),
            )
            self._take("attach", [one])
        return dataclasses.asdict(one)

    def _apply(self, parameters: Parameters) -> dict[str, object]:
        sources = parameters.sources()
        if sources is None:
            raise VgwError("the request has no sources: the policy as [[name, text], ...]")
        dry_run = parameters.flag("dry_run")
        with self._changing(), self._timed():
            document = read_document(self._host.paths, sources)
            names = parameters.texts("vms")
            if dry_run:
                return dataclasses.asdict(self._host.apply(document, names, dry_run=True))
            with self._taking_part("apply"):
                try:
                    result = self._host.apply(document, names)
                except PartlyAppliedError:
                    self._document = document  # some VMs have it now, so it is this host's
                    raise
            self._document = document
            self._facts.follow(document)
            self._take("apply", result.vms)
        return dataclasses.asdict(result)

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

    def _flush(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.text("vm")
        with self._changing():
            entries = self._host.flush(vm)
            self._log.add(control_record("flush", vm=vm))
        return {"vm": vm, "entries": entries}

    def _set_mode(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.text("vm")
        mode = parameters.choice("mode", abi.Mode)
        if mode is None:
            raise VgwError("the request has no mode")
        with self._changing():
            if self._host.set_mode(vm, mode):
                self._log.add(control_record("mode", vm=vm, mode=mode.name.lower()))
        return {"vm": vm, "mode": mode.name.lower()}

    # --- what all have in common ----------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock for a change; its records are in the file when it is done."""
        with self._lock:
            if self._finished:
                raise VgwError("the controller is stopping; try again when it is gone")
            try:
                yield
            finally:
                self._log.flush()

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
            self._take(event, _results(error))
            for vm, text in error.failures.items():
                self._complain(text, vm)
            raise

    def _take(self, event: str, results: Iterable[AttachResult]) -> None:
        """Remember what a verb did for VMs."""
        for result in results:
            if result.changed:
                self._record(event, result)
            self._note_protected(result)
            self._failures.pop(result.vm, None)

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


def _results(error: PartlyAppliedError) -> list[AttachResult]:
    """Return what became of the VMs that did not fail."""
    return [AttachResult(**fields) for fields in error.done]
