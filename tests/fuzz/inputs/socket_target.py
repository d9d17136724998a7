# SPDX-License-Identifier: Apache-2.0
"""The controller's socket: real connections to a real server, whose verbs are the controller's.

The host is one in a network namespace with a bpffs of its own, and has no interfaces: every verb
does its work up to where an interface would be needed.
"""

from __future__ import annotations

import json
import logging
import random
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tests.controller.conftest import own_network
from tests.fuzz.inputs.bytes_mutator import dumped, mutate_json
from tests.fuzz.inputs.target import WrongError, outline, quick_directory
from tests.policy.texts import rule
from vgw.controller import api
from vgw.controller.api_client import Client
from vgw.controller.changes import Changes
from vgw.controller.events import LogWriter
from vgw.controller.metrics import ApplyTimes
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.verbs import Verbs
from vgw.errors import VgwError

_PATIENCE: Final = 30.0
_HEAD: Final = b"\r\n\r\n"
#: One input in so many is followed by a request that has to be answered.
_CHECKED: Final = 25
_SOURCES: Final = [["policy.yaml", rule("from: [office]")]]
_REQUESTS: Final[Sequence[tuple[str, dict[str, Any]]]] = (
    ("ping", {}),
    ("status", {}),
    ("status", {"vm": "web01"}),
    ("attach", {"vm": "web01", "sources": _SOURCES, "interfaces": ["tap1"], "hook": "tc"}),
    ("attach", {"vms": ["web01", "db01"], "sources": _SOURCES, "force": True}),
    ("apply", {"sources": _SOURCES, "vms": ["web01"], "dry_run": True}),
    ("apply", {"sources": _SOURCES, "vms": None, "dry_run": False}),
    ("detach", {"vm": "web01"}),
    ("detach", {"all": True}),
    ("rules", {"vm": "web01"}),
    ("conntrack", {"vm": "web01"}),
    ("flush", {"vm": "web01"}),
    ("mode", {"vm": "web01", "mode": "monitor"}),
)
_RAW: Final = (
    b"",
    b"\0" * 100,
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /v1/ping HTTP/9.9\r\n\r\n",
    b"POST /v1/ping\r\n",
    b"POST /v1/ping HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}",
    b"POST /v1/ping HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/" + b"a" * 70000 + b" HTTP/1.0\r\n\r\n",
    b"POST /v1/ping HTTP/1.0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"POST /v1/../../etc HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
)


def _request(path: str, body: bytes) -> bytes:
    return f"POST /v1/{path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class SocketTarget:
    """Sends each input by a connection of its own, and reads the answer to its end."""

    has_structure = True
    words: Sequence[bytes] = (
        b"\r\n", b"POST ", b"GET ", b"/v1/", b" HTTP/1.0", b" HTTP/1.1", b"Content-Length: ", b"-1",
        b"99999999999", b"{", b"}", b"[", b"]", b'"vm":', b'"vms":', b'"sources":', b"null",
        b"true", b"\0", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n",
        *(verb.encode() for verb, _ in _REQUESTS),
    )  # fmt: skip

    def __init__(self) -> None:
        self._socket = Path()
        self._escaped: list[str] = []
        self._given = 0

    def seeds(self) -> Sequence[bytes]:
        """Return a request for each verb, and what is none."""
        return [*(_request(verb, dumped(values)) for verb, values in _REQUESTS), *_RAW]

    def shape(self, chance: random.Random, data: bytes) -> bytes:
        """Return the request with a right length, mostly, and often a change within its body."""
        head, middle, body = data.partition(_HEAD)
        if not middle or chance.random() < 0.25:
            return data
        with suppress(ValueError, RecursionError):
            value = json.loads(body)
            for _ in range(chance.choice((0, 1, 1, 2, 4))):
                value = mutate_json(chance, value)
            body = dumped(value)
        head = re.sub(rb"(?i)content-length: *-?[0-9]+", b"Content-Length: %d" % len(body), head)
        return head + middle + body

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve a host of its own."""
        with quick_directory() as root, own_network(), _bpffs(root):
            paths = Paths(
                policy=root / "policy.yaml",
                run_dir=root / "run",
                state_dir=root / "state",
                bpffs=root / "bpf" / "vgw",
                cache_dir=root / "cache",
                log_file=root / "events.jsonl",
            )
            paths.run_dir.mkdir(mode=0o700)
            host, log = Host(paths), LogWriter(paths.log_file)
            server = api.Server(paths.socket, Verbs(Changes(host, log, ApplyTimes())).by_name())
            self._socket = paths.socket
            with _exceptions_kept(self._escaped):
                server.start()
                try:
                    yield
                finally:
                    server.close()
                    log.close()
                    host.kept.close()

    def give(self, data: bytes) -> Hashable:
        """Send an input and judge the answer; now and then ask what has to be answered."""
        answer = self._exchange(data)
        if self._escaped:
            raise WrongError("".join(self._escaped[:1]))
        self._given += 1
        if self._given % _CHECKED == 0 and self._abi() < 1:
            raise WrongError("no answer to a good request")
        head, _, body = answer.partition(_HEAD)
        if not head.startswith(b"HTTP/"):
            return outline(answer[:60].decode(errors="replace"))
        status = head.split(b" ")[1]
        if status == b"500":
            raise WrongError(body.decode(errors="replace"))
        if b"application/json" not in head:
            return status
        document = json.loads(body)
        if document["ok"] is not (status == b"200"):
            raise WrongError(f"{status!r} with {document}")
        return status, None if document["ok"] else outline(document["error"]["message"])

    def _abi(self) -> int:
        """Ask a good request; one that meets connections not yet closed may be refused at first."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return int(Client(self._socket, _PATIENCE).ping()["abi"])
            except VgwError:
                if time.monotonic() > deadline:
                    raise

    def _exchange(self, data: bytes) -> bytes:
        answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(self._socket))
            client.settimeout(_PATIENCE)
            # It may answer and close before it has read all.
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while part := client.recv(65536):
                    answer += part
        return answer


@contextmanager
def _exceptions_kept(escaped: list[str]) -> Iterator[None]:
    """Have what the server would write to stderr about an exception put into a list."""
    before, hook, unraisable = traceback.print_exc, threading.excepthook, sys.unraisablehook

    def keep() -> None:
        escaped.append(f"escaped: {sys.exception()!r}")

    def keep_of_thread(arguments: Any) -> None:
        escaped.append(f"escaped from a thread: {arguments.exc_value!r}")

    def keep_of_request(arguments: Any) -> None:
        if "thread started by" not in (arguments.err_msg or ""):
            unraisable(arguments)
            return
        escaped.append(f"escaped from a thread: {arguments.exc_value!r}")

    escaped.clear()
    logging.disable()
    traceback.print_exc = keep  # type: ignore[assignment]
    threading.excepthook = keep_of_thread
    sys.unraisablehook = keep_of_request
    try:
        yield
    finally:
        traceback.print_exc, threading.excepthook, sys.unraisablehook = before, hook, unraisable
        logging.disable(logging.NOTSET)


@contextmanager
def _bpffs(root: Path) -> Iterator[None]:
    """Have a bpffs in a directory, which goes in the end."""
    (root / "bpf").mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", root / "bpf"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", root / "bpf"], check=True)
