# SPDX-License-Identifier: Apache-2.0
"""A policy that waits to be confirmed: confirm it, or go back to the one before, exactly once.

Going back can be done by the command, the controller or the guardian, and is begun again by the
next of them when one is killed on the way: the entry that it makes in the history is found by the
window's id. Everything here is done under the host's writer lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from vgw.controller.actor import Actor
from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.events import Record, control_record
from vgw.controller.history import ARMED, Entry, History
from vgw.controller.last_inventory import last_document
from vgw.controller.manifest import load_manifest
from vgw.controller.reconcile import Host
from vgw.controller.recording import finish, results_of
from vgw.controller.window import ATTEMPTS, Window, load_window, remove_window, save_window
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import Sources

LATE = "not confirmed in time"

#: Makes an entry of an event for a policy: sources, document, who.
Drafter = Callable[[str, Sources, PolicyDocument, Actor], Entry]


class Confirming:
    """The window of a host."""

    def __init__(
        self, host: Host, history: History, log: Callable[[Record], None], draft: Drafter
    ) -> None:
        """Work on a host; `log` gets a record of what befalls a window, `draft` makes entries."""
        self._host = host
        self._paths = host.paths
        self._history = history
        self._log = log
        self._draft = draft

    def waiting(self) -> Window | None:
        """Return the window of the policy that waits to be confirmed; None when none does."""
        window = load_window(self._paths)
        entry = self._history.find(lambda each: each.confirm == ARMED)
        if entry is None:
            # An entry that is damaged cannot say whether it was confirmed.
            lost = window is not None and self._history.entry(window.number) is None
            return window if lost else None
        if window is not None and window.id == entry.window:
            return window
        return Window(entry.window or "", entry.number, entry.back or 0, 0.0)

    def others(self, current: Entry) -> dict[str, str]:
        """Return the policies of VMs that have another one than the host's, by VM."""
        manifests = (load_manifest(self._paths.manifest(vm)) for vm in self._host.attached())
        return {
            found.vm: found.policy
            for found in manifests
            if found is not None and found.named and found.policy != current.digest
        }

    def confirm(self, who: Actor) -> int:
        """Keep the policy that waits, and return its number. Raises VgwError: none does; late."""
        window = self.waiting()
        if window is None:
            raise VgwError("no policy waits to be confirmed; see `vgw history`")
        if window.remaining_seconds() <= 0:
            self.go_back(window, who, LATE)
            raise VgwError(
                f"too late: policy {window.number} was not confirmed in time, and {window.back} is "
                "in force again; apply it anew"
            )
        self.close(window, "confirmed")
        self.tell("confirmed", who, policy=window.number)
        return window.number

    def go_back(self, window: Window, who: Actor, why: str) -> tuple[Entry, ApplyResult]:
        """Go back from a policy that waits; where that was begun before, it is finished.

        Raises VgwError when it cannot be done, and the window stays unless it never can be. When it
        fails for some VMs it raises PartlyAppliedError, up to a number of attempts.
        """
        try:
            target = self._history.get(window.back)
            sources = self._history.sources(target)
            document = last_document(self._paths, sources)
        except VgwError as error:
            self._give_up(window, who, error)
        entry = self._history.find(lambda each: _undoes(each, window))
        if entry is None:
            draft = self._draft("rollback", sources, document, who)
            draft = dataclasses.replace(draft, back=target.number, window=window.id)
            entry = self._history.begin(draft, sources, [target.number, window.number])
        results, failures = self._bring_back(document, window.others)
        finish(self._history, entry, results, failures)
        if failures and window.attempts + 1 < ATTEMPTS:
            save_window(self._paths, dataclasses.replace(window, attempts=window.attempts + 1))
            raise PartlyAppliedError(failures, [dataclasses.asdict(each) for each in results])
        self.tell(
            "rolled_back",
            who,
            policy=entry.number,
            undone=window.number,
            back=target.number,
            message=why,
            failed=len(failures) or None,
        )
        self.close(window, "rolled_back")
        return entry, ApplyResult(results)

    def arm(self, window: Window, who: Actor) -> None:
        """Begin the time of a window, now that its policy is in force; it is the only one."""
        save_window(self._paths, window.beginning_now())
        self._supersede_all_but(window.number)
        self.tell("armed", who, policy=window.number, back=window.back, seconds=window.seconds)

    def restore(self, window: Window | None) -> None:
        """Have the record as it was before a policy that was not applied after all."""
        if window is None:
            remove_window(self._paths)
        else:
            save_window(self._paths, window)

    def close(self, window: Window, confirm: str) -> None:
        """Say in the history what became of a policy that waited, and end its window."""
        self._supersede_all_but(window.number)
        entry = self._history.entry(window.number)
        if entry is not None:
            self._history.save(dataclasses.replace(entry, confirm=confirm))
        remove_window(self._paths)

    def tell(self, event: str, who: Actor, **fields: Any) -> None:
        """Put a record in the log of events."""
        self._log(control_record(event, user=who.text(), via=who.via, **fields))

    def _give_up(self, window: Window, who: Actor, error: VgwError) -> NoReturn:
        text = f"policy {window.number} was not confirmed and stays in force: {error}"
        self.tell("rollback_failed", who, policy=window.number, message=text)
        self.close(window, "failed")
        raise VgwError(text) from error

    def _supersede_all_but(self, number: int) -> None:
        for entry in self._history.entries():
            if entry.confirm == ARMED and entry.number != number:
                self._history.save(dataclasses.replace(entry, confirm="superseded"))

    def _bring_back(
        self, document: PolicyDocument, others: Mapping[str, str]
    ) -> tuple[list[AttachResult], dict[str, str]]:
        """Give every attached VM the policy that it had; return what became of them."""
        by_digest: dict[str, list[str]] = {}
        for vm in self._host.attached():
            by_digest.setdefault(others.get(vm, document.digest), []).append(vm)
        results: list[AttachResult] = []
        failures: dict[str, str] = {}
        for digest, vms in by_digest.items():
            done, failed = self._apply(self._document(digest, document), vms)
            results += done
            failures |= failed
        return results, failures

    def _document(self, digest: str, otherwise: PolicyDocument) -> PolicyDocument:
        """Return a policy by its digest; another one when it is lost."""
        texts = None if digest == otherwise.digest else self._history.documents.texts(digest)
        if texts is not None:
            with contextlib.suppress(VgwError):
                return last_document(self._paths, [("", text) for text in texts])
        return otherwise

    def _apply(
        self, document: PolicyDocument, vms: Sequence[str]
    ) -> tuple[Sequence[AttachResult], Mapping[str, str]]:
        try:
            return self._host.apply(document, vms).vms, {}
        except PartlyAppliedError as error:
            return results_of(error), error.failures
        except VgwError as error:
            if len(vms) > 1:
                raise
            return (), dict.fromkeys(vms, str(error))


def _undoes(entry: Entry, window: Window) -> bool:
    return entry.event == "rollback" and entry.window == window.id
