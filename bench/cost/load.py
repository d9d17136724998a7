# SPDX-License-Identifier: Apache-2.0
"""The traffic of measurements through the stacks of a lab's namespaces (bench/load.c)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.lab import CARDS, BenchError, Lab

_PORT: Final = 20_500
#: A sink ends on its own after this time, whatever becomes of the bench.
_SINK_SECONDS: Final = 120
_PATIENCE: Final = 60.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
#: Columns of /proc/stat's first line that are time at work: all but idle, iowait and guests'.
_BUSY: Final = (0, 1, 2, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class Stream:
    """TCP as much as went: bytes that arrived, and the processors' time for all of it."""

    bytes: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Datagrams:
    """UDP as many as went out, and came in."""

    sent: int
    received: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Trips:
    """Round trips of a byte over TCP."""

    trips: int
    seconds: float
    median_ns: int
    p99_ns: int


class Load:
    """Traffic between two nodes of a lab; `program` is what bench.native.build("load") made."""

    def __init__(self, lab: Lab, program: Path) -> None:
        self._lab = lab
        self._program = program

    def stream(
        self, sender: str, receiver: str, version: int, seconds: float, streams: int
    ) -> Stream:
        """Send as much as goes over some TCP connections."""
        with self._sink("stream-sink", receiver, version):
            began = busy_seconds()
            found = self._run("stream", sender, receiver, version, seconds, streams)
            return Stream(**found, cpu_seconds=busy_seconds() - began)

    def datagrams(
        self, sender: str, receiver: str, version: int, seconds: float, size: int
    ) -> Datagrams:
        """Send as many UDP datagrams of `size` bytes of payload as go out."""
        with self._sink("datagram-sink", receiver, version) as ended:
            began = busy_seconds()
            found = self._run("datagrams", sender, receiver, version, seconds, size)
            cpu_seconds = busy_seconds() - began
            received = ended()["received"]
        return Datagrams(**found, received=received, cpu_seconds=cpu_seconds)

    def trips(self, sender: str, receiver: str, version: int, seconds: float) -> Trips:
        """Send a byte there and back, again and again."""
        with self._sink("echo", receiver, version):
            return Trips(**self._run("ping", sender, receiver, version, seconds))

    @contextmanager
    def _sink(self, role: str, node: str, version: int) -> Iterator[Any]:
        """Run a sink for a block; yields what ends it early and returns what it prints."""
        process = subprocess.Popen(
            self._words(role, node, node, version, _SINK_SECONDS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def ended() -> Any:
            output, _ = process.communicate(timeout=_PATIENCE)
            return json.loads(output)

        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise BenchError(f"the {role} of the lab did not start")
            yield ended
        finally:
            if process.returncode is None:
                process.communicate(timeout=_PATIENCE)

    def _run(  # noqa: PLR0913, PLR0917 - what the program is told
        self,
        role: str,
        sender: str,
        receiver: str,
        version: int,
        seconds: float,
        more: int | None = None,
    ) -> Any:
        run = subprocess.run(
            self._words(role, sender, receiver, version, seconds, more),
            capture_output=True,
            text=True,
            timeout=seconds + _PATIENCE,
            check=False,
        )
        if run.returncode != 0:
            raise BenchError(f"{role} from {sender} to {receiver}: {run.stderr.strip()}")
        return json.loads(run.stdout)

    def _words(  # noqa: PLR0913, PLR0917 - what the program is told
        self,
        role: str,
        node: str,
        receiver: str,
        version: int,
        seconds: float,
        more: int | None = None,
    ) -> list[str]:
        address = CARDS[receiver][1][version]
        words = [str(self._program), role, address, str(_PORT), str(seconds)]
        return self._lab.command(node, *words, *([] if more is None else [str(more)]))


def busy_seconds() -> float:
    """Return how long all processors together have been at work since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(int(fields[column]) for column in _BUSY) / _TICKS
