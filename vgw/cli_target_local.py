# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the functions keep the start of the command fast
"""The work of a verb done by this process, when no controller runs."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING

from vgw.cli_output import warn
from vgw.cli_target import Answer, ApplyOptions, AttachOrder, Progress, each_vm
from vgw.errors import VgwError

if TYPE_CHECKING:
    from vgw.controller.actor import Actor
    from vgw.controller.batch import ApplyResult
    from vgw.controller.finding.search import Look
    from vgw.controller.flow_import import Piece
    from vgw.controller.paths import Paths
    from vgw.controller.reconcile import Host
    from vgw.policy.model import PolicyDocument
    from vgw.policy.parse import Sources


class LocalTarget:
    """Does the work in this process."""

    def __init__(self, host: Host, look: Look) -> None:
        from vgw.controller.policy_keeper import PolicyKeeper, logging_to

        self._host = host
        self._look = look
        self._keeper = PolicyKeeper(host, logging_to(host.paths.log_file))

    @classmethod
    def under(cls, paths: Paths, progress: Progress | None) -> LocalTarget:
        """Return a target that works under `paths`."""
        from vgw.controller.looking import looking_host

        return cls(*looking_host(paths, progress))

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs, many of them side by side."""
        from vgw.controller.finding.told import told
        from vgw.controller.inventory import read_document, read_host_document
        from vgw.controller.policy_source import read_steadily

        self._go_back_if_due()
        paths, sources, own = self._host.paths, order.sources, order.own
        if order.told is not None:
            self._look.tell(told(order.vms[0], order.told))
        if sources is None:
            if not paths.policy.exists():
                return asdict(self._attach(order, read_host_document(paths)))
            sources, own = read_steadily(paths.policy), True
        document = order.document or read_document(paths, sources)
        held = self._held_before(document) if own else None
        if held is not None:
            return asdict(self._attach(order, held))
        self._keeper.admit(document, force=order.force)
        work = functools.partial(self._attach, order, document)
        who = _this_user()
        return asdict(self._keeper.record_attach(sources, document, who, order.vms, work))

    def _attach(self, order: AttachOrder, document: PolicyDocument) -> ApplyResult:
        from vgw.controller.batch import ApplyResult, AttachResult
        from vgw.policy.model import Hook

        if order.is_for_many:
            return self._host.attach_many(document, order.vms, force=order.force)
        attach = functools.partial(
            self._host.attach,
            document,
            interfaces=order.interfaces,
            hook=None if order.hook is None else Hook(order.hook),
            force=order.force,
        )
        done = each_vm(order.vms, lambda vm: asdict(attach(vm)))
        return ApplyResult([AttachResult(**row) for row in done["vms"]])

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""
        self._go_back_if_due()
        self._host.detach(vm)
        return [vm]

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""
        self._go_back_if_due()
        return self._host.detach_all()

    def apply(self, sources: Sources, options: ApplyOptions) -> Answer:
        """Bring the attached VMs up to date."""
        from vgw.controller.inventory import read_document
        from vgw.controller.policy_keeper import ApplyOrder

        self._go_back_if_due()
        document = read_document(self._host.paths, sources)
        order = ApplyOrder(**asdict(options))
        return asdict(self._keeper.apply(sources, document, _this_user(), order))

    def rollback(self, number: int | None) -> Answer:
        """Apply an earlier policy, None: the one before."""
        self._go_back_if_due()
        entry, result = self._keeper.rollback(number, _this_user())
        return {"policy": entry.number, "back": entry.back, **asdict(result)}

    def confirm(self) -> int:
        """Keep the policy that waits to be confirmed; return its number."""
        return self._keeper.confirm(_this_user())

    def status(self, vm: str | None) -> Answer:
        """Return what is attached."""
        report = {"host_policy": self._keeper.report(), "alarms": None}
        return {**self._host.status(vm), **report}

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters."""
        return self._host.rules(vm)

    def sample(self) -> Answer:
        """Return the counters of all VMs."""
        from vgw.controller.samples import sample

        return sample(self._host)

    def talkers(self, vm: str) -> Answer:
        """Return with whom a VM talks."""
        from vgw.controller.samples import talkers

        return talkers(self._host, vm)

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM."""
        from vgw.controller.conntrack import list_flows

        return list_flows(self._host, vm)

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""
        self._go_back_if_due()
        return self._host.flush(vm)

    def put_flows(self, piece: Piece) -> dict[str, int]:
        """Put flows of another host into a VM's tables; return what became of them."""
        from vgw.controller.flow_import import put_piece

        return put_piece(self._host, piece)

    def set_mode(self, vm: str, mode: str | None, reason: str) -> str:
        """Order a mode, None: that of the policy; return the one that the VM has now."""
        from vgw.abi import Mode

        self._go_back_if_due()
        wanted = None if mode is None else Mode[mode.upper()]
        self._host.set_mode(vm, wanted, reason, _this_user().text())
        return mode or self._host.manifest(vm).mode.name.lower()

    def vms(self) -> Answer:
        """Return the VMs that are written, or found by a look now."""
        from vgw.controller.vms_report import vms_report

        document, look = self._own_document(), self._look
        laid, found = self._host.overlay.laid(document), look.found(document.inventory.find)
        return vms_report(self._host.paths, laid, found, look.problems)

    def wants(self, vm: str) -> bool:
        """Tell whether this host is to protect a VM."""
        from vgw.controller.inventory import wants

        return wants(self._own_document(), vm)

    def forget_gone(self) -> None:
        """Forget endpoints whose interface is gone."""
        self._host.sweep()

    def _own_document(self) -> PolicyDocument:
        """Return what this host is to enforce: its files, or what is held before its policy."""
        from vgw.controller.inventory import read_host_document

        document = read_host_document(self._host.paths)
        return self._held_before(document) or document

    def _held_before(self, document: PolicyDocument) -> PolicyDocument | None:
        """Return what is held in the place of the host's policy, None when that is in force."""
        from vgw.controller.inventory import read_document

        held = self._keeper.held(document)
        if held is None:
            return None
        return read_document(self._host.paths, self._keeper.history.sources(held))

    def _go_back_if_due(self) -> None:
        """Go back from a policy that was not confirmed in time, whatever else is to be done."""
        try:
            self._keeper.settle_overdue(_this_user())
        except VgwError as error:
            warn(str(error))


def _this_user() -> Actor:
    from vgw.controller.actor import this_process

    return this_process("cli")
