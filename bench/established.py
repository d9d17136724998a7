# SPDX-License-Identifier: Apache-2.0
"""The part `established`: what a packet of an open connection costs under few rules and many."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.endpoints import PROGRAMS, Endpoint, compile_endpoint, make_endpoint
from bench.options import Options, Progress
from bench.report import Row, ratio
from bench.rulesets import POLICY, generate
from vgw import abi, libbpf, loader
from vgw.errors import VgwError
from vgw.policy.frame import build_frame
from vgw.policy.model import (
    UDP,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Interface,
    Service,
    Tier,
)

PART: Final = "established"
_RULES: Final = (10, 49_999)
_PACKETS: Final = 100_000
_MEASURED: Final = ("tc_to_vm", "tc_from_vm")
_MAC, _PEER = bytes.fromhex("525400000011"), bytes.fromhex("525400000002")
#: The connection's packets, as descriptions for build_frame.
TO_VM: Final[dict[str, object]] = {
    "src": "192.0.2.1",
    "dst": "10.20.0.11",
    "proto": "udp",
    "sport": 4000,
    "dport": 53,
}
FROM_VM: Final[dict[str, object]] = {
    "src": "10.20.0.11",
    "dst": "192.0.2.1",
    "proto": "udp",
    "sport": 53,
    "dport": 4000,
}


@dataclass(slots=True)
class _Series:
    """An endpoint under one policy, with an open connection, and its samples by program."""

    rules: int
    endpoint: Endpoint
    samples: dict[str, list[float]] = field(default_factory=dict)


def run(options: Options, progress: Progress) -> list[Row]:
    """Return ns per packet for each path and size of rule set, the harness included."""
    sizes = options.rules or (_RULES[:1] if options.quick else _RULES)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Of an open connection's packets no rules are asked, but of its first one, in a stage.
        artefact = compile_endpoint(directory, _MEASURED)
        series = []
        for size in sizes:
            progress(f"opening a connection under {size} rules")
            series.append(_open(artefact, generate(size, options.shape), stack))
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            for one in series:
                _measure(one)
    return [
        _row(program, one, series[0].samples[program]) for program in _MEASURED for one in series
    ]


def _row(program: str, one: _Series, base: list[float]) -> Row:
    samples = one.samples[program]
    quotient = ratio(samples, base)
    return Row(
        PART,
        PROGRAMS[program].name.lower(),
        "ns/packet",
        tuple(samples),
        {"rules": one.rules},
        {} if quotient is None else {"fewest rules": quotient},
    )


def _measure(one: _Series) -> None:
    for program, fd in one.endpoint.programs.items():
        run = libbpf.prog_test_run(fd, _frame(PROGRAMS[program]), repeat=_PACKETS)
        one.samples.setdefault(program, []).append(float(run.duration_ns))


def _frame(path: abi.Path) -> bytes:
    if path is abi.Path.TO_VM:
        return build_frame(TO_VM, source_mac=_PEER, destination_mac=_MAC)
    return build_frame(FROM_VM, source_mac=_MAC, destination_mac=_PEER)


def _open(artefact: loader.Artefact, rules: tuple[EffectiveRule, ...], stack: ExitStack) -> _Series:
    """Load programs and policy, and open the connection that is measured. Raises VgwError."""
    service = (Service(UDP, (53, 53)),)
    accept = EffectiveRule(
        Direction.INGRESS, Tier.ADMIN, POLICY, "measured", abi.Action.ACCEPT, services=service
    )
    policy = EffectivePolicy("bench", (accept, *rules))
    endpoint = make_endpoint(artefact, _MEASURED, policy, Interface("bench"), stack)
    for program, fd in endpoint.programs.items():
        libbpf.prog_test_run(fd, _frame(PROGRAMS[program]))
    flows = endpoint.maps.flows()
    if [flow.packets[path] for _, flow in flows for path in abi.Path] != [1, 1]:
        raise VgwError("the connection to measure did not open; please report this")
    return _Series(len(rules), endpoint)
