# SPDX-License-Identifier: Apache-2.0
"""The part `established`: what a packet of an open connection costs under few rules and many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.options import Options, Progress
from bench.report import Row, ratio
from bench.rulesets import POLICY, generate
from vgw import abi, libbpf, loader
from vgw.controller.endpoint import build_config
from vgw.controller.images import private_images
from vgw.errors import VgwError
from vgw.maps import EndpointMaps, place_counters
from vgw.policy.compile import compile_policy
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
_PROGRAMS: Final = {abi.Path.TO_VM: "tc_to_vm", abi.Path.FROM_VM: "tc_from_vm"}
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
class _Endpoint:
    """The programs of an endpoint under one policy, with an open connection."""

    rules: int
    programs: Mapping[abi.Path, int]
    samples: dict[abi.Path, list[float]] = field(default_factory=dict)


def run(options: Options, progress: Progress) -> list[Row]:
    """Return ns per packet for each path and size of rule set, the harness included."""
    sizes = options.rules or (_RULES[:1] if options.quick else _RULES)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artefact = loader.load_artefact(directory, programs=_PROGRAMS.values())
        endpoints = []
        for size in sizes:
            progress(f"opening a connection under {size} rules")
            endpoints.append(_open(artefact, generate(size, options.shape), stack))
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            for endpoint in endpoints:
                _measure(endpoint)
    return [
        _row(path, endpoint, endpoints[0].samples[path])
        for path in _PROGRAMS
        for endpoint in endpoints
    ]


def _row(path: abi.Path, endpoint: _Endpoint, base: list[float]) -> Row:
    samples = endpoint.samples[path]
    quotient = ratio(samples, base)
    return Row(
        PART,
        path.name.lower(),
        "ns/packet",
        tuple(samples),
        {"rules": endpoint.rules},
        {} if quotient is None else {"fewest rules": quotient},
    )


def _measure(endpoint: _Endpoint) -> None:
    for path, program in endpoint.programs.items():
        run = libbpf.prog_test_run(program, _frame(path), repeat=_PACKETS)
        endpoint.samples.setdefault(path, []).append(float(run.duration_ns))


def _frame(path: abi.Path) -> bytes:
    if path is abi.Path.TO_VM:
        return build_frame(TO_VM, source_mac=_PEER, destination_mac=_MAC)
    return build_frame(FROM_VM, source_mac=_MAC, destination_mac=_PEER)


def _open(
    artefact: loader.Artefact, rules: tuple[EffectiveRule, ...], stack: ExitStack
) -> _Endpoint:
    """Load programs and policy, and open the connection that is measured. Raises VgwError."""
    service = (Service(UDP, (53, 53)),)
    accept = EffectiveRule(
        Direction.INGRESS, Tier.ADMIN, POLICY, "measured", abi.Action.ACCEPT, services=service
    )
    images = compile_policy(EffectivePolicy("bench", (accept, *rules)))
    instance = stack.enter_context(loader.instantiate(artefact, tuple(_PROGRAMS.values())))
    maps = EndpointMaps({name: os.dup(fd) for name, fd in instance.maps.items()})
    stack.callback(maps.close)
    config = build_config(Interface("bench"), abi.Mode.ENFORCE, 1, 1, 0)
    size = place_counters(config, {path: len(image.rules) for path, image in images.items()})
    counters = loader.new_inner(artefact, "rule_counters", size)
    stack.callback(os.close, counters)
    maps.switch(maps.stage(config, private_images(artefact, images), counters))
    programs = {path: instance.programs[name] for path, name in _PROGRAMS.items()}
    for path, program in programs.items():
        libbpf.prog_test_run(program, _frame(path))
    if [flow.packets[path] for _, flow in maps.flows() for path in abi.Path] != [1, 1]:
        raise VgwError("the connection to measure did not open; please report this")
    return _Endpoint(len(rules), programs)
