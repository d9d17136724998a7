# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the functions keep the start of the command fast
"""Who does the work of a verb: the running controller, or this process when there is none.

Both answer with the same JSON-ready values, so no verb needs to know which it talks to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vgw.errors import ControllerUnreachableError, PartlyAppliedError, VgwError

if TYPE_CHECKING:
    from vgw.controller.api import Client
    from vgw.controller.finding.search import Look
    from vgw.controller.paths import Paths
    from vgw.controller.reconcile import Host

Answer = dict[str, Any]
#: Texts of a policy: (file name, YAML).
Sources = Sequence[tuple[str, str]]
#: Interfaces of a VM: (name, MAC or None).
Told = Sequence[tuple[str, str | None]]
#: Is told what takes long.
Progress = Callable[[str], None]

#: How many seconds a controller that is alive may take to say so.
PING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class AttachOrder:
    """VMs to protect, by which policy and how; without `sources` they get the defaults.

    `told` are interfaces with their MACs that the one VM is known to have, by whoever starts it.
    """

    vms: Sequence[str]
    sources: Sources | None = None
    interfaces: Sequence[str] = ()
    hook: str | None = None
    force: bool = False
    told: Told | None = None

    @property
    def is_for_many(self) -> bool:
        """Whether the VMs can be protected side by side: nothing is ordered for single ones."""
        return len(self.vms) > 1 and self.hook is None and not self.interfaces and not self.told


class Target(Protocol):
    """What the verbs ask for. Every method raises VgwError when it cannot be done."""

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs: {"vms": [AttachResult], "waiting": {VM: [missing interface]}}."""

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""

    def apply(self, sources: Sources) -> Answer:
        """Bring the attached VMs up to date: the same as `attach`."""

    def status(self, vm: str | None) -> Answer:
        """Return what is attached and what alarms stand: {"vms": [...], "alarms": [...]}.

        The alarms are None when no controller runs that could raise any.
        """

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters: {"vm", "rules": [...]}."""

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM: {"vm", "flows": [...]}."""

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""

    def set_mode(self, vm: str, mode: str) -> None:
        """Set enforce, monitor or quarantine."""

    def vms(self) -> Answer:
        """Return the VMs that are written or found: {"vms": [...]}."""

    def wants(self, vm: str) -> bool:
        """Tell whether this host is to protect a VM."""

    def forget_gone(self) -> None:
        """Forget endpoints whose interface is gone."""


def connect(paths: Paths, progress: Progress | None) -> Target:
    """Return the controller that runs under `paths`, or this process when none does.

    Raises ControllerUnreachableError when one runs that gives no answer or is of another version:
    this process must not work beside it.
    """
    from vgw.abi import ABI_VERSION
    from vgw.controller.api import Client

    if not paths.socket.exists():
        return LocalTarget.under(paths, progress)
    try:
        identity = Client(paths.socket, PING_SECONDS).ping()
    except ControllerUnreachableError:
        return LocalTarget.under(paths, progress)
    except VgwError as error:
        raise ControllerUnreachableError(
            f"the controller at {paths.socket} gives no answer; restart it, VMs stay protected "
            "meanwhile"
        ) from error
    if identity.get("abi") != ABI_VERSION:
        raise ControllerUnreachableError(
            f"the controller runs vgw {identity.get('version')}, which keeps other tables than "
            "this command; restart the controller"
        )
    return ControllerTarget(Client(paths.socket))


class LocalTarget:
    """Does the work in this process."""

    def __init__(self, host: Host, look: Look | None = None) -> None:
        self._host = host
        self._look = look

    @classmethod
    def under(cls, paths: Paths, progress: Progress | None) -> LocalTarget:
        """Return a target that works under `paths`."""
        from vgw.controller.finding.search import Look
        from vgw.controller.overlay import Overlay
        from vgw.controller.reconcile import Host

        look = Look()
        return cls(Host(paths, progress=progress, overlay=Overlay(paths, look.found)), look)

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs, many of them side by side."""
        from vgw.controller.finding.told import told
        from vgw.controller.inventory import read_document, read_host_document
        from vgw.policy.model import Hook

        paths, sources = self._host.paths, order.sources
        document = read_host_document(paths) if sources is None else read_document(paths, sources)
        if order.told is not None and self._look is not None:
            self._look.tell(told(order.vms[0], order.told))
        if order.is_for_many:
            return asdict(self._host.attach_many(document, order.vms, force=order.force))
        attach = functools.partial(
            self._host.attach,
            document,
            interfaces=order.interfaces,
            hook=None if order.hook is None else Hook(order.hook),
            force=order.force,
        )
        return each_vm(order.vms, lambda vm: asdict(attach(vm)))

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""
        self._host.detach(vm)
        return [vm]

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""
        return self._host.detach_all()

    def apply(self, sources: Sources) -> Answer:
        """Bring the attached VMs up to date."""
        from vgw.controller.inventory import read_document

        return asdict(self._host.apply(read_document(self._host.paths, sources)))

    def status(self, vm: str | None) -> Answer:
        """Return what is attached."""
        return {**self._host.status(vm), "alarms": None}

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters."""
        return self._host.rules(vm)

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM."""
        from vgw.controller.conntrack import list_flows

        return list_flows(self._host, vm)

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""
        return self._host.flush(vm)

    def set_mode(self, vm: str, mode: str) -> None:
        """Set enforce, monitor or quarantine."""
        from vgw.abi import Mode

        self._host.set_mode(vm, Mode[mode.upper()])

    def vms(self) -> Answer:
        """Return the VMs that are written, or found by a look now."""
        from vgw.controller.finding.search import Look
        from vgw.controller.inventory import read_host_document
        from vgw.controller.vms_report import vms_report

        paths, look = self._host.paths, self._look or Look()
        document = read_host_document(paths)
        laid, found = self._host.overlay.laid(document), look.found(document.inventory.find)
        return vms_report(paths, laid, found, look.problems)

    def wants(self, vm: str) -> bool:
        """Tell whether this host is to protect a VM."""
        from vgw.controller.inventory import read_host_document, wants

        return wants(read_host_document(self._host.paths), vm)

    def forget_gone(self) -> None:
        """Forget endpoints whose interface is gone."""
        self._host.sweep()


class ControllerTarget:
    """Has the controller do the work."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs, many of them by one request."""
        if order.is_for_many:
            return self._client.attach_many(order.vms, sources=order.sources, force=order.force)
        return each_vm(
            order.vms,
            lambda vm: self._client.attach(
                vm,
                sources=order.sources,
                interfaces=order.interfaces,
                hook=order.hook,
                force=order.force,
                told=order.told,
            ),
        )

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""
        return list(self._client.detach(vm)["detached"])

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""
        return list(self._client.detach_all()["detached"])

    def apply(self, sources: Sources) -> Answer:
        """Bring the attached VMs up to date."""
        return self._client.apply(sources)

    def status(self, vm: str | None) -> Answer:
        """Return what is attached."""
        return self._client.status(vm)

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters."""
        return self._client.rules(vm)

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM."""
        return self._client.conntrack(vm)

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""
        return int(self._client.flush(vm)["entries"])

    def set_mode(self, vm: str, mode: str) -> None:
        """Set enforce, monitor or quarantine."""
        self._client.set_mode(vm, mode)

    def vms(self) -> Answer:
        """Return the VMs that are written or found."""
        return self._client.vms()

    def wants(self, vm: str) -> bool:
        """Tell whether this host is to protect a VM."""
        return self._client.wants(vm)

    def forget_gone(self) -> None:
        """Do nothing: the controller sees by itself what goes."""


def each_vm(vms: Sequence[str], protect: Callable[[str], Answer]) -> Answer:
    """Protect VMs one after the other and return what became of them.

    Raises what a single VM raised, PartlyAppliedError when one of several failed.
    """
    done: list[Answer] = []
    failures: dict[str, str] = {}
    for vm in vms:
        try:
            done.append(protect(vm))
        except VgwError as error:
            if len(vms) == 1:
                raise
            failures[vm] = str(error)
    if failures:
        raise PartlyAppliedError(failures, done)
    return {"vms": done, "waiting": {}}
