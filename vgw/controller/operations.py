# SPDX-License-Identifier: Apache-2.0
"""What the controller does with its host by itself.

One policy document is the current one: that of the last reload or apply. What failed is tried
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from vgw.controller.actor import this_process
from vgw.controller.changes import Changes
from vgw.controller.events import control_record
from vgw.controller.host_policy import Loaded
from vgw.controller.inspection import Inspector, Outcome
from vgw.controller.pinned import is_gone
from vgw.controller.policy_source import Texts
from vgw.controller.reconcile import ApplyResult, AttachResult
from vgw.controller.recording import Work, results_of
from vgw.controller.restore import Suspect
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import PolicyDocument


class Operations:
    """What is done without being asked; may be used from several threads."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._host = changes.host
        self._log = changes.log
        self._applies = changes.applies
        self._alarms = changes.alarms
        self._facts = changes.facts
        self._keeper = changes.keeper
        self._policy = changes.policy
        #: Called when interfaces have other names than before.
        self.on_rename: Callable[[], None] = lambda: None
        self._inspector = Inspector(changes.host, changes.alarms, changes.log)
        #: Whether all endpoints were looked at for a name that the policy does not use.
        self._names_known = False
        self._reload_lock = threading.Lock()
        #: Why endpoints whose interface is gone could not be forgotten.
        self._sweep_failure: str | None = None

    def reload(self, event: str = "reload") -> None:
        """Read the policy and bring the host to it; `event` says why it is read.

        A policy that is missing, invalid or not for this host changes nothing: what is in force
        stays, VMs that come get the last good one, and an alarm says why.
        """
        with self._reload_lock:  # what was read first is not put in force last
            texts = self._policy.read_file()  # which may take a while, and nobody waits for it
            self._reload(event, texts)

    def _reload(self, event: str, texts: Texts | VgwError) -> None:
        with self._changes.one():
            self._follow_renames()
            self._sweep()
            self._upgrade()
            found = self._policy.load(event, texts)
            self._tell_of_the_file()
            if self._policy.document is None:
                return
            self._settle_facts()
            self._changes.protected.clear()
            present, attached = self._present_vms(), self._host.attached()
            if found.everywhere:
                self._protect(present.union(attached), self._remembering(event, found))
            else:
                self._protect(present.difference(attached))

    def look_after_policy(self) -> None:
        """Do what has become due: go back from a policy, read a file that may be back."""
        with self._changes.one():
            due = self._policy.is_put_off and self._keeper.waiting() is None
        if due or self._policy.may_be_back():
            self.reload()

    def _upgrade(self) -> None:
        """Bring what an older or newer version left attached to this one."""
        try:
            upgrades = self._host.upgrade()
        except VgwError as error:
            self._changes.complain(f"nothing was upgraded: {error}")
            return
        for done in upgrades.done:
            self._log.add(control_record("upgrade", **dataclasses.asdict(done)))
        for vm, text in upgrades.failures.items():
            self._changes.complain(text, vm)

    def facts_changed(self) -> None:
        """Bring those VMs up to date that something found or leased since concerns."""
        with self._changes.one():
            there = self._present_vms().union(self._host.attached())
            self._protect(self._settle_facts().intersection(there))

    def _settle_facts(self) -> set[str]:
        document = self._policy.document or PolicyDocument()
        self._facts.follow(document)
        try:
            return self._facts.settle(document, self._host.attached())
        except VgwError as error:  # of the state directory: the next lease tries it again
            self._changes.complain(str(error))
            return set()

    def links_changed(self, came: Mapping[str, int], gone: Iterable[str]) -> None:
        """Protect VMs whose interfaces came (name: index), forget those whose went."""
        with self._changes.one():
            lost = list(gone)
            for name in lost:
                self._changes.protected.pop(name, None)
            if lost:
                self._follow_renames()
                self._sweep()
                self._facts.search.forget(lost)
            if came:
                self._facts.search.look()
                owners = self._owners()
                fresh = (
                    name
                    for name, index in came.items()
                    if self._changes.protected.get(name) != index
                )
                self._protect({owners[name] for name in fresh if name in owners})

    def idle(self) -> None:
        """Free dead flows, and try again what failed: to protect VMs, to forget endpoints."""
        with self._changes.one():
            with contextlib.suppress(VgwError):  # it will be tried again, and nothing depends on it
                self._host.expire()
            self._inspector.end_alarms()
            self._changes.say_names([] if self._names_known else self._host.attached())
            self._names_known = True
            if self._sweep_failure is not None:
                self._sweep()
            if self._changes.failures:
                there = self._present_vms().union(self._host.attached())
                self._protect(there.intersection(self._changes.failures))

    def inspect(self, suspects: Sequence[Suspect]) -> list[Suspect]:
        """Look at endpoints that somebody may have taken apart; return those that stay so.

        What was taken off is put back; an endpoint of which too little is left is made anew.
        """
        with self._changes.one():
            outcomes = {suspect: self._inspector.inspect(suspect) for suspect in suspects}
            anew = [each for each in suspects if outcomes[each] is Outcome.MAKE_ANEW]
            if anew:
                self._protect({suspect.vm for suspect in anew})
            wrong = [each for each in anew if not self._inspector.made_anew(each)]
            if any(is_gone(self._host.paths, each.vm, each.interface) for each in suspects):
                self._sweep()
        return wrong + [each for each in suspects if outcomes[each] is Outcome.WRONG]

    def _follow_renames(self) -> None:
        """Call endpoints as their interfaces are called now."""
        try:
            renamed = self._host.follow_renames()
        except VgwError as error:
            self._changes.complain(str(error))
            return
        for each in renamed:
            self._log.add(
                control_record("renamed", vm=each.vm, interface=each.new, before=each.old)
            )
        if renamed:
            self.on_rename()
        self._changes.say_names(each.vm for each in renamed)

    def _owners(self) -> dict[str, str]:
        """Return which VM each interface belongs to, by the current policy or by an order."""
        document = self._facts.overlay.laid(self._policy.document or PolicyDocument())
        vms = document.vms.values()
        listed = {each.name: vm.name for vm in vms for each in vm.interfaces if each.name}
        return self._host.ordered_interfaces() | listed

    def _present_vms(self) -> set[str]:
        """Return the VMs that have an interface on this host now."""
        present = {name for _, name in socket.if_nameindex()}
        return {vm for name, vm in self._owners().items() if name in present}

    def _tell_of_the_file(self) -> None:
        """Raise or end the alarm about the policy's file."""
        problem = self._policy.problem
        if problem is None:
            self._alarms.clear("policy_unreadable")
            return
        text = f"{problem}; what is in force stays in force"
        if text not in {alarm.text for alarm in self._alarms.current()}:
            self._applies.record(0.0, failures=1)
            self._changes.complain(text)
        self._alarms.set("policy_unreadable", text)

    def _remembering(self, event: str, found: Loaded) -> Callable[[Work], ApplyResult] | None:
        """Return what makes a change and remembers the policy of the file, None: it is known."""
        document, sources = self._policy.document, found.sources
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
        vms = sorted(names if self._policy.document is not None else set(names).difference(before))
        if not vms:
            if remembering is not None:
                remembering(ApplyResult)
            return
        started = time.monotonic()
        document = self._policy.document or PolicyDocument()
        results, failures = self._attach_all(document, vms, remembering)
        self._applies.record(time.monotonic() - started, len(failures))
        for result in results:
            if result.vm not in before:
                self._changes.record("attach", result)
            elif result.changed:
                self._changes.record("apply", result)
            self._changes.note_protected(result)
        self._changes.alarm_of_kept(results)
        known = {vm: self._changes.failures.pop(vm, None) for vm in vms}
        self._changes.failures.update(failures)
        for vm, text in failures.items():
            if known.get(vm) != text:
                self._changes.complain(text, vm)

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

        def tell(vm: str, interface: str) -> None:
            self._log.add(control_record("detach", vm=vm, interface=interface))

        try:
            self._host.sweep(tell)
        except VgwError as error:
            if self._sweep_failure != str(error):
                self._sweep_failure = str(error)
                self._changes.complain(str(error))
            return
        self._sweep_failure = None
