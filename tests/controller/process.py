# SPDX-License-Identifier: Apache-2.0
"""A controller in a process of its own, for tests that look at it from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.patience import PATIENCE
from vgw.controller.api_client import Client
from vgw.controller.events import read_log
from vgw.controller.paths import _PLACES, Paths

#: Python by which a controller waits for its log as tests do: see conftest.py.
PATIENT_LOG = f"from vgw.controller import events; events.DRAIN_SECONDS = {PATIENCE}"
RUN = """
import json, sys
from pathlib import Path
from vgw.controller.daemon import run
from vgw.controller.log_choice import LogOptions
from vgw.controller.paths import _PLACES, Paths
run(Paths(**{name: Path(text) for name, text in json.loads(sys.argv[1]).items()}),
    ("127.0.0.1", int(sys.argv[2])), log_options=LogOptions(sys.argv[3:]), rule_metrics=True)
"""

_Value = TypeVar("_Value")


def eventually(what: str, ask: Callable[[], _Value | None], seconds: float = PATIENCE) -> _Value:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.02)
    pytest.fail(f"not within {seconds} s: {what}")


def environment_of(paths: Paths) -> dict[str, str]:
    """Return the variables by which a process of vgw has these places."""
    return {variable: str(getattr(paths, name)) for name, (variable, _) in _PLACES.items()}


def await_ready(notified: socket.socket) -> None:
    """Wait until a controller says on its service manager's socket that it is ready."""
    while (said := notified.recv(64)) != b"READY=1":
        assert said.startswith(b"EXTEND_TIMEOUT_USEC="), said


class Controller:
    """A controller in a process of its own; knows how to look at it from outside."""

    def __init__(
        self,
        paths: Paths,
        port: int,
        before: str = "",
        environ: Mapping[str, str] | None = None,
        log_to: Sequence[str] = ("file",),
    ) -> None:
        """Start one and wait until it is ready; `before` is Python that its process runs first."""
        self._paths = paths
        self._port = port
        self.client = Client(paths.socket, timeout=PATIENCE)
        self.output = paths.run_dir.with_name("controller.err")
        places = json.dumps({name: str(path) for name, path in asdict(paths).items()})
        address = str(paths.run_dir.with_name("notify"))
        Path(address).unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
            self.output.open("w") as output,
        ):
            ready.bind(address)
            ready.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"{PATIENT_LOG}\n{before}\n{RUN}",
                    places,
                    str(port),
                    *log_to,
                ],
                env={**os.environ, "NOTIFY_SOCKET": address, **(environ or {})},
                stderr=output,
            )
            try:
                await_ready(ready)
            except BaseException:
                self.end(signal.SIGKILL)
                pytest.fail(f"the controller did not start: {self.output.read_text()}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal that ends it and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    def records(self, event: str) -> list[dict[str, Any]]:
        """Return the records of one kind in the log."""
        return [found for found in read_log(self._paths.log_file) if found["event"] == event]

    def scrape(self) -> str:
        """Return what the exporter says."""
        return self.page("metrics")[1]

    def page(self, name: str) -> tuple[int, str]:
        """Return status and text of a page that the exporter serves."""
        address = f"http://127.0.0.1:{self._port}/{name}"
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, start: str) -> float:
        """Return the sum of the samples that begin like this."""
        lines = (line for line in self.scrape().splitlines() if line.startswith(start))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def attached(self) -> dict[str, int]:
        """Return VM -> generation of those that are protected."""
        return {
            row["vm"]: row["generation"]
            for row in self.client.status()["vms"]
            if all(interface["attached"] for interface in row["interfaces"])
        }

    def programs(self) -> list[int]:
        """Return the ids of all attached programs."""
        return [
            interface[path]["prog_id"]
            for row in self.client.status()["vms"]
            for interface in row["interfaces"]
            for path in ("from_vm", "to_vm")
        ]

    def memory_mb(self) -> float:
        """Return the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024
