# SPDX-License-Identifier: Apache-2.0
"""TCP connections through a lab: a server in the VM, and bursts of a client that opens them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench.lab import CARDS, BenchError, Lab

#: The server's ports, as many as make one client's connections differ enough.
FIRST_PORT: Final = 20000
PORTS: Final = 64
#: A server ends on its own after this time, whatever becomes of the bench.
_SERVER_SECONDS: Final = 300
#: The most connections of one burst: together with those before they fit into every table.
MOST_CONNECTIONS: Final = 80_000
#: Beyond the time that a burst was given.
_PATIENCE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Burst:
    """What became of the connections that a client opened in `seconds`.

    `cpu_seconds` is the processor's time for the client; its kernel side carries the packets all
    the way to the VM, so this holds what any firewall between them costs.
    """

    completed: int
    failed: int
    unanswered: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Completed connections a second."""
        return self.completed / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of processor time for one completed connection."""
        return self.cpu_seconds / self.completed * 1e6


@contextmanager
def server(
    lab: Lab, version: int, vm: str = "vm", *, first_port: int = FIRST_PORT, ports: int = PORTS
) -> Iterator[None]:
    """Accept connections in a VM on all ports for the length of the block."""
    process = subprocess.Popen(
        lab.command(
            vm, *_words(lab, "server", vm, version, first_port, ports), f"{_SERVER_SECONDS}"
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise BenchError("the server of the lab did not start")
        yield
    finally:
        process.communicate(timeout=_PATIENCE)


def burst(  # noqa: PLR0913 - the bounds of a burst
    lab: Lab,
    version: int,
    seconds: float,
    *,
    vm: str = "vm",
    first_port: int = FIRST_PORT,
    ports: int = PORTS // 2,
    in_flight: int = 32,
    limit: int = MOST_CONNECTIONS,
) -> Burst:
    """Open connections from the client to a VM, `in_flight` at a time, and reset each at once."""
    words = _words(lab, "client", vm, version, first_port, ports)
    run = subprocess.run(
        lab.command("client", *words, str(seconds), str(limit), str(in_flight)),
        capture_output=True,
        text=True,
        timeout=seconds + _PATIENCE,
        check=False,
    )
    if run.returncode != 0:
        raise BenchError(f"the client of the lab: {run.stderr.strip()}")
    return Burst(**json.loads(run.stdout))


def _words(  # noqa: PLR0913, PLR0917 - what the program is told
    lab: Lab, role: str, vm: str, version: int, first_port: int, ports: int
) -> list[str]:
    return [str(lab.connections), role, CARDS[vm][1][version], str(first_port), str(ports)]
