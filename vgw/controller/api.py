# SPDX-License-Identifier: Apache-2.0
"""The controller's socket interface as it is served: HTTP/JSON, as api_protocol.py describes it."""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from vgw.controller.api_limits import (
    MAX_SERVED,
    REQUEST_SECONDS,
    Waiting,
    peer,
    require_own,
)
from vgw.controller.api_protocol import PREFIX, error_document
from vgw.controller.parameters import Parameters
from vgw.errors import VgwError
from vgw.threads import NoThreadError, start_thread

#: What serves one verb: its parameters in, what goes into "result" out.
Verb = Callable[[Parameters], object]

MAX_REQUEST_BYTES: Final = 32 << 20


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
            start_thread(self.process_request_thread, request, client_address)
        except NoThreadError:
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
        verb = self.server.verbs.get(self.path.removeprefix(PREFIX))
        if verb is None or not self.path.startswith(PREFIX):
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
