# SPDX-License-Identifier: Apache-2.0
"""The controller's socket interface as its clients use it: a method for each verb."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vgw.controller.api_limits import peer
from vgw.controller.api_protocol import PREFIX, error_from_document
from vgw.errors import ControllerUnreachableError, VgwError

if TYPE_CHECKING:
    from vgw.controller.flow_import import Piece
    from vgw.policy.parse import Sources

ANSWER_SECONDS: Final = 300.0


class Client:
    """Asks a running controller; each method is one verb and returns the "result" of its answer.

    All raise ControllerUnreachableError when nobody listens on the socket, which is before
    anything was asked, and otherwise the VgwError that the controller raised. Results are plain
    JSON: dataclasses of reconcile.py arrive as dicts of their fields.
    """

    def __init__(self, path: Path, timeout: float = ANSWER_SECONDS) -> None:
        """Remember the socket; `timeout` is how many seconds an answer may take."""
        self._path = path
        self._timeout = timeout

    def ping(self) -> dict[str, Any]:
        """Return {"pid", "version", "abi"} of the controller."""
        return self._dict("ping")

    def attach(  # noqa: PLR0913 - one parameter for each part of the order
        self,
        vm: str,
        *,
        sources: Sources | None = None,
        interfaces: Sequence[str] = (),
        hook: str | None = None,
        force: bool = False,
        own: bool = False,
        told: Sequence[tuple[str, str | None]] | None = None,
    ) -> dict[str, Any]:
        """Protect a VM by the given policy, or by the controller's own: an AttachResult.

        `own`: the policy given is what this host's file says; another that is held is used instead.
        `told` are interfaces that it has for sure, each with its MAC.
        """
        order = {"interfaces": interfaces, "hook": hook, "force": force, "own": own, "told": told}
        return self._dict("attach", vm=vm, sources=sources, **order)

    def attach_many(
        self,
        vms: Sequence[str],
        *,
        sources: Sources | None = None,
        force: bool = False,
        own: bool = False,
    ) -> dict[str, Any]:
        """Protect VMs side by side, each on those of its interfaces that exist: an ApplyResult."""
        return self._dict("attach", vms=vms, sources=sources, force=force, own=own)

    def detach(self, vm: str) -> dict[str, Any]:
        """Stop protecting a VM: {"detached": [names]}."""
        return self._dict("detach", vm=vm)

    def detach_all(self) -> dict[str, Any]:
        """Stop protecting every VM: {"detached": [names]}."""
        return self._dict("detach", all=True)

    def apply(  # noqa: PLR0913 - one parameter for each option
        self,
        sources: Sources,
        vms: Sequence[str] | None = None,
        *,
        dry_run: bool = False,
        force: bool = False,
        confirm_seconds: float | None = None,
        supersede: bool = False,
    ) -> dict[str, Any]:
        """Apply a policy, the controller's from now on, to attached VMs: an ApplyResult.

        The options are those of policy_keeper.ApplyOrder.
        """
        return self._dict(
            "apply",
            sources=sources,
            vms=vms,
            dry_run=dry_run,
            force=force,
            confirm_seconds=confirm_seconds,
            supersede=supersede,
        )

    def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Apply an earlier policy, None: the one before: {"policy", "back"} and an ApplyResult."""
        return self._dict("rollback", number=number)

    def confirm(self) -> int:
        """Keep the policy that waits to be confirmed and return its number."""
        return int(self._dict("confirm")["policy"])

    def settle(self) -> bool:
        """Have the controller go back from a policy that was not confirmed in time."""
        return bool(self._dict("settle")["rolled_back"])

    def status(self, vm: str | None = None) -> dict[str, Any]:
        """Return Host.status: what is really attached."""
        return self._dict("status", vm=vm)

    def rules(self, vm: str) -> dict[str, Any]:
        """Return Host.rules: the rules of a VM with their counters."""
        return self._dict("rules", vm=vm)

    def sample(self) -> dict[str, Any]:
        """Return samples.sample: the counters of all VMs."""
        return self._dict("sample")

    def talkers(self, vm: str) -> dict[str, Any]:
        """Return samples.talkers: with whom a VM talks."""
        return self._dict("talkers", vm=vm)

    def conntrack(self, vm: str) -> dict[str, Any]:
        """Return the flows of a VM: {"vm", "flows": [...]}."""
        return self._dict("conntrack", vm=vm)

    def flush(self, vm: str) -> dict[str, Any]:
        """Forget every flow of a VM: {"vm", "entries"}."""
        return self._dict("flush", vm=vm)

    def put_flows(self, piece: Piece) -> dict[str, int]:
        """Put a piece of flows into a VM's tables: the fields of a flow_table.Filled."""
        fields = {**asdict(piece), "records": base64.b64encode(piece.records).decode()}
        return self._dict("conntrack_import", **fields)

    def set_mode(self, vm: str, mode: str | None, reason: str = "") -> dict[str, Any]:
        """Order enforce, monitor or quarantine, None: that of the policy: {"vm", "mode"}."""
        return self._dict("mode", vm=vm, mode=mode, reason=reason, release=mode is None)

    def vms(self) -> dict[str, Any]:
        """Return the VMs that are written or found: {"protect", "find", "problems", "vms"}."""
        return self._dict("vms")

    def wants(self, vm: str) -> bool:
        """Tell whether the controller is to protect a VM."""
        return bool(self._dict("wants", vm=vm)["wanted"])

    def call(self, verb: str, **parameters: object) -> object:
        """Ask for any verb and return the "result" of the answer."""
        connection = _UnixConnection(self._path, self._timeout)
        try:
            return self._exchange(connection, verb, json.dumps(parameters).encode())
        finally:
            connection.close()

    def _dict(self, verb: str, **parameters: object) -> dict[str, Any]:
        result = self.call(verb, **parameters)
        if not isinstance(result, dict):
            raise VgwError(f"the controller at {self._path} gave no JSON object as the result")
        return result

    def _exchange(self, connection: _UnixConnection, verb: str, body: bytes) -> object:
        try:
            connection.connect()
        except BlockingIOError as error:
            raise VgwError(
                f"the controller at {self._path} takes no request; see its log and `vgw status`"
            ) from error
        except OSError as error:
            raise ControllerUnreachableError(
                f"no controller answers at {self._path} ({error.strerror or error}); "
                "start one by `vgw controller`"
            ) from error
        try:
            # What is refused before all of it was read has its answer too.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                headers = {"Content-Type": "application/json"}
                connection.request("POST", PREFIX + verb, body, headers)
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise VgwError(
                f"the controller at {self._path} took the request and gave no answer "
                f"({error or type(error).__name__}); see its log and `vgw status`"
            ) from error
        if not isinstance(answer, dict) or not answer.get("ok"):
            raise error_from_document(answer.get("error", {}) if isinstance(answer, dict) else {})
        return answer.get("result")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost")
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        """Connect to the socket; OSError when nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # By Python's own time limit a socket would not wait for room in the controller's queue.
        seconds, rest = divmod(self._seconds, 1)
        limit = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.sock.connect(str(self._path))
        self.sock.settimeout(self._seconds)
        user = peer(self.sock).uid
        if user not in {0, os.geteuid()}:
            raise PermissionError(errno.EACCES, f"it is user id {user} who listens there")
