# SPDX-License-Identifier: Apache-2.0
"""The controller's socket under clients that mean no good: floods, slow ones, impostors."""

from __future__ import annotations

import _thread
import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from vgw.controller import api, api_limits, fitness
from vgw.controller.api_client import Client
from vgw.controller.parameters import Parameters
from vgw.errors import ControllerUnreachableError, VgwError

IDLE_CLIENTS = 1000
#: Threads that may begin beside those that clients wait in: the server's, and of requests.
OTHERS = 20

Serve = Callable[..., Path]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve `ping`, and what a test gives, on a socket."""
    with contextlib.ExitStack() as stack:

        def start(**verbs: Callable[[Parameters], object]) -> Path:
            server = api.Server(tmp_path / "vgw.sock", {"ping": lambda _: {"pid": 1}, **verbs})
            server.start()
            stack.callback(server.close)
            return tmp_path / "vgw.sock"

        yield start


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    client.settimeout(PATIENCE)
    return client


@pytest.fixture
def files() -> None:
    """Let this process have the files of all idle clients and of their other ends."""
    fitness.allow_many_files()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * IDLE_CLIENTS + 200:
        pytest.skip("too few files allowed")


def count_threads() -> int:
    """Return how many threads this process has."""
    return len(list(Path("/proc/self/task").iterdir()))


def idle_clients(path: Path, stack: contextlib.ExitStack) -> None:
    for _ in range(IDLE_CLIENTS):
        stack.enter_context(connected(path))


@pytest.mark.usefixtures("files")
def test_catalogue_N10_a_client_is_heard_beside_a_thousand_idle_ones(serve: Serve) -> None:
    before = count_threads()
    path = serve()
    with contextlib.ExitStack() as stack:
        idle_clients(path, stack)
        assert Client(path, timeout=PATIENCE).ping() == {"pid": 1}
        assert count_threads() - before <= api_limits.MAX_WAITING + OTHERS


def test_catalogue_N10_a_full_queue_is_no_absent_controller(tmp_path: Path) -> None:
    """Else the command would do the work itself, beside a controller that is only busy."""
    path = tmp_path / "vgw.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(connected(path))
        with pytest.raises(VgwError, match="takes no request") as raised:
            Client(path, timeout=0.1).ping()
    assert not isinstance(raised.value, ControllerUnreachableError)


@pytest.mark.usefixtures("files")
def test_without_a_limit_a_thousand_idle_clients_hold_a_thousand_threads(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is what keeps their number down, not how soon they are given up."""
    monkeypatch.setattr(api_limits, "MAX_WAITING", 10 * IDLE_CLIENTS)
    path = serve()
    with contextlib.ExitStack() as stack:
        idle_clients(path, stack)
        assert Client(path, timeout=PATIENCE).ping() == {"pid": 1}
        assert count_threads() > IDLE_CLIENTS // 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # left unclosed
def test_catalogue_N10_a_thread_that_dies_as_it_starts_costs_one_client(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does one that finds no memory, and threading.Thread waits for it for ever."""
    path = serve()
    start = _thread.start_new_thread
    died = threading.Event()

    def start_or_die(function: Callable[..., object], *more: Any) -> int:
        if died.is_set():
            return start(function, *more)
        died.set()
        return start(lambda: None, ())

    monkeypatch.setattr(api_limits, "REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(_thread, "start_new_thread", start_or_die)
    monkeypatch.setattr(threading, "_start_new_thread", start_or_die)
    with connected(path) as first:
        assert died.wait(PATIENCE)
        monkeypatch.setattr(api_limits, "REQUEST_SECONDS", PATIENCE)
        assert Client(path, timeout=PATIENCE).ping() == {"pid": 1}
        assert first.recv(1) == b"", "it is not left waiting"


def test_catalogue_N10_the_idle_client_that_waits_longest_gives_way(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_limits, "MAX_WAITING", 2)
    path = serve()
    with connected(path) as first, connected(path) as second, connected(path):
        assert first.recv(1) == b"", "it is closed"
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)


def test_catalogue_N10_a_client_that_asks_byte_by_byte_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, the request does not."""
    monkeypatch.setattr(api_limits, "REQUEST_SECONDS", 0.5)
    with connected(serve()) as client:
        client.sendall(b"POST /v1/ping HTTP/1.0\r\nContent-Length: 100000\r\n\r\n")
        client.settimeout(0.05)
        for _ in range(1000):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = client.recv(4096)
                break
        else:
            pytest.fail("it is still listened to")
        client.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):  # for the bytes that it did not read
            while part := client.recv(4096):
                answer += part
    assert answer.startswith(b"HTTP/1.0 400")
    assert b"the request ended after" in answer


def test_catalogue_N10_requests_beyond_the_limit_are_refused_at_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_SERVED", 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: Parameters) -> object:
        begun.set()
        assert go_on.wait(PATIENCE)
        return {"slow": True}

    path = serve(slow=slow)
    answers: list[object] = []
    caller = threading.Thread(target=lambda: answers.append(Client(path).call("slow")))
    caller.start()
    assert begun.wait(PATIENCE)
    with pytest.raises(VgwError, match="serves 1 requests already; try again"):
        Client(path).ping()
    go_on.set()
    caller.join(PATIENCE)
    assert answers == [{"slow": True}]
    assert Client(path).ping() == {"pid": 1}


def test_catalogue_N10_a_symlink_in_the_way_is_replaced_and_not_followed(
    tmp_path: Path, serve: Serve
) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "vgw.sock").symlink_to(target)
    path = serve()
    assert not path.is_symlink()
    assert target.read_text() == "kept"
    assert Client(path).ping() == {"pid": 1}


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_catalogue_N10_a_directory_that_others_can_write_is_refused(
    tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(VgwError, match=r"other users could put .*chmod 755"):
        api.Server(tmp_path / "vgw.sock", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_catalogue_N10_a_directory_that_others_can_read_is_none_of_their_business(
    tmp_path: Path, serve: Serve, mode: int
) -> None:
    tmp_path.chmod(mode)
    assert Client(serve()).ping() == {"pid": 1}


_IMPOSTOR = """
import os, socket, sys
os.chown(sys.argv[1], 65534, 65534)
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1] + "/vgw.sock"); listener.listen(); print("ready", flush=True)
    client = listener.accept()[0]
    print(client.makefile("rb").readline(), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_catalogue_N10_a_socket_of_another_user_gets_no_request() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vgw-socket-") as directory,  # pytest's are root's alone
        subprocess.Popen(
            [sys.executable, "-c", _IMPOSTOR, directory], stdout=subprocess.PIPE, text=True
        ) as impostor,
    ):
        assert impostor.stdout is not None
        assert impostor.stdout.readline() == "ready\n"
        with pytest.raises(ControllerUnreachableError, match="it is user id 65534 who listens"):
            Client(Path(directory) / "vgw.sock").ping()
        assert impostor.stdout.readline() == "b''\n", "it was told nothing"
