# SPDX-License-Identifier: Apache-2.0
"""Changes of the host's policy that can be taken back: apply, confirm, roll back, all in a history.

Each change is made under the host's writer lock, as a whole: the entry of the history, the window
for confirming, the VMs. A process that is killed on the way leaves an entry without an outcome; if
it had a window, whoever comes next goes back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgw.controller.actor import Actor
from vgw.controller.admission import require_admission
from vgw.controller.batch import ApplyResult
from vgw.controller.confirming import LATE, Confirming
from vgw.controller.events import LogWriter, Record
from vgw.controller.guardian import start_guardian
from vgw.controller.history import ARMED, Entry, History
from vgw.controller.inventory import read_document
from vgw.controller.last_inventory import keep_inventory
from vgw.controller.policy_source import SourceReader
from vgw.controller.reconcile import Host
from vgw.controller.recording import Work, completed, recorded, recorded_if_possible
from vgw.controller.window import Window, save_window
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import Sources


@dataclass(frozen=True, slots=True)
class ApplyOrder:
    """How a policy is applied besides what it says.

    `vms` None: to all attached ones. `force`: whatever its host and revision. `confirm_seconds`: go
    back unless it is confirmed in time. `supersede`: even if another one waits to be confirmed; it
    is gone back to the one before both then.
    """

    vms: Sequence[str] | None = None
    force: bool = False
    confirm_seconds: float | None = None
    supersede: bool = False


def logging_to(file: Path) -> Callable[[Record], None]:
    """Return what appends records to the log of events, for a process that has it not open.

    Records are told, not kept: one that cannot be written is forgotten.
    """

    def add(record: Record) -> None:
        with contextlib.suppress(VgwError, OSError):
            log = LogWriter(file)
            log.add(record)
            log.close()

    return add


def holds(current: Entry, digest: str, *, at_start: bool) -> bool:
    """Tell whether a policy stays in force before a file whose texts have a digest."""
    is_unchanged = current.is_held and current.source == digest
    return is_unchanged and (at_start or current.event == "rollback")


class PolicyKeeper:
    """Changes the policy of a host and remembers how it was; for use from several threads."""

    def __init__(
        self, host: Host, log: Callable[[Record], None], source: SourceReader | None = None
    ) -> None:
        """Work on a host; `log` gets a record of what befalls a window, `source` reads its file."""
        self._host = host
        self._paths = host.paths
        self.source = source or SourceReader(host.paths.policy, quiet=0.0)
        self.history = History(host.paths)
        self._confirming = Confirming(host, self.history, log, self._draft)

    def apply(
        self, sources: Sources, document: PolicyDocument, who: Actor, order: ApplyOrder
    ) -> ApplyResult:
        """Apply a policy to attached VMs; it is the host's from now on.

        Raises what Host.apply raises, NotAdmittedError, and VgwError when another policy waits to
        be confirmed or when nothing could be gone back to. Nothing is changed then, unless it is
        PartlyAppliedError: a window stays open, for some VMs have the policy.
        """
        with self._host.locked():
            waiting = self._confirming.waiting()
            if waiting is not None and not order.supersede:
                raise VgwError(
                    f"policy {waiting.number} waits to be confirmed; `vgw confirm` or `vgw "
                    "rollback` first, or use --supersede"
                )
            current = self.history.current()
            self._admit(document, current, force=order.force)
            keep_inventory(self._paths, document)
            draft = self._draft("apply", sources, document, who)
            if order.confirm_seconds is not None:
                return self._apply_armed(draft, sources, document, order, waiting)
            work = functools.partial(self._host.apply, document, order.vms)
            with self._closing(waiting, "superseded"):
                return recorded(self.history, draft, sources, work)

    def admit(self, document: PolicyDocument, *, force: bool = False) -> None:
        """Raise NotAdmittedError when a policy is for another host, or older than the current."""
        self._admit(document, self.history.current(), force=force)

    def held(self, document: PolicyDocument) -> Entry | None:
        """Return what was rolled back to and holds before a policy file, None: nothing does."""
        current = self.history.current()
        if current is None or not holds(current, document.digest, at_start=False):
            return None
        return current

    def record_attach(
        self, sources: Sources, document: PolicyDocument, who: Actor, vms: Sequence[str], work: Work
    ) -> ApplyResult:
        """Attach VMs by `work` under a policy, and remember the policy if it is another one.

        It becomes the host's when the host has none, and when no other VM is attached.
        """
        with self._host.locked():
            keep_inventory(self._paths, document)
            current, newest = self.history.current(), self.history.find(lambda _: True)
            if current is not None and current.digest == document.digest:
                return work()
            if newest is not None and newest.digest == document.digest and newest.vms is not None:
                result = work()
                self.history.save(
                    dataclasses.replace(newest, vms=tuple(dict.fromkeys([*newest.vms, *vms])))
                )
                return result
            draft = self._draft("attach", sources, document, who)
            if current is not None and set(self._host.attached()).difference(vms):
                draft = dataclasses.replace(draft, vms=tuple(vms))
            return recorded(self.history, draft, sources, work)

    def record_reload(
        self, event: str, sources: Sources, document: PolicyDocument, who: Actor, work: Work
    ) -> ApplyResult:
        """Bring the VMs to this host's policy file by `work`, and remember it if it is new.

        `event` says why: start or reload. A history that cannot be written stops nothing.
        """
        names = tuple(name for name, _ in sources)
        draft = Entry(
            event, document.digest, names, who, document.digest, revision=document.revision
        )
        with self._host.locked():
            keep_inventory(self._paths, document)
            return recorded_if_possible(self.history, draft, sources, work)

    def rollback(self, number: int | None, who: Actor) -> tuple[Entry, ApplyResult]:
        """Apply an earlier policy (None: the one before) to all attached VMs.

        A policy that waits to be confirmed is settled by that. Raises VgwError when the number is
        not known or its policy damaged, and what Host.apply raises.
        """
        with self._host.locked():
            waiting = self._confirming.waiting()
            if number is None and waiting is not None:
                return self._confirming.go_back(waiting, who, "by order")
            target = self.history.before() if number is None else self.history.get(number)
            sources = self.history.sources(target)
            document = read_document(self._paths, sources)
            draft = self._draft("rollback", sources, document, who)
            draft = dataclasses.replace(draft, back=target.number)
            work = functools.partial(self._host.apply, document)
            keep_inventory(self._paths, document)
            with self._closing(waiting, "rolled_back"):
                result = recorded(self.history, draft, sources, work)
            entry = self.history.current() or draft
            self._confirming.tell("rolled_back", who, policy=entry.number, back=target.number)
            return entry, result

    def confirm(self, who: Actor) -> int:
        """Keep the policy that waits, and return its number. Raises VgwError: none does; late."""
        with self._host.locked():
            return self._confirming.confirm(who)

    def report(self) -> dict[str, Any] | None:
        """Return what `status` says of the host's policy, as JSON; None when it is not known."""
        current, waiting = self.history.current(), self._confirming.waiting()
        if current is None:
            return None
        left = None if waiting is None else round(waiting.remaining_seconds(), 3)
        return {
            "number": current.number,
            "event": current.event,
            "time": current.time,
            "by": current.who.text(),
            "digest": current.digest,
            "revision": current.revision,
            "file": str(self._paths.policy),
            "held": current.is_held,
            "confirm_seconds": left,
            "confirm_back": None if waiting is None else waiting.back,
        }

    def waiting(self) -> Window | None:
        """Return the window of the policy that waits to be confirmed; None when none does."""
        return self._confirming.waiting()

    def settle_overdue(self, who: Actor) -> bool:
        """Go back if a policy was not confirmed in time; tell whether that was to be done.

        Raises VgwError when it could not be done, and it is to be tried again unless that can never
        succeed.
        """
        if not _is_overdue(self._confirming.waiting()):
            return False
        with self._host.locked():
            waiting = self._confirming.waiting()
            if waiting is None or not _is_overdue(waiting):
                return False
            self._confirming.go_back(waiting, who, LATE)
        return True

    # --- how ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _closing(self, waiting: Window | None, confirm: str) -> Iterator[None]:
        """End the wait of a policy when another one has taken its place, if only in some VMs."""
        try:
            yield
        except PartlyAppliedError as error:
            if waiting is not None and error.done:
                self._confirming.close(waiting, confirm)
            raise
        if waiting is not None:
            self._confirming.close(waiting, confirm)

    def _admit(self, document: PolicyDocument, current: Entry | None, *, force: bool) -> None:
        if not force:
            require_admission(document, None if current is None else current.revision)

    def _draft(self, event: str, sources: Sources, document: PolicyDocument, who: Actor) -> Entry:
        source = self.source.digest()
        if source is None:
            current = self.history.current()
            source = None if current is None else current.source
        names = tuple(name for name, _ in sources)
        return Entry(event, document.digest, names, who, source, revision=document.revision)

    def _apply_armed(
        self,
        draft: Entry,
        sources: Sources,
        document: PolicyDocument,
        order: ApplyOrder,
        waiting: Window | None,
    ) -> ApplyResult:
        """Apply a policy with a window; `waiting` is that of a policy which it supersedes."""
        current = self.history.current()
        if current is None:
            raise VgwError(
                "there is no policy to go back to yet; apply one without --confirm-within first"
            )
        back = current.number if waiting is None else waiting.back
        others = self._confirming.others(current) if waiting is None else waiting.others
        self.history.sources(self.history.get(back))
        identity = uuid.uuid4().hex
        draft = dataclasses.replace(draft, window=identity, confirm=ARMED, back=back)
        entry = self.history.begin(draft, sources, [back])
        window = Window(identity, entry.number, back, order.confirm_seconds or 0.0, others=others)
        try:
            save_window(self._paths, window.beginning_now())
            start_guardian(self._paths, identity)
            work = functools.partial(self._host.apply, document, order.vms)
            result = completed(self.history, entry, work)
        except VgwError as error:
            if isinstance(error, PartlyAppliedError) and error.done:
                self._confirming.arm(window, draft.who)
            else:
                self.history.withdraw(entry)
                self._confirming.restore(waiting)
            raise
        self._confirming.arm(window, draft.who)
        return result


def _is_overdue(waiting: Window | None) -> bool:
    return waiting is not None and waiting.remaining_seconds() <= 0
