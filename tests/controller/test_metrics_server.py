# SPDX-License-Identifier: Apache-2.0
"""The metrics' server and those who mean it ill, and TLS with real certificates."""

from __future__ import annotations

import _thread
import contextlib
import http.client
import resource
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.controller.process import eventually
from tests.controller.test_metrics import READING, FakeController
from tests.patience import PATIENCE
from vgw.cli import cli
from vgw.controller import metrics_server
from vgw.controller.fitness import allow_many_files
from vgw.controller.metrics_server import MAX_REQUEST_BYTES, MetricsServer, Tls
from vgw.errors import VgwError

HEAD = b"GET /metrics HTTP/1.1\r\nHost: here\r\n"


class Served:
    """A server of the metrics of one endpoint, and clients of it."""

    def __init__(self, tls: Tls | None = None, host: str = "127.0.0.1") -> None:
        self.controller = FakeController()
        self.server = MetricsServer((host, 0), self.controller.collector(), tls)
        self.port = self.server.port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def scrape(self, context: ssl.SSLContext | None = None) -> str:
        address = f"http{'' if context is None else 's'}://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(address, timeout=PATIENCE, context=context) as answer:  # noqa: S310
            assert answer.status == 200
            text: str = answer.read().decode()
        return text

    def works(self) -> bool:
        return "vgw_attached{" in self.scrape()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.server.close()


def closed(sock: socket.socket) -> bool:
    """Tell whether the other end closes a connection within the test's patience."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


# --- what is served ---------------------------------------------------------------------------


def test_pages_and_methods(served: Served) -> None:
    answers: dict[tuple[str, str], tuple[int, int]] = {}
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/metrics?name[]=x"),
        ("HEAD", "/metrics"),
        ("GET", "/"),
        ("GET", "/metrics/../etc/passwd"),
        ("POST", "/metrics"),
        ("DELETE", "/metrics"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        connection.request(method, path)
        answer = connection.getresponse()
        answers[method, path] = answer.status, len(answer.read())
        connection.close()
    size = len(served.scrape())
    assert answers == {
        ("GET", "/metrics"): (200, size),
        ("GET", "/metrics?name[]=x"): (200, size),
        ("HEAD", "/metrics"): (200, 0),
        ("GET", "/"): (404, len("404 Not Found\n")),
        ("GET", "/metrics/../etc/passwd"): (404, len("404 Not Found\n")),
        ("POST", "/metrics"): (405, len("405 Method Not Allowed\n")),
        ("DELETE", "/metrics"): (405, len("405 Method Not Allowed\n")),
    }


@pytest.mark.parametrize("line", [b"", b"GET", b"GET /metrics", b"\x16\x03\x01\xff", b"a b c d"])
def test_what_is_no_request_is_refused(served: Served, line: bytes) -> None:
    with served.connect() as sock:
        sock.sendall(line + b"\r\n\r\n")
        assert sock.recv(64).startswith(b"HTTP/1.1 405 ")
    assert served.works()


def test_an_answer_is_compressed_for_whoever_takes_it(served: Served) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.port}/metrics", headers={"Accept-Encoding": "gzip"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
        assert answer.headers["Content-Encoding"] == "gzip"
        assert answer.read(2) == b"\x1f\x8b"


def test_a_scrape_that_fails_is_no_empty_page(served: Served) -> None:
    served.controller.__dict__["readings"] = None  # iterating over it raises
    with pytest.raises(urllib.error.HTTPError, match="500"):
        served.scrape()
    served.controller.readings = [READING]
    assert served.works()


def test_catalogue_M30_a_scrape_without_a_thread_holds_up_no_later_one(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends as it begins, as for want of memory, and one that the host does not give."""

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(metrics_server, "BEGIN_SECONDS", 0.1)
    for start in (lambda *_: 0, refuse):
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", start)
            patch.setattr(threading, "_start_new_thread", start)
            with pytest.raises(urllib.error.HTTPError, match="500"):
                served.scrape()
        assert served.works()


def test_the_server_closes_while_a_scrape_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, begun, let_go = Served(), threading.Event(), threading.Event()

    def slowly(_: object) -> str:
        begun.set()
        assert let_go.wait(PATIENCE)
        return ""

    monkeypatch.setattr(metrics_server, "render", slowly)
    with made.connect() as sock:
        sock.sendall(HEAD + b"\r\n")
        assert begun.wait(PATIENCE)
        threading.Timer(0.2, let_go.set).start()
        made.server.close()
        assert let_go.is_set(), "it ends before what it reads is closed"
        assert closed(sock)


# --- N9: slow, many, large --------------------------------------------------------------------


@pytest.fixture
def hasty() -> Iterator[pytest.MonkeyPatch]:
    """Have little time to ask, until it is undone: a scrape may have to wait for a processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_server, "ASK_SECONDS", 0.3)
        yield patch


@pytest.mark.parametrize("beginning", [b"", b"GET", HEAD])
def test_catalogue_N9_who_asks_slowly_is_cut_off(
    served: Served, hasty: pytest.MonkeyPatch, beginning: bytes
) -> None:
    with served.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(beginning)
        assert closed(sock)
    hasty.undo()
    assert served.works()


@pytest.mark.usefixtures("hasty")
def test_catalogue_N9_a_byte_now_and_then_buys_no_time(served: Served) -> None:
    stop = threading.Event()
    with served.connect() as sock:

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    sock.send(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert closed(sock)
        finally:
            stop.set()
            thread.join()


def test_catalogue_N9_who_takes_slowly_is_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "TAKE_SECONDS", 0.3)
    served.controller.readings = [READING] * 4_000
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", served.port))
        sock.sendall(HEAD + b"\r\n")
        assert sock.recv(16, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        served.controller.readings = [READING]
        assert served.works()
        taken = 0
        with contextlib.suppress(ConnectionError):
            time.sleep(1)  # what is being tested: doing nothing for longer than allowed
            while data := sock.recv(1 << 20):
                taken += len(data)
        assert taken < 6_000_000


def test_catalogue_N9_oversized_requests_end_the_connection(served: Served) -> None:
    for size in (MAX_REQUEST_BYTES, 4 << 20):
        with served.connect() as sock, contextlib.suppress(ConnectionError):
            sock.sendall(HEAD + b"X: " + b"a" * size)
            assert closed(sock)
    assert served.works()
    with served.connect() as sock:  # the control: what just fits is answered
        sock.sendall(HEAD + b"X: " + b"a" * (MAX_REQUEST_BYTES - 100) + b"\r\n\r\n")
        assert sock.recv(16).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def many_files() -> Iterator[int]:
    """Let this process have many files open; gives how many connections that is enough for."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_many_files()
    yield min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3, 3000)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("room", [None, 1 << 20], ids=["limited", "control"])
def test_catalogue_N9_thousands_of_connections(
    served: Served, many_files: int, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    """The oldest give way, so a scrape finds room; the control has room for all."""
    if room is not None:
        monkeypatch.setattr(metrics_server, "MAX_WAITING", room)
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(many_files)]
        assert served.works()
        took = time.monotonic() - begin
        idle[0].settimeout(PATIENCE if room is None else 0.5)
        if took < metrics_server.ASK_SECONDS - 1 or room is None:
            assert closed(idle[0]) == (room is None)
    assert served.works()


def test_catalogue_N9_scrapes_that_are_not_taken_hold_up_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "MAX_TAKING", 2)
    served.controller.readings = [READING] * 2_000
    with contextlib.ExitStack() as stack:
        takers = []
        for _ in range(3 * metrics_server.MAX_TAKING):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(60)
            sock.connect(("127.0.0.1", served.port))
            sock.sendall(HEAD + b"\r\n")
            assert sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
            takers.append(sock)
        served.controller.readings = [READING]
        assert served.works()


def test_catalogue_N9_is_bound_to_loopback_and_warns_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    option = next(o for o in cli.commands["controller"].params if o.name == "listen")
    assert str(option.default).startswith("127.0.0.1:")
    for host, warns in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):  # noqa: S104
        caplog.clear()
        Served(host=host).server.close()
        assert ("metrics are open to whoever reaches" in caplog.text) == warns


# --- TLS --------------------------------------------------------------------------------------


class Authority:
    """A certificate authority, by openssl."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.certificate, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        subject: list[str | Path] = [
            "-subj",
            f"/CN={name}",
            "-keyout",
            self.key,
            "-out",
            self.certificate,
        ]
        openssl("req", "-x509", *_NEW_KEY, *subject, "-days", "2")

    def sign(self, name: str, *options: str) -> tuple[Path, Path]:
        """Return a certificate for 127.0.0.1 and its key."""
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        request = self._directory / f"{name}.csr"
        openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request, *options)
        extensions = self._directory / "san"
        extensions.write_text("subjectAltName=IP:127.0.0.1\n")
        files: list[str | Path] = [
            "-CA",
            self.certificate,
            "-CAkey",
            self.key,
            "-extfile",
            extensions,
        ]
        openssl("x509", "-req", "-in", request, "-out", certificate, "-days", "2", *files)
        return certificate, key


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@contextlib.contextmanager
def served_by(tls: Tls) -> Iterator[Served]:
    made = Served(tls)
    try:
        yield made
    finally:
        made.server.close()


def client(trusts: Authority, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=trusts.certificate)
    if own is not None:
        context.load_cert_chain(*own)
    return context


def test_tls_serves_who_trusts_the_certificate(authority: Authority, stranger: Authority) -> None:
    with served_by(Tls(*authority.sign("server"))) as served:
        assert "vgw_attached{" in served.scrape(client(authority))
        for context in (client(stranger), None):
            with pytest.raises((urllib.error.URLError, http.client.HTTPException, OSError)):
                served.scrape(context)
        old = client(authority)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(urllib.error.URLError):
            served.scrape(old)


def test_catalogue_N9_who_has_no_certificate_gets_nothing(
    authority: Authority, stranger: Authority
) -> None:
    with served_by(Tls(*authority.sign("server"), authority.certificate)) as served:
        assert "vgw_attached{" in served.scrape(client(authority, authority.sign("prometheus")))
        for own in (None, stranger.sign("prometheus")):
            with pytest.raises((urllib.error.URLError, OSError)) as caught:
                served.scrape(client(authority, own))
            assert "vgw" not in str(caught.value)
        assert "vgw_attached{" in served.scrape(client(authority, authority.sign("again")))


@pytest.mark.usefixtures("hasty")
def test_catalogue_N9_who_begins_tls_slowly_is_cut_off(authority: Authority) -> None:
    with served_by(Tls(*authority.sign("server"))) as served:
        with served.connect() as sock:
            assert closed(sock)
        with served.connect() as sock:
            sock.sendall(b"\x16\x03\x01\x00")
            assert closed(sock)


def test_a_renewed_certificate_is_taken(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "RENEWAL_SECONDS", 0.02)
    certificate, key = authority.sign("renewed")
    with served_by(Tls(certificate, key)) as served:
        before = ssl.get_server_certificate(("127.0.0.1", served.port))
        whole = certificate.read_text()
        certificate.write_text("half")  # stays without effect
        authority.sign("renewed")
        assert certificate.read_text() != whole
        eventually(
            "the new certificate is shown",
            lambda: ssl.get_server_certificate(("127.0.0.1", served.port)) != before,
        )
        assert "vgw_attached{" in served.scrape(client(authority))


def test_files_that_will_not_do_are_named(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.sign("server")
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", key, "-out", locked, "-aes256", "-passout", "pass:secret")
    garbage, missing = tmp_path / "garbage", tmp_path / "missing"
    garbage.write_text("no certificate")
    for tls, message in (
        (Tls(missing, key), f"with {missing}: No such file"),
        (Tls(certificate, missing), f"with {missing}: No such file"),
        (Tls(garbage, key), f"with {garbage}: "),
        (Tls(certificate, stranger.sign("other")[1]), f"with {certificate}: KEY_VALUES_MISMATCH"),
        (Tls(certificate, locked), f"with {locked}: the key has a password"),
        (Tls(certificate, key, garbage), f"with {garbage}: "),
        (Tls(certificate, key, missing), f"with {missing}: No such file"),
    ):
        with pytest.raises(VgwError) as caught:
            Served(tls)
        assert message in str(caught.value)
        assert str(caught.value).endswith("--metrics-key and --metrics-client-ca")
