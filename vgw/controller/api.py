# SPDX-License-Identifier: Apache-2.0
"""The controller's HTTP/JSON interface on its unix socket: server, client and how errors cross it.

`POST /v1/<verb>` takes a JSON object of parameters and answers `{"ok": true, "result": ...}` or
`{"ok": false, "error": {"message": ..., "exit_code": ...}}`. One request a connection. The socket
is mode 0600 and the peer must be root or the user the controller runs as.
"""

from __future__ import annotations

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
from dataclasses import astuple
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

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

#: Texts of a policy: (file name, YAML), as parse.parse_sources takes them.
Sources = Sequence[tuple[str, str]]
#: What serves one verb: its parameters in, what goes into "result" out.
Verb = Callable[[Parameters], object]

MAX_REQUEST_BYTES: Final = 32 << 20
REQUEST_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 300.0
_PREFIX: Final = "/v1/"
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
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

    def __init__(self, path: Path, verbs: Mapping[str, Verb]) -> None:
        """Bind the socket; until `start` it answers nobody.

        The caller holds the controller's lock, so a socket that is already at `path` belongs to a
        dead controller and is replaced. Raises VgwError when the socket cannot be made.
        """
        try:
            path.unlink(missing_ok=True)
            self._server = _SocketServer(str(path), verbs)
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
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The listening socket."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, verbs: Mapping[str, Verb]) -> None:
        self.verbs = verbs
        self.users = {0, os.geteuid()}
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
            answer = {"ok": True, "result": self._verb()(self._parameters())}
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

    def _verb(self) -> Verb:
        """Return what serves this request, after a look at who sent it."""
        user = self._peer_user()
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
            parameters = json.loads(self.rfile.read(length))
        except TimeoutError as error:
            message = f"the request did not arrive within {REQUEST_SECONDS:.0f} s"
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, message) from error
        except (ValueError, RecursionError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not JSON") from error
        if not isinstance(parameters, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not a JSON object")
        return Parameters(parameters)

    def _peer_user(self) -> int:
        credentials = self.connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
        )
        user: int = _PEER_CREDENTIALS.unpack(credentials)[1]
        return user

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
        told: Sequence[tuple[str, str | None]] | None = None,
    ) -> dict[str, Any]:
        """Protect a VM by the given policy, or by the controller's own: an AttachResult.

        `told` are interfaces that it has for sure, each with its MAC.
        """
        order = {"interfaces": interfaces, "hook": hook, "force": force, "told": told}
        return self._dict("attach", vm=vm, sources=sources, **order)

    def attach_many(
        self, vms: Sequence[str], *, sources: Sources | None = None, force: bool = False
    ) -> dict[str, Any]:
        """Protect VMs side by side, each on those of its interfaces that exist: an ApplyResult."""
        return self._dict("attach", vms=vms, sources=sources, force=force)

    def detach(self, vm: str) -> dict[str, Any]:
        """Stop protecting a VM: {"detached": [names]}."""
        return self._dict("detach", vm=vm)

    def detach_all(self) -> dict[str, Any]:
        """Stop protecting every VM: {"detached": [names]}."""
        return self._dict("detach", all=True)

    def apply(
        self, sources: Sources, vms: Sequence[str] | None = None, *, dry_run: bool = False
    ) -> dict[str, Any]:
        """Apply a policy, the controller's from now on, to attached VMs: an ApplyResult."""
        return self._dict("apply", sources=sources, vms=vms, dry_run=dry_run)

    def status(self, vm: str | None = None) -> dict[str, Any]:
        """Return Host.status: what is really attached."""
        return self._dict("status", vm=vm)

    def rules(self, vm: str) -> dict[str, Any]:
        """Return Host.rules: the rules of a VM with their counters."""
        return self._dict("rules", vm=vm)

    def conntrack(self, vm: str) -> dict[str, Any]:
        """Return the flows of a VM: {"vm", "flows": [...]}."""
        return self._dict("conntrack", vm=vm)

    def flush(self, vm: str) -> dict[str, Any]:
        """Forget every flow of a VM: {"vm", "entries"}."""
        return self._dict("flush", vm=vm)

    def set_mode(self, vm: str, mode: str) -> dict[str, Any]:
        """Set enforce, monitor or quarantine: {"vm", "mode"}."""
        return self._dict("mode", vm=vm, mode=mode)

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
        except OSError as error:
            raise ControllerUnreachableError(
                f"no controller answers at {self._path} ({error.strerror or error}); "
                "start one by `vgw controller`"
            ) from error
        try:
            connection.request("POST", _PREFIX + verb, body, {"Content-Type": "application/json"})
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
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket; OSError when nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
