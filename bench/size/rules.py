# SPDX-License-Identifier: Apache-2.0
"""What packets, a change of policy and its memory cost by how many rules there are.

Packets are judged by one of the last rules. Their figures are of an endpoint without an interface,
the times of an attach and an apply of a VM in a lab.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final, TypeVar

from bench.cost.rules import DENIED_PORT, measured_rules
from bench.cost.vms import VMS
from bench.endpoints import PROGRAMS, make_endpoint
from bench.lab import VM, BenchError, Lab
from bench.lab import lab as build_lab
from bench.options import Options, Progress
from bench.paths import packets
from bench.paths.cases import NEW_VALUES
from bench.paths.checked import BY_RULE, ESTABLISHED, Checked, Judgement, Trial, interface
from bench.paths.policy import policy
from bench.paths.vary import Frame
from bench.policy_text import policy_text
from bench.report import Row
from bench.size.figures import KIB, NS, RULES, SECONDS, row
from scripts.lab.wire import inside
from vgw import loader
from vgw.abi import Path, Reason, Verdict
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.stages import with_stages
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

_T = TypeVar("_T")
_SIZES: Final = (10, 100, 1_000, 10_000, 50_000)
_QUICK_SIZES: Final = (10, 100)
_RUNS: Final = 1 << 17
_QUICK_RUNS: Final = 1 << 12
#: Packets that a rule denies come of so many flows in turn.
_FLOWS: Final = 1 << 16
_MOST_ROUNDS: Final = 3
_DENIED: Final = Judgement(Verdict.DROP, Reason.RULE)


def measure_rules(
    options: Options, progress: Progress, checked: Checked, artefact: loader.Artefact
) -> list[Row]:
    """Return all figures for each number of rules. Raises VgwError."""
    sizes = _QUICK_SIZES if options.quick else _SIZES
    rows = []
    for size in sizes:
        progress(f"packets under {size} rules")
        rows += _of_packets(options, checked, artefact, size)
    with build_lab(options.vgw) as lab, inside(f"{lab.name}-host"):
        host = Host(Paths.from_environment(lab.environment))
        host.artefact(with_stages(PROGRAMS))
        for size in sizes:
            progress(f"attach and apply of {size} rules")
            rows += _of_changes(options, lab, host, size)
    return rows


def _of_packets(
    options: Options, checked: Checked, artefact: loader.Artefact, size: int
) -> list[Row]:
    """Return ns of packets, and the memory of the policy."""
    cases: dict[str, tuple[Callable[[Path], Frame], int, Judgement]] = {
        "established packet": (
            lambda path: packets.packet(path, 4, "udp", Path.FROM_VM),
            1,
            ESTABLISHED,
        ),
        "new connection": (
            lambda path: packets.packet(path, 4, "tcp", path, "S"),
            NEW_VALUES,
            BY_RULE,
        ),
        "denied by rule": (partial(packets.denied, 4), _FLOWS, _DENIED),
    }
    rows: list[Row] = []
    with ExitStack() as stack:
        effective, wanted = policy(4, size, options.shape), interface(4, brief=True)
        endpoint = make_endpoint(artefact, tuple(PROGRAMS), effective, wanted, stack)
        checked.open(endpoint, 4, "udp", 1)
        for what, (frame, values, judgement) in cases.items():
            for program, path in PROGRAMS.items():
                runs = _QUICK_RUNS if options.quick else _RUNS
                trial = Trial(endpoint, program, frame(path), judgement)
                samples = [checked.sample(trial, values, runs).net for _ in range(options.rounds)]
                rows.append(row(what, NS, RULES, size, samples, program))
        memory = sum(len(image.data) for image in endpoint.images.values()) / 1024
    rows.append(row("policy, both directions", KIB, RULES, size, (memory,)))
    return rows


def _of_changes(options: Options, lab: Lab, host: Host, size: int) -> list[Row]:
    """Return seconds of reading a policy, of an attach with it and of a change of one rule."""
    text = policy_text(measured_rules(size, options.shape, 4, VMS["veth"]), lab.endpoint)
    other = text.replace(f"[udp/{DENIED_PORT}]", f"[udp/{DENIED_PORT - 1}]")
    times: dict[str, list[float]] = {}
    reading = "read the policy"
    document, changed = (_timed(times, reading, partial(_read, each)) for each in (text, other))
    for _ in range(min(options.rounds, _MOST_ROUNDS)):
        _timed(times, "attach", partial(host.attach_many, document, [VM]))
        result = _timed(times, "apply of a changed rule", partial(host.apply, changed))
        if not all(each.changed for each in result.vms):
            raise BenchError("the changed policy changed nothing, so the measurement is void")
        host.detach_all()
    return [row(what, SECONDS, RULES, size, found) for what, found in times.items()]


def _read(text: str) -> PolicyDocument:
    return parse_sources([("policy.yaml", text)])


def _timed(times: dict[str, list[float]], what: str, call: Callable[[], _T]) -> _T:
    """Make a call and return what it does; its seconds are added to those of its name."""
    began = time.monotonic()
    result = call()
    times.setdefault(what, []).append(time.monotonic() - began)
    return result
