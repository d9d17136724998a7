# SPDX-License-Identifier: Apache-2.0
"""What the controller does when it is asked to: the verbs of its socket."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from vgw import __version__, abi
from vgw.controller.actor import one_line
from vgw.controller.api import Verb
from vgw.controller.changes import Changes
from vgw.controller.conntrack import list_flows
from vgw.controller.events import control_record
from vgw.controller.finding.told import told_vm
from vgw.controller.inventory import read_document, read_host_document, wants
from vgw.controller.parameters import Parameters
from vgw.controller.policy_keeper import ApplyOrder
from vgw.controller.reconcile import ApplyResult
from vgw.controller.samples import sample, talkers
from vgw.controller.vms_report import Memory, vms_report
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import Hook, PolicyDocument


class Verbs:
    """What is asked of one host; may be used from several threads."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._host = changes.host
        self._log = changes.log
        self._alarms = changes.alarms
        self._facts = changes.facts
        self._keeper = changes.keeper
        self._policy = changes.policy

    def by_name(self) -> dict[str, Verb]:
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

    def _ping(self, _: Parameters) -> dict[str, object]:
        return {"pid": os.getpid(), "version": __version__, "abi": abi.ABI_VERSION}

    def _status(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.optional_text("vm")
        return {
            **self._host.status(vm),
            "host_policy": self._keeper.report(),
            "alarms": self._alarm_reports(vm),
            "health": self._changes.health.report(),
        }

    def _alarm_reports(self, vm: str | None) -> list[dict[str, object]]:
        """Return the alarms that stand, None: of all VMs and of the host."""
        alarms = self._alarms.current()
        return [alarm.report() for alarm in alarms if vm in (None, alarm.vm)]

    def _vms(self, _: Parameters) -> dict[str, object]:
        with self._changes.lock:
            written = self._policy.document or PolicyDocument()
            document = self._facts.overlay.laid(written)
            found = self._facts.search.found(written.inventory.find)
            memory = Memory(dict(self._changes.failures), dict(self._facts.learner.refused))
        return vms_report(self._host.paths, document, found, self._facts.search.problems, memory)

    def _wants(self, parameters: Parameters) -> dict[str, object]:
        # Without a policy in force the files say it, or that nobody can say it.
        document = self._policy.document or read_host_document(
            self._host.paths, self._keeper.source.read
        )
        return {"wanted": wants(document, parameters.text("vm"))}

    def _attach(self, parameters: Parameters) -> dict[str, object]:
        sources, force = parameters.sources(), parameters.flag("force")
        given = None if sources is None else read_document(self._host.paths, sources)
        vms = parameters.texts("vms")
        told = told_vm(parameters)
        with self._changes.one(), self._changes.timed():
            if told is not None:
                self._facts.search.tell(told)
            document = given or self._policy.document
            if given is not None and sources is not None:
                held = self._keeper.held(given) if parameters.flag("own") else None
                document = self._policy.document if held is not None else given
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

            with self._changes.taking_part("attach"):
                if given is None or sources is None or document is not given:
                    result = work()
                else:
                    who = parameters.who()
                    result = self._keeper.record_attach(sources, given, who, asked, work)
            self._policy.refresh()
            self._changes.take("attach", result.vms)
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
        with self._changes.one(), self._changes.timed():
            document = read_document(self._host.paths, sources)
            if parameters.flag("dry_run"):
                return dataclasses.asdict(self._host.apply(document, order.vms, dry_run=True))
            with self._changes.taking_part("apply"):
                try:
                    result = self._keeper.apply(sources, document, parameters.who(), order)
                except PartlyAppliedError as error:
                    if error.done:  # some VMs have it now, so it is this host's
                        self._policy.document = document
                    raise
            self._policy.document = document
            self._alarms.clear("rollback_failed")
            self._changes.take("apply", result.vms)
        return dataclasses.asdict(result)

    def _rollback(self, parameters: Parameters) -> dict[str, object]:
        with self._changes.one(), self._changes.timed(), self._changes.taking_part("apply"):
            entry, result = self._keeper.rollback(
                parameters.optional_number("number"), parameters.who()
            )
            self._policy.refresh()
            self._alarms.clear("rollback_failed")
            self._changes.take("apply", result.vms)
        return {"policy": entry.number, "back": entry.back, **dataclasses.asdict(result)}

    def _confirm(self, parameters: Parameters) -> dict[str, object]:
        with self._changes.one():
            return {"policy": self._keeper.confirm(parameters.who())}

    def _settle(self, parameters: Parameters) -> dict[str, object]:
        with self._changes.one():
            done = self._keeper.settle_overdue(parameters.who())
        return {"rolled_back": done}

    def _detach(self, parameters: Parameters) -> dict[str, object]:
        with self._changes.one():
            try:
                if parameters.flag("all"):
                    detached = self._host.detach_all()
                else:
                    detached = [parameters.text("vm")]
                    self._host.detach(detached[0])
            except PartlyAppliedError as error:
                self._forget(str(row["vm"]) for row in error.done)
                raise
            self._forget(detached)
        return {"detached": detached}

    def _forget(self, detached: Iterable[str]) -> None:
        """Note that VMs are not protected any more."""
        for vm in detached:
            self._changes.failures.pop(vm, None)
            self._alarms.forget(vm)
            self._log.add(control_record("detach", vm=vm))

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
        with self._changes.one():
            filled = put_piece(self._host, piece)
            if piece.last:
                self._log.add(control_record("import", vm=piece.vm, sequence=piece.sequence))
        return filled

    def _flush(self, parameters: Parameters) -> dict[str, object]:
        vm = parameters.text("vm")
        with self._changes.one():
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
        with self._changes.one():
            changed = self._host.set_mode(vm, mode, reason, by)
            if mode is None:
                mode = self._host.manifest(vm).mode
            name = mode.name.lower()
            if changed:
                text = one_line(reason) or None
                self._log.add(control_record("mode", vm=vm, mode=name, user=by, message=text))
        return {"vm": vm, "mode": name}
