# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the functions keep the start of the command fast
"""The work of a verb done by the running controller."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from vgw.cli_target import Answer, ApplyOptions, AttachOrder, each_vm

if TYPE_CHECKING:
    from vgw.controller.api_client import Client
    from vgw.controller.flow_import import Piece
    from vgw.controller.paths import Paths
    from vgw.policy.parse import Sources


class ControllerTarget:
    """Has the controller do the work."""

    def __init__(self, client: Client, paths: Paths) -> None:
        self._client = client
        self._paths = paths

    def attach(self, order: AttachOrder) -> Answer:
        """Protect VMs, many of them by one request."""
        if order.is_for_many:
            return self._client.attach_many(
                order.vms, sources=order.sources, force=order.force, own=order.own
            )
        return each_vm(
            order.vms,
            lambda vm: self._client.attach(
                vm,
                sources=order.sources,
                interfaces=order.interfaces,
                hook=order.hook,
                force=order.force,
                own=order.own,
                told=order.told,
            ),
        )

    def detach(self, vm: str) -> list[str]:
        """Stop protecting a VM; return its name in a list."""
        return list(self._client.detach(vm)["detached"])

    def detach_all(self) -> list[str]:
        """Stop protecting every VM; return their names."""
        return list(self._client.detach_all()["detached"])

    def apply(self, sources: Sources, options: ApplyOptions) -> Answer:
        """Bring the attached VMs up to date."""
        if options.confirm_seconds is None:
            return self._client.apply(sources, **asdict(options))
        self._client.settle()  # a controller that does not know this would apply it for good
        try:
            return self._client.apply(sources, **asdict(options))
        finally:
            self._watch_beside()

    def _watch_beside(self) -> None:
        """Have a guardian that does not go with the controller's service, if that is stopped."""
        from vgw.controller.guardian import start_guardian
        from vgw.controller.window import load_window

        window = load_window(self._paths)
        if window is not None:
            start_guardian(self._paths, window.id)

    def rollback(self, number: int | None) -> Answer:
        """Apply an earlier policy, None: the one before."""
        return self._client.rollback(number)

    def confirm(self) -> int:
        """Keep the policy that waits to be confirmed; return its number."""
        return self._client.confirm()

    def status(self, vm: str | None) -> Answer:
        """Return what is attached."""
        return self._client.status(vm)

    def rules(self, vm: str) -> Answer:
        """Return the rules of a VM with their counters."""
        return self._client.rules(vm)

    def sample(self) -> Answer:
        """Return the counters of all VMs."""
        return self._client.sample()

    def talkers(self, vm: str) -> Answer:
        """Return with whom a VM talks."""
        return self._client.talkers(vm)

    def conntrack(self, vm: str) -> Answer:
        """Return the flows of a VM."""
        return self._client.conntrack(vm)

    def flush(self, vm: str) -> int:
        """Forget the flows of a VM; return how many entries its tables had."""
        return int(self._client.flush(vm)["entries"])

    def put_flows(self, piece: Piece) -> dict[str, int]:
        """Put flows of another host into a VM's tables; return what became of them."""
        return self._client.put_flows(piece)

    def set_mode(self, vm: str, mode: str | None, reason: str) -> str:
        """Order a mode, None: that of the policy; return the one that the VM has now."""
        return str(self._client.set_mode(vm, mode, reason)["mode"])

    def vms(self) -> Answer:
        """Return the VMs that are written or found."""
        return self._client.vms()

    def wants(self, vm: str) -> bool:
        """Tell whether this host is to protect a VM."""
        return self._client.wants(vm)

    def forget_gone(self) -> None:
        """Do nothing: the controller sees by itself what goes."""
