# SPDX-License-Identifier: Apache-2.0
"""What a packet, an attach, an apply and a VM's memory cost by how many VMs a host has.

Packets are of all VMs in turn, each judged by its VM's own attached program, so the caches hold
the programs and tables of many VMs, or cannot. Each VM has one open connection.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from bench.lab import BenchError
from bench.lab import lab as build_lab
from bench.many import make_interfaces, policy_of_many
from bench.options import Options, Progress
from bench.paths.checked import ESTABLISHED, Checked
from bench.paths.vary import Frame
from bench.report import Row
from bench.size.figures import KIB, MS_PER_VM, NS, VMS, row
from scripts.lab.wire import inside
from vgw import libbpf
from vgw.abi import Path
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.fitness import allow_many_files
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.libbpf import ProgType
from vgw.policy.frame import build_frame
from vgw.policy.parse import parse_sources

_SIZES: Final = (1, 10, 100, 500)
_QUICK_SIZES: Final = (1, 4)
#: A multiple of all sizes.
_RUNS: Final = 100_000
_QUICK_RUNS: Final = 4_000
_MOST_APPLIES: Final = 3
_PROGRAMS: Final = {Path.FROM_VM: "tc_from_vm", Path.TO_VM: "tc_to_vm"}
_PEER: Final = "192.0.2.1"
_PEER_MAC: Final = bytes.fromhex("525400ff0002")
#: The VM of value 0, see many.py; the value is added to the last bytes of both.
_ADDRESS: Final = "10.20.0.0"
_MAC: Final = bytes.fromhex("525400000000")


@dataclass(frozen=True, slots=True)
class _Vms:
    """The VMs of a lab in their order: their endpoints, and what is attached, by path."""

    endpoints: Sequence[OpenEndpoint]
    programs: Mapping[Path, Sequence[int]]

    def established(self, path: Path) -> list[int]:
        """Return how many packets of open connections each has had on a path."""
        counters = (endpoint.maps.stats() for endpoint in self.endpoints)
        found = (each.get((path, *ESTABLISHED)) for each in counters)
        return [0 if counter is None else counter.packets for counter in found]


def measure_vms(options: Options, progress: Progress, checked: Checked) -> list[Row]:
    """Return all figures for each number of VMs. Raises VgwError."""
    sizes = _QUICK_SIZES if options.quick else _SIZES
    allow_many_files()
    rows: list[Row] = []
    with build_lab(options.vgw) as lab:
        progress(f"making {sizes[-1]} interfaces")
        make_interfaces(lab, sizes[-1])
        host = Host(Paths.from_environment(lab.environment))
        with inside(f"{lab.name}-host"):
            _compile(host)
            for before, size in zip((0, *sizes), sizes, strict=False):
                progress(f"attaching VM {before + 1} to {size}")
                rows += _changes(options, host, before, size)
                progress(f"packets of {size} VMs")
                with _opened(host, size) as vms:
                    rows += _packets(options, checked, vms, size)
            host.detach_all()
    return rows


def _compile(host: Host) -> None:
    """Have programs compiled, which is done once per version and no part of an attach."""
    host.artefact(tuple(_PROGRAMS.values()))


def _changes(options: Options, host: Host, before: int, size: int) -> list[Row]:
    """Attach more VMs, change the policy of all; return how long each of both took, by VM."""
    texts = (policy_of_many(size, port) for port in (22, 23))
    document, other = (parse_sources([("policy.yaml", text)]) for text in texts)
    began = time.monotonic()
    host.attach_many(document, [f"vm{number}" for number in range(before, size)])
    attach = (time.monotonic() - began) / (size - before) * 1000
    applies = []
    for number in range(min(options.rounds, _MOST_APPLIES)):
        began = time.monotonic()
        result = host.apply(document if number % 2 else other)
        applies.append((time.monotonic() - began) / size * 1000)
        if not all(each.changed for each in result.vms):
            raise BenchError("the changed policy changed nothing, so the measurement is void")
    return [
        row("attach", MS_PER_VM, VMS, size, (attach,)),
        row("apply of a changed rule", MS_PER_VM, VMS, size, applies),
    ]


@contextmanager
def _opened(host: Host, size: int) -> Iterator[_Vms]:
    """Open the attached VMs and their programs for a block."""
    with ExitStack() as stack:
        found = {one.vm: stack.enter_context(one) for one in host.endpoints()}
        endpoints = [found[f"vm{number}"] for number in range(size)]
        programs: dict[Path, list[int]] = {path: [] for path in _PROGRAMS}
        for endpoint in endpoints:
            for path, program in endpoint.programs.items():
                fd = libbpf.prog_fd_by_id(program)
                stack.callback(os.close, fd)
                programs[path].append(fd)
        yield _Vms(endpoints, programs)


def _packets(options: Options, checked: Checked, vms: _Vms, size: int) -> list[Row]:
    """Return ns of a packet of each program, and the memory of a VM. Raises BenchError."""
    varier = checked.variers[ProgType.SCHED_CLS]
    for path, programs in vms.programs.items():  # the VM begins, and is answered
        varier.choose(programs)
        varier.run(_frame(path), size, size, many=True)
    rows = []
    runs = _QUICK_RUNS if options.quick else _RUNS
    for path, programs in vms.programs.items():
        varier.choose(programs)
        samples = []
        for _ in range(options.rounds):
            varier.run(_frame(path), size, runs // 2, many=True)
            before = vms.established(path)
            samples.append(varier.sample(_frame(path), size, runs, many=True).net)
            after = vms.established(path)
            if any(now - then != runs // size for now, then in zip(after, before, strict=True)):
                raise BenchError(f"not every VM had {runs // size} packets of an open connection")
        rows.append(row("established packet", NS, VMS, size, samples, _PROGRAMS[path]))
    memory = sum(endpoint.maps.memory() for endpoint in vms.endpoints) / size / 1024
    return [*rows, row("maps of a VM", KIB, VMS, size, (memory,))]


def _frame(path: Path) -> Frame:
    """Return a datagram on a path, of the VM that is the value."""
    outwards = path is Path.FROM_VM
    ports = {"sport": 40_000, "dport": 53} if outwards else {"sport": 53, "dport": 40_000}
    ends = (_ADDRESS, _PEER) if outwards else (_PEER, _ADDRESS)
    macs = (_MAC, _PEER_MAC) if outwards else (_PEER_MAC, _MAC)
    data = build_frame(
        {"src": ends[0], "dst": ends[1], "proto": "udp", "length": 18, **ports},
        source_mac=macs[0],
        destination_mac=macs[1],
    )
    address, mac = (26, 10) if outwards else (30, 4)
    return Frame(data, word=address, half=mac, shift=0, half_mask=0xFFFF)
