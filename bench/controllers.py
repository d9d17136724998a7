# SPDX-License-Identifier: Apache-2.0
"""Controllers in a lab: processes that are started, asked and ended in every way."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.lab import BenchError, Lab
from scripts.lab.wire import inside
from vgw.controller.api_client import Client

_PATIENCE: Final = 120.0
_PORT: Final = 9477
_ROOT: Final = Path(__file__).parents[1]
#: What starts vgw out of the directory that PYTHONPATH names.
_START: Final = "from vgw.cli import main; main()"
#: Where builds differ: what a program begins with.
_ENTRIES: Final = ("tc_from_vm", "tc_to_vm", "xdp_from_vm")
_SCHEDULER_CLOCK: Final = 2


@dataclass(slots=True)
class Controller:
    """A controller that is ready; `start_seconds` is from its start until it said so."""

    process: subprocess.Popen[bytes]
    client: Client
    namespace: str
    start_seconds: float

    def scrape(self) -> tuple[float, int]:
        """Return how many seconds a scrape took, and its bytes."""
        with inside(self.namespace):
            started = time.monotonic()
            address = f"http://127.0.0.1:{_PORT}/metrics"
            with urllib.request.urlopen(address, timeout=_PATIENCE) as answer:
                length = len(answer.read())
            return time.monotonic() - started, length

    def cpu_seconds(self) -> float:
        """Return how long it had a processor by now."""
        # The clock that clock_getcpuclockid(3) gives; /proc counts in hundredths of a second.
        return time.clock_gettime((~self.process.pid << 3) | _SCHEDULER_CLOCK)

    def memory_mib(self) -> float:
        """Return its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    def end(self, how: signal.Signals) -> None:
        """Send a signal that ends it, and wait."""
        self.process.send_signal(how)
        self.process.wait(_PATIENCE)


def start(
    lab: Lab, build: Path | None = None, options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a controller on the lab's host, of another build if given; it is not ready yet."""
    vgw = [lab.vgw_command] if build is None else [sys.executable, "-P", "-c", _START]
    environment = dict(lab.environment)
    if build is not None:
        environment["PYTHONPATH"] = str(build)
    environment["NOTIFY_SOCKET"] = str(lab.directory / "notify")
    with (lab.directory / "controller.err").open("ab") as errors:
        return subprocess.Popen(
            lab.command("host", *vgw, "controller", "--listen", f"127.0.0.1:{_PORT}", *options),
            env=environment,
            stderr=errors,
        )


@contextmanager
def controller(
    lab: Lab, build: Path | None = None, options: Sequence[str] = ()
) -> Iterator[Controller]:
    """Run a controller that is ready during the block; it is ended if it still runs."""
    address = lab.directory / "notify"
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(address))
        ready.settimeout(_PATIENCE)
        started = time.monotonic()
        process = start(lab, build, options)
        try:
            while ready.recv(256) != b"READY=1":
                pass
        except TimeoutError:
            process.kill()
            process.wait()
            errors = (lab.directory / "controller.err").read_text()[-500:]
            raise BenchError(f"the controller was not ready in time: {errors}") from None
        seconds = time.monotonic() - started
    client = Client(lab.directory / "run" / "vgw.sock", timeout=_PATIENCE)
    try:
        yield Controller(process, client, f"{lab.name}-host", seconds)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_PATIENCE)


def other_build(lab: Lab, number: int) -> Path:
    """Make a copy of this tree whose programs do the same by other instructions; return it."""
    copy = lab.directory / f"build-{number}"
    for part in ("vgw", "bpf"):
        shutil.copytree(_ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _ENTRIES:
        file = copy / "bpf" / f"{name}.c"
        head, brace, body = file.read_text().partition("\n{\n")
        if not brace:
            raise BenchError(f"bpf/{name}.c has no function to change")
        file.write_text(f"{head}{brace}\tvolatile u32 build = {number};\n\n\t(void)build;\n{body}")
    return copy
