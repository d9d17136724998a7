# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of the metrics: one page, with TLS if asked for, and room for hostile clients.

Connections are waited for by one thread and cost it little until they have asked; whoever takes
long, or sends too much, is cut off, and the oldest that has not asked yet gives way to the next.
Scrapes are made one after the other, each by a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gzip
import ipaddress
import json
import logging
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

from prometheus_client.registry import Collector

from vgw.controller.metrics_text import CONTENT_TYPE, render
from vgw.errors import VgwError, out_of_memory
from vgw.threads import BEGIN_SECONDS, Call, start_thread

PAGE: Final = "/metrics"
HEALTH_PAGE: Final = "/healthz"
#: Bytes of a request with its headers; Prometheus sends some 300.
MAX_REQUEST_BYTES: Final = 16 << 10
#: Seconds until a connection has asked, TLS included, and until it has taken the answer.
ASK_SECONDS: Final = 5.0
TAKE_SECONDS: Final = 10.0
#: Connections that have not asked for a scrape, that wait for one, and that take one.
MAX_WAITING: Final = 256
MAX_SCRAPES: Final = 16
MAX_TAKING: Final = 16
#: Seconds between looks whether certificates were renewed.
RENEWAL_SECONDS: Final = 30.0
_BACKLOG: Final = 1024

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the server's certificate and key, and who may sign those of clients.

    Without `client_ca` clients need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return what a server needs. Raises VgwError when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load(context)
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                raise _unusable(self.client_ca, error) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def load(self, context: ssl.SSLContext) -> None:
        """Read certificate and key, for connections from now on. Raises VgwError."""
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ssl.SSLError, _EncryptedKeyError) as error:
            raise _unusable(self._at_fault(error), error) from error

    def _at_fault(self, error: Exception) -> Path:
        """Return the file that an error is about, which OpenSSL does not say."""
        if isinstance(error, _EncryptedKeyError):
            return self.key
        for file in (self.certificate, self.key):
            try:
                file.read_bytes()
            except OSError:
                return file
        return self.certificate

    def stamp(self) -> tuple[int, ...]:
        """Return what changes when certificate or key is written anew."""
        with contextlib.suppress(OSError):
            return tuple(file.stat().st_mtime_ns for file in (self.certificate, self.key))
        return ()


class _EncryptedKeyError(Exception):
    """The key needs a password, and nobody is there to type it."""

    def __str__(self) -> str:
        return "the key has a password"


def _no_password() -> str:
    raise _EncryptedKeyError


def _unusable(file: Path, error: Exception) -> VgwError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return VgwError(
        f"cannot serve metrics by TLS with {file}: {reason}; give files in PEM by --metrics-cert, "
        "--metrics-key and --metrics-client-ca"
    )


class MetricsServer:
    """Serves the metrics, and how the controller is, by HTTP until closed."""

    def __init__(
        self,
        listen: tuple[str, int],
        collector: Collector,
        tls: Tls | None = None,
        health: Callable[[], Mapping[str, object]] = lambda: {"ok": True},
    ) -> None:
        """Listen on an address and port, by TLS if there is `tls`; `health` is Health.report.

        Raises VgwError.
        """
        context = None if tls is None else tls.context()
        self._socket = _listening(listen)
        address, self.port = self._socket.getsockname()[:2]
        if tls is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            _logger.warning(
                "metrics are open to whoever reaches %s port %d; --metrics-cert and "
                "--metrics-client-ca restrict them",
                address,
                self.port,
            )
        self._collector = collector
        self._one_scrape = asyncio.Lock()
        self._call: Call[bytes] | None = None
        self._loop = asyncio.new_event_loop()
        door = _Door(self._socket, context, self._scrape, health)
        self._tasks = [self._loop.create_task(door.open())]
        if tls is not None and context is not None:
            self._tasks.append(self._loop.create_task(_renew(tls, context)))
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; who is being served is cut off."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            if self._call is not None and not self._call.withdraw():
                self._call.wait()
            self._socket.close()
            self._loop.close()

    async def _scrape(self, compress: bool) -> bytes:
        """Make a scrape; return the body of the answer."""

        def page() -> bytes:
            body = render(self._collector.collect())
            return gzip.compress(body, 1) if compress else body

        async with self._one_scrape:
            self._call = call = Call(page)
            await self._made(call)
        return call.result()

    async def _made(self, call: Call[bytes]) -> None:
        """Have a thread make a call. Raises VgwError when there is none, or none that begins."""
        ended = asyncio.Event()

        def make() -> None:
            call.make()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(ended.set)

        start_thread(make)
        while not call.is_made:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), BEGIN_SECONDS)
            if call.withdraw():
                raise out_of_memory()


def _listening(listen: tuple[str, int]) -> socket.socket:
    """Return a socket that listens on an address and port. Raises VgwError."""
    address, port = listen
    try:
        (family, _, _, _, place), *_ = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sock = socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise VgwError(
            f"cannot serve metrics on {address} port {port}: {reason or error}; "
            "choose another address by --listen"
        ) from error
    sock.setblocking(False)
    return sock


_Task = asyncio.Task[None]


def _admit(task: _Task, others: dict[_Task, None], room: int) -> None:
    """Put a task among others; the oldest gives way when there is no room."""
    others[task] = None
    if len(others) > room:
        oldest = next(iter(others))
        del others[oldest]
        oldest.cancel()


class _Door:
    """Lets connections in, a task for each."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext | None,
        scrape: Callable[[bool], Awaitable[bytes]],
        health: Callable[[], Mapping[str, object]],
    ) -> None:
        self._health = health
        self._listener = listener
        self._context = context
        self._scrape = scrape
        self._waiting: dict[_Task, None] = {}
        self._scraping: set[_Task] = set()
        self._taking: dict[_Task, None] = {}

    async def open(self) -> None:
        """Let connections in for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # it has gone again, or this process has too many files
                await asyncio.sleep(0 if error.errno == errno.ECONNABORTED else 0.1)
                continue
            task = loop.create_task(self._serve(sock))
            task.add_done_callback(functools.partial(self._forget, sock))
            _admit(task, self._waiting, MAX_WAITING)

    def _forget(self, sock: socket.socket, task: _Task) -> None:
        sock.close()  # also of a task that gave way before it began
        self._waiting.pop(task, None)
        self._scraping.discard(task)
        self._taking.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            _logger.error("a client of the metrics met a bug", exc_info=task.exception())

    async def _serve(self, sock: socket.socket) -> None:
        """Answer one request of one connection."""
        reader = asyncio.StreamReader(MAX_REQUEST_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        secured = None if self._context is None else ASK_SECONDS
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(ASK_SECONDS):
                transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: protocol, sock, ssl=self._context, ssl_handshake_timeout=secured
                )
                request = await reader.readuntil(b"\r\n\r\n")
            writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
            writer.write(await self._answer(request))
            async with asyncio.timeout(TAKE_SECONDS):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client is slow, gone or talks too much, which is its own affair
        finally:
            if transport is not None:
                transport.abort()

    async def _answer(self, request: bytes) -> bytes:
        method, path, headers = _parse(request)
        if method not in ("GET", "HEAD"):
            return _message(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        if path == HEALTH_PAGE:
            return _health_message(self._health(), head=method == "HEAD")
        if path != PAGE:
            return _message(HTTPStatus.NOT_FOUND)
        task = asyncio.current_task()
        if len(self._scraping) >= MAX_SCRAPES or task not in self._waiting:
            return _message(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"})
        del self._waiting[task]
        self._scraping.add(task)
        compress = "gzip" in headers.get("accept-encoding", "")
        try:
            body = await self._scrape(compress)
        except Exception:  # a bug that one scrape meets must not be an empty page
            _logger.exception("a scrape failed")
            return _message(HTTPStatus.INTERNAL_SERVER_ERROR)
        finally:
            self._scraping.discard(task)
            _admit(task, self._taking, MAX_TAKING)
        more = {"Content-Encoding": "gzip"} if compress else {}
        return _message(
            HTTPStatus.OK, {"Content-Type": CONTENT_TYPE, **more}, body, head=method == "HEAD"
        )


def _health_message(report: Mapping[str, object], *, head: bool) -> bytes:
    """Return the answer to who asks how the controller is."""
    status = HTTPStatus.OK if report["ok"] else HTTPStatus.SERVICE_UNAVAILABLE
    body = json.dumps(report).encode() + b"\n"
    return _message(status, {"Content-Type": "application/json"}, body, head=head)


def _parse(request: bytes) -> tuple[str, str, dict[str, str]]:
    """Return method, path without query, and headers of a request; nothing of one that is none."""
    line, *rest = request.decode("latin-1").split("\r\n")
    words = line.split(" ")
    method, target = words[:2] if len(words) == 3 else ("", "")
    fields = (field.partition(":") for field in rest)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    return method, target.partition("?")[0], headers


def _message(
    status: HTTPStatus,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
    *,
    head: bool = False,
) -> bytes:
    """Return an answer, whose body says the status by default."""
    if body is None:
        body = f"{status.value} {status.phrase}\n".encode()
    fields = {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else body)


async def _renew(tls: Tls, context: ssl.SSLContext) -> None:
    """Take certificates that were renewed for later connections."""
    stamp = tls.stamp()
    while True:
        await asyncio.sleep(RENEWAL_SECONDS)
        if tls.stamp() in (stamp, ()):
            continue
        stamp = tls.stamp()
        try:
            tls.load(context)
        except VgwError as error:
            _logger.error("the certificate from before stays: %s", error)
