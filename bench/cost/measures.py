# SPDX-License-Identifier: Apache-2.0
"""What is measured of each system: bulk, small packets, round trips, new connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

from bench.cost.load import Load
from bench.cost.vms import Vm
from bench.lab import BenchError, Lab
from bench.report import Fact
from bench.traffic import burst, server

BULK: Final = "bulk"
SMALL: Final = "small"
LATENCY: Final = "latency"
CONNECTIONS: Final = "connections"
#: Payload of a small datagram, which makes a frame of 64 bytes with IPv4.
SMALL_BYTES: Final = 18
_STREAMS: Final = (1, 8)
_CLIENT: Final = "client"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample is taken, and how long it is."""

    lab: Lab
    load: Load
    vm: Vm
    seconds: float


@dataclass(frozen=True, slots=True)
class Measure:
    """One kind of traffic of one IP version; `sample` returns figures by their units."""

    part: str
    version: int
    facts: Mapping[str, Fact]
    sample: Callable[[Place], Mapping[str, float]]


def measures(version: int) -> Iterator[Measure]:
    """Yield all kinds of traffic of an IP version."""
    for to_vm, streams in product((True, False), _STREAMS):
        facts: dict[str, Fact] = {"direction": _direction(to_vm), "streams": streams}
        yield Measure(BULK, version, facts, _bulk(version, streams, to_vm=to_vm))
    for to_vm in (True, False):
        facts = {"direction": _direction(to_vm)}
        yield Measure(SMALL, version, facts, _small(version, to_vm=to_vm))
    yield Measure(LATENCY, version, {}, _latency(version))
    yield Measure(CONNECTIONS, version, {}, _connections(version))


def _direction(to_vm: bool) -> str:
    return "to the VM" if to_vm else "from the VM"


def _ends(vm: Vm, to_vm: bool) -> tuple[str, str]:
    return (_CLIENT, vm.node) if to_vm else (vm.node, _CLIENT)


def _bulk(version: int, streams: int, *, to_vm: bool) -> Callable[[Place], Mapping[str, float]]:
    def sample(at: Place) -> Mapping[str, float]:
        found = at.load.stream(*_ends(at.vm, to_vm), version, at.seconds, streams)
        gigabytes = found.bytes / 1e9
        return {
            "Gbit/s": gigabytes * 8 / found.seconds,
            "CPU s/GB": found.cpu_seconds / gigabytes,
        }

    return sample


def _small(version: int, *, to_vm: bool) -> Callable[[Place], Mapping[str, float]]:
    def sample(at: Place) -> Mapping[str, float]:
        found = at.load.datagrams(*_ends(at.vm, to_vm), version, at.seconds, SMALL_BYTES)
        if not found.received:
            raise BenchError("no datagram arrived, so the measurement is void")
        return {
            "packets/s": found.received / found.seconds,
            "CPU s/million": found.cpu_seconds / found.received * 1e6,
        }

    return sample


def _latency(version: int) -> Callable[[Place], Mapping[str, float]]:
    def sample(at: Place) -> Mapping[str, float]:
        found = at.load.trips(_CLIENT, at.vm.node, version, at.seconds)
        return {"us median": found.median_ns / 1e3, "us p99": found.p99_ns / 1e3}

    return sample


def _connections(version: int) -> Callable[[Place], Mapping[str, float]]:
    def sample(at: Place) -> Mapping[str, float]:
        with server(at.lab, version, at.vm.node):
            found = burst(at.lab, version, at.seconds, vm=at.vm.node, limit=20_000)
        if found.failed or not found.completed:
            raise BenchError(f"{found.completed} connections completed, {found.failed} failed")
        return {"connections/s": found.rate, "us CPU/connection": found.cpu_us}

    return sample
