# SPDX-License-Identifier: Apache-2.0
"""Floods of frames into a device: what they consist of, and the program that sends them.

All are by frames of TCP or UDP between a network's `Side` and that of a VM; see bench/flood.c for
what a step, its target and the order of rounds are.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal

from vgw.errors import VgwError
from vgw.policy.frame import build_frame, seal
from vgw.policy.model import TCP

#: Beyond the time that a flood was given.
_PATIENCE: Final = 30.0
_CLIENT_ISN, _VM_ISN = 1000, 900_000

What = Literal["source", "destination", "neither"]


@dataclass(frozen=True, slots=True)
class Side:
    """One end of conversations."""

    mac: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Step:
    """A frame of each round, where it goes in, and which of its sides differs between rounds."""

    target: str
    varies: What
    frame: bytes


@dataclass(frozen=True, slots=True)
class Flood:
    """Rounds of steps, `count` of them at most in at most `seconds`."""

    steps: Sequence[Step]
    count: int
    seconds: float
    distinct: int = 1
    order: Literal["random", "sequential"] = "sequential"
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Sent:
    """What a flood came to; `refused` of the frames sent did not leave the device."""

    rounds: int
    sent: int
    refused: int
    seconds: float

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.sent / self.seconds


def packet_target(interface: str, namespace: str = "") -> str:
    """Return the target for frames that go out of an interface; default: this namespace."""
    path = f"/run/netns/{namespace}" if namespace else ""
    return f"packet:{path}:{interface}"


def tap_target(fd: int) -> str:
    """Return the target for frames that a VM sends through a TAP that this process has open."""
    return f"tap:{fd}"


# --- frames ---------------------------------------------------------------------------------------


def tcp_frame(  # noqa: PLR0913, PLR0917 - the fields of a segment
    near: Side, far: Side, flags: str, sequence: int, acknowledged: int = 0, length: int = 0
) -> bytes:
    """Return a TCP segment from `near` to `far`."""
    plain = _frame(near, far, "tcp", flags=flags, length=length)
    source, destination = ip_address(near.address), ip_address(far.address)
    start = len(plain) - 20 - length
    numbers = struct.pack("!II", sequence, acknowledged)
    segment = plain[start : start + 4] + numbers + plain[start + 12 :]
    return plain[:start] + seal(segment, TCP, source, destination)


def udp_frame(near: Side, far: Side, length: int = 0) -> bytes:
    """Return a datagram from `near` to `far`."""
    return _frame(near, far, "udp", length=length)


def _frame(near: Side, far: Side, protocol: str, **fields: object) -> bytes:
    description: dict[str, object] = {
        "src": near.address,
        "dst": far.address,
        "proto": protocol,
        "sport": near.port,
        "dport": far.port,
        **fields,
    }
    macs = (bytes.fromhex(side.mac.replace(":", "")) for side in (near, far))
    return build_frame(description, source_mac=next(macs), destination_mac=next(macs))


def syn(target: str, near: Side, far: Side, varies: What) -> tuple[Step]:
    """Return the step of a SYN flood (the source varies) or of a scan (the destination does)."""
    return (Step(target, varies, tcp_frame(near, far, "S", _CLIENT_ISN)),)


def handshake(to_vm: str, from_vm: str, client: Side, vm: Side) -> tuple[Step, ...]:
    """Return the steps that open a connection from a client to a VM; the client varies."""
    return (
        Step(to_vm, "source", tcp_frame(client, vm, "S", _CLIENT_ISN)),
        Step(from_vm, "destination", tcp_frame(vm, client, "SA", _VM_ISN, _CLIENT_ISN + 1)),
        Step(to_vm, "source", tcp_frame(client, vm, "A", _CLIENT_ISN + 1, _VM_ISN + 1)),
    )


def exchange(to_vm: str, from_vm: str, client: Side, vm: Side) -> tuple[Step, ...]:
    """Return a segment each way of a connection that `handshake` opened; the client varies."""
    return (
        Step(to_vm, "source", tcp_frame(client, vm, "A", _CLIENT_ISN + 1, _VM_ISN + 1)),
        Step(from_vm, "destination", tcp_frame(vm, client, "A", _VM_ISN + 1, _CLIENT_ISN + 1)),
    )


def close(to_vm: str, from_vm: str, client: Side, vm: Side) -> tuple[Step, ...]:
    """Return the steps that close such a connection by the exchange of FINs."""
    return (
        Step(to_vm, "source", tcp_frame(client, vm, "FA", _CLIENT_ISN + 1, _VM_ISN + 1)),
        Step(from_vm, "destination", tcp_frame(vm, client, "FA", _VM_ISN + 1, _CLIENT_ISN + 2)),
        Step(to_vm, "source", tcp_frame(client, vm, "A", _CLIENT_ISN + 2, _VM_ISN + 2)),
    )


# --- sending --------------------------------------------------------------------------------------


class Flooder:
    """Runs the program that bench.native.build("flood", ...) made."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def run(self, flood: Flood) -> Sent:
        """Send a flood to its end."""
        with self.running(flood) as process:
            return outcome(process)

    @contextmanager
    def running(self, flood: Flood, cpu: int | None = None) -> Iterator[subprocess.Popen[str]]:
        """Send a flood during the block, on one CPU if given; it is cut off at the block's end."""
        process = subprocess.Popen(
            [*([] if cpu is None else ["taskset", "-c", str(cpu)]), *self._words(flood)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[int(step.target[4:]) for step in flood.steps if step.target[:4] == "tap:"],
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def _words(self, flood: Flood) -> list[str]:
        words = [str(self._program), str(flood.count), str(flood.seconds), str(flood.seed)]
        words += [flood.order, str(flood.distinct)]
        for step in flood.steps:
            words += [step.target, step.varies, step.frame.hex()]
        return words


def outcome(process: subprocess.Popen[str], seconds: float = 0.0) -> Sent:
    """Wait for the end of a flood that may take so long and return what it came to."""
    output, errors = process.communicate(timeout=seconds + _PATIENCE)
    if process.returncode != 0:
        raise VgwError(f"the flood did not run: {errors.strip()}")
    return Sent(**json.loads(output))
