# SPDX-License-Identifier: Apache-2.0
"""What all changes have in common that the controller makes of its host.

They are made one at a time, each is in the log of events, and what failed is remembered.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from vgw.controller.actor import this_process
from vgw.controller.alarms import Alarms
from vgw.controller.events import LogWriter, control_record
from vgw.controller.facts import Facts
from vgw.controller.health import Health
from vgw.controller.host_policy import HostPolicy
from vgw.controller.metrics import ApplyTimes
from vgw.controller.policy_keeper import PolicyKeeper
from vgw.controller.policy_source import SourceReader
from vgw.controller.reconcile import AttachResult, Host
from vgw.controller.recording import results_of
from vgw.controller.renames import say_renamed
from vgw.errors import PartlyAppliedError, VgwError

_logger = logging.getLogger(__name__)


class Changes:
    """The changes of one host; may be used from several threads."""

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
        self.host = host
        self.log = log
        self.applies = applies
        self.alarms = Alarms(log) if alarms is None else alarms
        self.health = Health() if health is None else health
        self.facts = facts or Facts(host.paths, log, self.alarms)
        self.keeper = PolicyKeeper(host, log.add, SourceReader(host.paths.policy))
        self.policy = HostPolicy(self.keeper, host.paths)
        self.lock = threading.RLock()
        #: Interface -> the index it had when it was protected; of these nothing is to be done.
        self.protected: dict[str, int] = {}
        #: VM -> why it could not be protected.
        self.failures: dict[str, str] = {}
        self._finished = False

    def finish(self) -> None:
        """Wait for the change under way and refuse others: the process is about to end."""
        with self.lock:
            self._finished = True

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Hold the lock for a change; its records are in the file when it is done."""
        with self.lock, self.health.changing():
            if self._finished:
                raise VgwError("the controller is stopping; try again when it is gone")
            try:
                self._go_back_if_due()
                self.policy.refresh()
                yield
            finally:
                if self.policy.document is not None:
                    self.facts.follow(self.policy.document)
                self.log.flush()

    def _go_back_if_due(self) -> None:
        """Go back from a policy that was not confirmed in time, whatever else is to be done."""
        try:
            if self.keeper.settle_overdue(this_process("controller")):
                self.alarms.clear("rollback_failed")
        except VgwError as error:
            self.alarms.set("rollback_failed", str(error))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time and the failures of a change of policy."""
        started = time.monotonic()
        failures = 0
        try:
            yield
        except VgwError as error:
            failures = len(error.failures) if isinstance(error, PartlyAppliedError) else 1
            raise
        finally:
            self.applies.record(time.monotonic() - started, failures)

    @contextlib.contextmanager
    def taking_part(self, event: str) -> Iterator[None]:
        """Remember what a verb did for some VMs when it fails for others."""
        try:
            yield
        except PartlyAppliedError as error:
            self.take(event, results_of(error))
            for vm, text in error.failures.items():
                self.complain(text, vm)
            raise

    def alarm_of_kept(self, results: Iterable[AttachResult]) -> None:
        """Raise or end the alarms about VMs that the policy does not name any more."""
        for result in results:
            if result.kept:
                text = "not in the policy any more; keeps its last one, `vgw detach` ends that"
                self.alarms.set("vm_not_in_policy", text, vm=result.vm)
            else:
                self.alarms.clear("vm_not_in_policy", vm=result.vm)

    def take(self, event: str, results: Sequence[AttachResult]) -> None:
        """Remember what a verb did for VMs."""
        self.alarm_of_kept(results)
        for result in results:
            if result.changed:
                self.record(event, result)
            self.note_protected(result)
            self.failures.pop(result.vm, None)
        self.say_names(())

    def record(self, event: str, result: AttachResult) -> None:
        """Log what became of a VM."""
        self.log.add(
            control_record(
                event,
                vm=result.vm,
                interface=result.interfaces[0] if len(result.interfaces) == 1 else None,
                generation=result.generation,
                duration_ms=round(result.seconds * 1000),
            )
        )

    def complain(self, message: str, vm: str | None = None) -> None:
        """Say what went wrong where there is nobody to raise it to."""
        _logger.error("%s%s", "" if vm is None else f"{vm}: ", message)
        self.log.add(control_record("error", vm=vm, message=message))

    def note_protected(self, result: AttachResult) -> None:
        """Remember on which interfaces a VM is protected."""
        for name in result.interfaces:
            with contextlib.suppress(OSError):
                self.protected[name] = socket.if_nametoindex(name)

    def say_names(self, vms: Iterable[str]) -> None:
        """Raise or end the alarms about interfaces that have other names than the policy says."""
        say_renamed(self.host.paths, vms, self.alarms)
