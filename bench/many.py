# SPDX-License-Identifier: Apache-2.0
"""The part `scale`: a controller with many endpoints, at its start, when scraped, when idle."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bench.controllers import Controller, controller
from bench.lab import BenchError, Lab
from bench.lab import lab as build_lab
from bench.options import Progress
from bench.report import Row
from scripts.lab.wire import inside
from vgw.cli_target_controller import ControllerTarget
from vgw.cli_top_looks import Looker
from vgw.cli_top_view import State, picture
from vgw.controller.fitness import allow_many_files
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.parse import parse_sources

PART: Final = "scale"
#: VMs of a role have rules of their own.
_ROLES: Final = 10
_CONNTRACK_MAX: Final = 4096
#: Columns and lines of the terminal that `vgw top` draws on.
_SCREEN: Final = (120, 40)


@dataclass(frozen=True, slots=True)
class Extent:
    """How many endpoints, how many samples of each figure, and for how long to be idle."""

    endpoints: int
    samples: int
    idle_seconds: float


def run_scale(extent: Extent, progress: Progress) -> list[Row]:
    """Protect many VMs and return what a controller takes for them."""
    with build_lab() as lab:
        progress(f"making {extent.endpoints} interfaces")
        make_interfaces(lab, extent.endpoints)
        text = policy_of_many(extent.endpoints)
        lab.write_policy(text)
        with inside(f"{lab.name}-host"):
            host = Host(Paths.from_environment(lab.environment))
            progress(f"attaching {extent.endpoints} VMs")
            started = time.monotonic()
            host.attach_many(parse_sources([("policy.yaml", text)]))
            attach_seconds = time.monotonic() - started
            kernel_mib = _kernel_memory(host) / (1 << 20)
        rows = _measure(lab, extent, progress)
        with inside(f"{lab.name}-host"):
            host.detach_all()
    facts = {"endpoints": extent.endpoints}
    return [
        Row(PART, "attach, for the first time", "s", (attach_seconds,), facts),
        Row(PART, "maps of all endpoints", "MiB", (kernel_mib,), facts),
        *(Row(PART, what, unit, samples, facts) for what, unit, samples in rows),
    ]


_Figure = tuple[str, str, tuple[float, ...]]


def _measure(lab: Lab, extent: Extent, progress: Progress) -> list[_Figure]:
    starts: list[float] = []
    for number in range(extent.samples):
        progress(f"start {number + 1} of {extent.samples}")
        with controller(lab) as running:
            starts.append(running.start_seconds)
            _require_adopted(running, extent.endpoints)
            if number == extent.samples - 1:
                figures = _of_one(running, lab, extent, progress)
    with controller(lab, options=("--rule-metrics",)) as running:
        figures += _with_rules(running, extent)
    return [("start with adoption", "s", tuple(starts)), *figures]


def _of_one(running: Controller, lab: Lab, extent: Extent, progress: Progress) -> list[_Figure]:
    """Return the figures of a controller that runs."""
    running.scrape()
    scrapes = [running.scrape() for _ in range(3 * extent.samples)]
    applies: list[float] = []
    text = (lab.directory / "policy.d/policy.yaml").read_text()
    for number in range(extent.samples):
        progress(f"apply {number + 1} of {extent.samples}")
        started = time.monotonic()
        answer = running.client.apply([("policy.yaml", text)])
        applies.append((time.monotonic() - started) / extent.endpoints * 1000)
        if any(vm["changed"] for vm in answer["vms"]):
            raise BenchError("the same policy changed something")
    progress(f"idle for {1.5 * extent.idle_seconds:.0f} s")
    time.sleep(extent.idle_seconds / 2)  # a watch that has begun looks at each endpoint once
    before = running.cpu_seconds()
    time.sleep(extent.idle_seconds)
    idle = (running.cpu_seconds() - before) / extent.idle_seconds * 100
    cost = _processor_ms(running, running.scrape, len(scrapes))
    return [
        ("scrape", "ms", tuple(seconds * 1000 for seconds, _ in scrapes)),
        ("scrape", "KiB", tuple(length / 1024 for _, length in scrapes[:1])),
        ("scrape, processor", "ms", (cost,)),
        ("look of vgw top, processor", "ms", (_look_ms(running, lab, len(scrapes)),)),
        ("apply of the same policy, per VM", "ms", tuple(applies)),
        ("idle, of a processor", "%", (idle,)),
        ("controller's memory", "MiB", (running.memory_mib(),)),
    ]


def _with_rules(running: Controller, extent: Extent) -> list[_Figure]:
    """Return what scrapes with a series for each rule take, after the first one."""
    running.scrape()
    scrapes = [running.scrape() for _ in range(3 * extent.samples)]
    cost = _processor_ms(running, running.scrape, len(scrapes))
    return [
        ("scrape with rules", "ms", tuple(seconds * 1000 for seconds, _ in scrapes)),
        ("scrape with rules, processor", "ms", (cost,)),
    ]


def _look_ms(running: Controller, lab: Lab, looks: int) -> float:
    """Return what a look of `vgw top` takes of processors, the controller's part and its own."""
    looker = Looker(
        lambda: ControllerTarget(running.client, Paths.from_environment(lab.environment))
    )
    looker.refresh(None)  # which has nothing to compare with
    state, own = State(), time.process_time()

    def look() -> None:
        picture(looker.refresh(state.focus(looker.look)), state, *_SCREEN)

    cost = _processor_ms(running, look, looks)
    if looker.look.error is not None:
        raise BenchError(looker.look.error)
    return cost + (time.process_time() - own) / looks * 1000


def _processor_ms(running: Controller, work: Callable[[], object], times: int) -> float:
    """Return what a controller takes of processors for each time that work is done."""
    before = running.cpu_seconds()
    for _ in range(times):
        work()
    return (running.cpu_seconds() - before) / times * 1000


def _require_adopted(running: Controller, endpoints: int) -> None:
    rows = running.client.status()["vms"]
    attached = sum(interface["attached"] for row in rows for interface in row["interfaces"])
    if attached != endpoints:
        raise BenchError(f"{attached} of {endpoints} endpoints are attached")


def make_interfaces(lab: Lab, endpoints: int) -> None:
    """Make veth pairs in the lab's host, the interfaces of the VMs of policy_of_many()."""
    commands = "".join(
        f"link add tap{n} type veth peer name peer{n}\nlink set tap{n} up\n"
        for n in range(endpoints)
    )
    done = subprocess.run(
        ["ip", "-n", f"{lab.name}-host", "-batch", "-"],
        input=commands, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"making interfaces: {done.stderr.strip()}")


def policy_of_many(endpoints: int, ssh_port: int = 22) -> str:
    """Return a policy of so many VMs, in ten roles with a rule of their own each.

    VM n has the addresses 52:54:00:00:x:y and 10.20.x.y, x and y being the two bytes of n.
    """
    return "\n".join(_policy(endpoints, ssh_port)) + "\n"


def _policy(endpoints: int, ssh_port: int) -> Iterator[str]:
    yield "schema: vgw/v1\nvms:"
    for n in range(endpoints):
        card = (
            f"mac: '52:54:00:00:{n >> 8:02x}:{n & 255:02x}', addresses: [10.20.{n >> 8}.{n & 255}]"
        )
        yield (
            f"  vm{n}: {{labels: {{role: r{n % _ROLES}}}, interfaces: [{{name: tap{n}, {card}, "
            f"conntrack_max: {_CONNTRACK_MAX}}}]}}"
        )
    yield "groups:\n  web: {labels: {role: r1}}\npolicies:"
    yield "  - name: base\n    tier: admin\n    applies_to: {all: true}\n    ingress:"
    yield f"      - {{name: ssh, action: accept, services: [tcp/{ssh_port}]}}"
    yield "      - {name: web, action: accept, from: [web], services: [tcp/80]}"
    for role in range(_ROLES):
        yield (
            f"  - {{name: role{role}, tier: group, applies_to: {{labels: {{role: r{role}}}}}, "
            f"ingress: [{{name: own, action: accept, services: [tcp/{8000 + role}]}}]}}"
        )
    yield "defaults: {ingress: drop, egress: accept}"


def _kernel_memory(host: Host) -> int:
    """Return the bytes of all maps of all endpoints; policies that they share are not in it."""
    allow_many_files()
    total = 0
    for endpoint in host.endpoints():
        with endpoint:
            total += endpoint.maps.memory()
    return total
