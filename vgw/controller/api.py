# SPDX-License-Identifier: Apache-2.0
"""The controller's HTTP/JSON interface on its unix socket: server, client and how errors cross it.

`POST /v1/<verb>` takes a JSON object of parameters and answers `{"ok": true, "result": ...}` or
`{"ok": false, "error": {"message": ..., "exit_code": ...}}`. One request a connection. The socket
is mode 0600, and each side must be root or the user that the other runs as.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import os
import socket
import socketserver
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vgw.controller.api_limits import (
    MAX_SERVED,
    REQUEST_SECONDS,
    Waiting,
    peer,
    require_own,
)
from vgw.controller.parameters import Parameters
from vgw.errors import (
    CompileError,
    ControllerUnreachableError,
    ExitCode,
    ForeignProgramError,
    KernelError,
    PartlyAppliedError,
    PolicyError,
    Problem,
    VerifierError,
    VgwError,
)

if TYPE_CHECKING:
    from vgw.controller.flow_import import Piece

#: Texts of a policy: (file name, YAML), as parse.parse_sources takes them.
Sources = Sequence[tuple[str, str]]
#: What serves one verb: its parameters in, what goes into "result" out.
Verb = Callable[[Parameters], object]

MAX_REQUEST_BYTES: Final = 32 << 20
ANSWER_SECONDS: Final = 300.0
_PREFIX: Final = "/v1/"
_PLAIN_ERRORS: Final = {kind.__name__: kind for kind in (CompileError, ForeignProgramError)}


def error_document(error: VgwError) -> dict[str, Any]:
    """Return an error as it goes over the socket."""
    document: dict[str, Any] = {
        "message": str(error),
        "exit_code": int(error.exit_code),
        "kind": type(error).__name__,
    }
    if isinstance(error, PolicyError):
        document["problems"] = [astuple(problem) for problem in error.problems]
    if isinstance(error, PartlyAppliedError):
        document["failures"] = error.failures
        document["done"] = list(error.done)
    if isinstance(error, KernelError):
        document["errno"] = error.errno
    if isinstance(error, VerifierError):
        document["log"] = error.log
    return document


def error_from_document(document: Mapping[str, Any]) -> VgwError:
    """Return the error that `error_document` described, with the same exit code."""
    message = str(document.get("message", "the controller gave no reason"))
    exit_code = document.get("exit_code", int(ExitCode.FAILED))
    if "problems" in document:
        return PolicyError([Problem(*fields) for fields in document["problems"]])
    if "failures" in document:
        return PartlyAppliedError(dict(document["failures"]), document.get("done", ()))
    if "log" in document:
        return VerifierError(message, document["errno"], document["log"])
    if "errno" in document:
        return KernelError(message, document["errno"])
    error = _PLAIN_ERRORS.get(str(document.get("kind")), VgwError)(message)
    if exit_code != error.exit_code and exit_code in set(ExitCode):
        error.exit_code = ExitCode(exit_code)
    return error


class Server:
    """Serves verbs on a unix socket, a thread for each request, once started until closed."""

    def __init__(
        self, path: Path, verbs: Mapping[str, Verb], alive: Callable[[], None] = lambda: None
    ) -> None:
        """Bind the socket; until `start` it answers nobody. `alive` is called at every turn.

        The caller holds the controller's lock, so a socket that is already at `path` belongs to a
        dead controller and is replaced. Raises VgwError when the socket cannot be made, or when
        others could put another in its place.
        """
        try:
            require_own(path.parent)
            path.unlink(missing_ok=True)
            self._server = _SocketServer(str(path), verbs, alive)
        except OSError as error:
            raise VgwError(
                f"cannot serve on {path}: {error.strerror or error}; choose a shorter or writable "
                "directory by VGW_RUN_DIR"
            ) from error
        self._path = path
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve."""
        self._server.server_activate()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="api", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop accepting requests and remove the socket."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.waiting.give_up_all()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The listening socket."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, path: str, verbs: Mapping[str, Verb], alive: Callable[[], None]) -> None:
        self.alive = alive
        self.verbs = verbs
        self.users = {0, os.geteuid()}
        self.waiting = Waiting()
        self.served = threading.BoundedSemaphore(MAX_SERVED)
        super().__init__(path, _RequestHandler, bind_and_activate=False)
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        # The inode takes its mode from the socket's: there is no moment at which it is wider.
        os.fchmod(self.socket.fileno(), 0o600)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to serve a client in a thread."""
        self.waiting.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # this host gives no more threads
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Look after those that wait, a few times a second, and say that the server goes round."""
        self.alive()
        self.waiting.give_up_late()

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self.waiting.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Say what went wrong unless it is only that the client went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            traceback.print_exc()


class _RefusedError(VgwError):
    """A request that no verb gets to see; `status` says why in HTTP's words."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _RequestHandler(BaseHTTPRequestHandler):
    """One request."""

    server: _SocketServer
    timeout = REQUEST_SECONDS

    def do_POST(self) -> None:
        """Answer a request; whatever happens, the answer is JSON."""
        status = HTTPStatus.OK
        try:
            answer = {"ok": True, "result": self._result()}
        except VgwError as error:
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            if isinstance(error, _RefusedError):
                status = error.status
            answer = {"ok": False, "error": error_document(error)}
        except Exception as error:  # a bug that one request meets must not end the controller
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            message = f"internal error of the controller, see its log: {error!r}"
            answer = {"ok": False, "error": error_document(VgwError(message))}
        self._send(status, answer)

    def _result(self) -> object:
        """Return what the verb that is asked for returns."""
        verb, parameters = self._verb(), self._parameters()
        self.server.waiting.discard(self.connection)
        if not self.server.served.acquire(blocking=False):
            raise _RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the controller serves {MAX_SERVED} requests already; try again",
            )
        try:
            return verb(parameters)
        finally:
            self.server.served.release()

    def _verb(self) -> Verb:
        """Return what serves this request, after a look at who sent it."""
        user = peer(self.connection).uid
        if user not in self.server.users:
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, f"user id {user} may not command the controller; use root"
            )
        verb = self.server.verbs.get(self.path.removeprefix(_PREFIX))
        if verb is None or not self.path.startswith(_PREFIX):
            raise _RefusedError(
                HTTPStatus.NOT_FOUND,
                f"the controller does not know {self.path}; restart it if vgw was upgraded",
            )
        return verb

    def _parameters(self) -> Parameters:
        """Read the body within the limits of size and time."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if length < 0:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if length > MAX_REQUEST_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request is larger than {MAX_REQUEST_BYTES >> 20} MiB; shorten the policy",
            )
        try:
            body = self.rfile.read(length)
            if len(body) < length:
                message = f"the request ended after {len(body)} of its {length} bytes"
                raise _RefusedError(HTTPStatus.BAD_REQUEST, message)
            parameters = json.loads(body)
        except TimeoutError as error:
            message = f"the request did not arrive within {REQUEST_SECONDS:.0f} s"
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, message) from error
        except (ValueError, RecursionError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not JSON") from error
        if not isinstance(parameters, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not a JSON object")
        return Parameters(parameters, peer(self.connection))

    def _send(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Log nothing: what changed is in the log of events."""


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
                connection.request("POST", _PREFIX + verb, body, headers)
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
