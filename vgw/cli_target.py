# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the functions keep the start of the command fast
"""Who does the work of a verb: the running controller, or this process when there is none.

Both answer with the same JSON-ready values, so no verb needs to know which it talks to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vgw.errors import ControllerUnreachableError, PartlyAppliedError, VgwError

if TYPE_CHECKING:
    from vgw.controller.flow_import import Piece
    from vgw.controller.paths import Paths
    from vgw.policy.model import PolicyDocument
    from vgw.policy.parse import Sources

Answer = dict[str, Any]
#: Interfaces of a VM: (name, MAC or None).
Told = Sequence[tuple[str, str | None]]
#: Is told what takes long.
Progress = Callable[[str], None]

#: How many seconds a controller that is alive may take to say so.
PING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class AttachOrder:
    """VMs to protect, by which policy and how; without `sources` they get the defaults.

    `own`: the policy is this host's, not one that the user named; one that is held takes its place.
    `told` are interfaces with their MACs that the one VM is known to have, by whoever starts it.
    `document` is what `sources` and the inventory make, where that was asked already: parsing a
    large policy takes seconds. A controller parses them itself.
    """

    vms: Sequence[str]
    sources: Sources | None = None
    interfaces: Sequence[str] = ()
    hook: str | None = None
    force: bool = False
    own: bool = False
    told: Told | None = None
    document: PolicyDocument | None = None

    @property
    def is_for_many(self) -> bool:
        """Whether the VMs can be protected side by side: nothing is ordered for single ones."""
        return len(self.vms) > 1 and self.hook is None and not self.interfaces and not self.told


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """How a policy is applied; as policy_keeper.ApplyOrder, which is not loaded for every verb."""

    force: bool = False
    confirm_seconds: float | None = None
    supersede: bool = False


class Target(Protocol):
    """What the verbs ask for. Every method raises VgwError when it cannot be done."""

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs: {"vms": [AttachResult], "waiting": {VM: [missing interface]}}."""

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""

    def apply(self, sources: Sources, options: ApplyOptions) -> Answer:
        """Bring the attached VMs up to date: the same as `attach`."""

    def rollback(self, number: int | None) -> Answer:
        """Apply an earlier policy: the same as `apply`, and {"policy", "back"}: which are they."""

    def confirm(self) -> int:
        """Keep the policy that waits to be confirmed; return its number."""

    def status(self, vm: str | None) -> Answer:
        """Return what is attached and what alarms stand: {"vms": [...], "alarms": [...]}.

        The alarms are None when no controller runs that could raise any.
        """

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters: {"vm", "rules": [...]}."""

    def sample(self) -> Answer:
        """Return the counters of all VMs: {"at_ns", "vms": [...]}."""

    def talkers(self, vm: str) -> Answer:
        """Return with whom a VM talks: {"at_ns", "talkers": [...]}."""

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM: {"vm", "flows": [...]}."""

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""

    def put_flows(self, piece: Piece) -> dict[str, int]:
        """Put flows of another host into a VM's tables; return what became of them."""

    def set_mode(self, vm: str, mode: str | None, reason: str) -> str:
        """Order a mode, None: that of the policy; return the one that the VM has now."""

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
    from vgw.cli_target_controller import ControllerTarget
    from vgw.cli_target_local import LocalTarget
    from vgw.controller.api_client import Client

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
    return ControllerTarget(Client(paths.socket), paths)


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
