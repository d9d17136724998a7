# SPDX-License-Identifier: Apache-2.0
"""The controller's socket: what crosses it, who may speak, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from vgw.controller import api
from vgw.controller.api_client import Client
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

ERRORS: list[VgwError] = [
    VgwError("something"),
    CompileError("bpf/parse.h:3: no"),
    ForeignProgramError("XDP program 7 sits on tap0"),
    KernelError("map create failed", 12),
    VerifierError("refused", 13, "last line of the log"),
    PartlyAppliedError({"web01": "too many rules", "db01": "no interface"}),
    PartlyAppliedError({"web01": "too many rules"}, [{"vm": "db01", "interfaces": ["tap1"]}]),
    PolicyError([Problem("a.yaml", 3, 7, "vms.web01", "no"), Problem("b.yaml", 0, 0, "", "x")]),
]


class FakeHost:
    """Stands in for the controller: remembers what it was asked, raises what it is given."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def take(self, parameters: Parameters) -> object:
        self.asked.append(dict(parameters.values))
        if self.error is not None:
            raise self.error
        return {"seen": parameters.values}


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def socket_path(tmp_path: Path, host: FakeHost) -> Iterator[Path]:
    verbs = dict.fromkeys(
        (
            *("attach", "detach", "apply", "rollback", "status", "rules", "conntrack", "flush"),
            *("mode", "ping", "vms"),
        ),
        host.take,
    )
    server = api.Server(tmp_path / "vgw.sock", verbs | {"text": lambda _: "text"})
    server.start()
    try:
        yield tmp_path / "vgw.sock"
    finally:
        server.close()


def raw_request(path: Path, request: bytes) -> tuple[int, dict[str, Any]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    document: dict[str, Any] = json.loads(body)
    return int(head.split()[1]), document


def test_every_verb_reaches_the_host_with_its_parameters(socket_path: Path, host: FakeHost) -> None:
    client = Client(socket_path)
    sources = [("policy.yaml", "schema: vgw/v1\n")]

    client.ping()
    client.attach("web01", sources=sources, interfaces=["tap0"], hook="tc", force=True)
    client.attach("web01")
    client.attach_many(["web01", "db01"])
    client.detach("web01")
    client.detach_all()
    client.apply(sources, ["web01"])
    client.rollback(7)
    client.status()
    client.rules("web01")
    client.conntrack("web01")
    client.flush("web01")
    client.set_mode("web01", "monitor")
    client.vms()
    client.attach("web01", told=[("tap0", None)])

    wire_sources = [["policy.yaml", "schema: vgw/v1\n"]]
    attach: dict[str, object] = {
        "vm": "web01",
        "sources": None,
        "interfaces": [],
        "hook": None,
        "force": False,
        "told": None,
        "own": False,
    }
    apply = {"dry_run": False, "force": False, "confirm_seconds": None, "supersede": False}
    assert host.asked == [
        {},
        attach | {"sources": wire_sources, "interfaces": ["tap0"], "hook": "tc", "force": True},
        attach,
        {"vms": ["web01", "db01"], "sources": None, "force": False, "own": False},
        {"vm": "web01"},
        {"all": True},
        {"sources": wire_sources, "vms": ["web01"], **apply},
        {"number": 7},
        {"vm": None},
        {"vm": "web01"},
        {"vm": "web01"},
        {"vm": "web01"},
        {"vm": "web01", "mode": "monitor", "reason": "", "release": False},
        {},
        attach | {"told": [["tap0", None]]},
    ]


def test_result_comes_back(socket_path: Path) -> None:
    assert Client(socket_path).status("ä\n\x1b") == {"seen": {"vm": "ä\n\x1b"}}
    assert Client(socket_path).call("text") == "text"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_as_they_were_raised(
    socket_path: Path, host: FakeHost, error: VgwError
) -> None:
    host.error = error

    with pytest.raises(VgwError) as raised:
        Client(socket_path).flush("web01")

    assert type(raised.value) is type(error)
    assert str(raised.value) == str(error)
    assert raised.value.exit_code == error.exit_code
    assert vars(raised.value) == vars(error)


def test_bug_in_the_controller_is_an_error_and_the_next_request_works(
    socket_path: Path, host: FakeHost, capfd: pytest.CaptureFixture[str]
) -> None:
    host.error = ZeroDivisionError("division by zero")
    with pytest.raises(VgwError, match=r"internal error.*ZeroDivisionError"):
        Client(socket_path).ping()
    host.error = None

    assert Client(socket_path).ping() == {"seen": {}}
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("length", [0, 1 << 20], ids=["short", "longer than what is in flight"])
def test_unknown_verb(socket_path: Path, length: int) -> None:
    with pytest.raises(VgwError, match="does not know /v1/reboot"):
        Client(socket_path).call("reboot", padding=" " * length)


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        (b"POST /v1/ping HTTP/1.0\r\n\r\n", 411, "no Content-Length"),
        (b"POST /v1/ping HTTP/1.0\r\nContent-Length: x\r\n\r\n", 411, "no Content-Length"),
        (b"POST /v1/ping HTTP/1.0\r\nContent-Length: 99999999\r\n\r\n", 413, "larger than"),
        (b"POST /v1/ping HTTP/1.0\r\nContent-Length: 1\r\n\r\n{", 400, "not JSON"),
        (b"POST /v1/ping HTTP/1.0\r\nContent-Length: 2\r\n\r\n[]", 400, "not a JSON object"),
        (b"POST /v1/ping HTTP/1.0\r\nContent-Length: 9\r\n\r\n{}", 400, "after 2 of its 9 bytes"),
        (
            b"POST /v1/ping HTTP/1.0\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000,
            400,
            "not JSON",
        ),
        (b"POST /ping HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", 404, "does not know /ping"),
        (b"POST ping HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", 404, "does not know ping"),
    ],
)
def test_catalogue_N10_what_is_no_request_is_refused_and_reaches_nobody(
    socket_path: Path, host: FakeHost, request_bytes: bytes, status: int, message: str
) -> None:
    answered, document = raw_request(socket_path, request_bytes)

    assert answered == status
    assert document["ok"] is False
    assert message in document["error"]["message"]
    assert document["error"]["exit_code"] == ExitCode.FAILED
    assert host.asked == []


def test_catalogue_N10_request_that_does_not_come_is_given_up(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api._RequestHandler, "timeout", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(socket_path))
        sock.sendall(b"POST /v1/ping HTTP/1.0\r\nContent-Length: 10\r\n\r\n{")
        answer = sock.recv(4096)

    assert answer.startswith(b"HTTP/1.0 408")


def test_catalogue_N10_socket_is_for_its_owner_only(socket_path: Path) -> None:
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_catalogue_N10_other_user_is_refused_even_with_the_socket_open_to_all(
    tmp_path: Path, socket_path: Path, host: FakeHost
) -> None:
    socket_path.chmod(0o666)
    tmp_path.chmod(0o711)
    script = (
        "import os, socket; os.setgid(65534); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX); s.connect('vgw.sock');"
        "s.sendall(b'POST /v1/ping HTTP/1.0\\r\\nContent-Length: 2\\r\\n\\r\\n{}');"
        "print(s.makefile().read())"
    )

    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    ).stdout

    assert answer.startswith("HTTP/1.0 403")
    assert "user id 65534" in answer
    assert host.asked == []


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ControllerUnreachableError, match=r"No such file.*vgw controller") as raised:
        Client(tmp_path / "vgw.sock").ping()
    assert raised.value.exit_code == ExitCode.CONTROLLER_UNREACHABLE


def test_stale_socket_is_unreachable_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vgw.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(ControllerUnreachableError, match="refused"):
        Client(path).ping()

    server = api.Server(path, {"ping": lambda _: {"pid": 1}})
    try:
        with pytest.raises(ControllerUnreachableError, match="refused"):
            Client(path).ping()  # whoever asks too early does the work itself
        server.start()
        assert Client(path).ping() == {"pid": 1}
    finally:
        server.close()

    assert not path.exists()


def test_request_taken_but_not_answered_is_not_unreachable(tmp_path: Path) -> None:
    """The difference matters: the CLI does the work itself when nobody was asked."""
    path = tmp_path / "vgw.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(VgwError, match="gave no answer") as raised:
            Client(path, timeout=0.1).flush("web01")

    assert type(raised.value) is VgwError


def test_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match=r"cannot serve on .*VGW_RUN_DIR"):
        api.Server(tmp_path / ("x" * 120), {})


def test_many_requests_at_once(socket_path: Path, host: FakeHost) -> None:
    threads = [threading.Thread(target=lambda: Client(socket_path).ping()) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert len(host.asked) == 50
