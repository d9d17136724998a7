# SPDX-License-Identifier: Apache-2.0
"""New TCP connections per second to a VM that is protected by few rules and by many.

The rule that accepts the measured connections is the last one. All systems are measured in turn,
round after round in one run, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final

from bench import nft
from bench.lab import CLIENT_ADDRESSES, VM, VM_ADDRESSES, VM_MAC, BenchError, Lab
from bench.lab import lab as build_lab
from bench.options import Options, Progress
from bench.policy_text import policy_text
from bench.report import Fact, Row, ratio
from bench.rulesets import HIGH_PORTS, is_within, rule, untouched
from bench.traffic import FIRST_PORT, PORTS, Burst, burst, server
from vgw.abi import Action
from vgw.errors import ExitCode
from vgw.policy.model import ANY_SERVICE, TCP, EffectiveRule, Network, Service

PART: Final = "connections"
#: Unit of a row -> the figure of a burst.
FIGURES: Final[Mapping[str, Callable[[Burst], float]]] = {
    "connections/s": lambda burst: burst.rate,
    "us CPU/connection": lambda burst: burst.cpu_us,
}
#: Among the ports that the last rule accepts, the one that the rule before it drops.
DROPPED_PORT: Final = FIRST_PORT + 3 * PORTS // 4
#: Form of the rules in nftables -> how it is made, what is not as in vgw.
NFT_FORMS: Final[Mapping[str, tuple[nft.Form, str]]] = {
    "nft linear": (nft.linear, ""),
    "nft ordered maps": (nft.ordered_maps, "no counters or logs for single rules"),
    "nft unordered maps": (
        nft.unordered_maps,
        "open which of overlapping rules decides, right for the measured traffic only",
    ),
}
_RULES: Final = (10, 10_000)
_QUICK_RULES: Final = (10, 100)
_ACCEPTED: Final = (FIRST_PORT, FIRST_PORT + PORTS - 1)
_CONTROL_SECONDS: Final = 0.3
_WARM_UP: Final = 0.25  # of the time of a sample


class RefusedError(BenchError):
    """A system says that a rule set is beyond its limits."""


@dataclass(slots=True)
class Series:
    """One system under one rule set and its samples so far.

    `protect` puts it in force and returns what there is to note about the figure.
    """

    what: str
    facts: dict[str, Fact]
    protect: Callable[[Lab], str]
    remove: Callable[[Lab], None]
    note: str = ""
    refused: bool = False
    bursts: list[Burst] = field(default_factory=list)


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure all systems in rounds and return a row for each and each figure."""
    sizes = options.rules or (_QUICK_RULES if options.quick else _RULES)
    with build_lab(options.vgw) as lab:
        series = [
            _nothing(),
            *(_vgw(size, options, lab) for size in sizes),
            *(_nft(what, size, options) for what in NFT_FORMS for size in sizes),
        ]
        for number in range(options.rounds):
            for one in series:
                if not one.refused:
                    size = one.facts.get("rules", "-")
                    progress(f"round {number + 1} of {options.rounds}: {one.what}, {size} rules")
                    _sample(lab, one, options, control=number == 0)
    return [row for unit in FIGURES for row in _rows(series, unit)]


def late_rules(size: int, shape: str, version: int) -> tuple[EffectiveRule, ...]:
    """Return `size` rules of which the last accepts the measured connections and none before.

    The last but one drops DROPPED_PORT, which the last would accept.
    """
    client, vm = ip_network(CLIENT_ADDRESSES[version]), ip_network(VM_ADDRESSES[version])
    kept = untouched(size - 2, size, shape, version, lambda one: _touches(one, client, vm))
    dropped = Service(TCP, (DROPPED_PORT, DROPPED_PORT))
    return (
        *kept,
        rule("control", Action.DROP, (client,), (vm,), (dropped, ())),
        rule("measured", Action.ACCEPT, (client,), (vm,), (Service(TCP, _ACCEPTED), ())),
    )


def _touches(one: EffectiveRule, client: Network, vm: Network) -> bool:
    """Tell whether a rule could match a connection that is measured."""
    return (
        any(is_within(client, network) for network in one.peers)
        and any(is_within(vm, network) for network in one.local)
        and any(_covers(service) for service in one.services)
        and all(last >= HIGH_PORTS[0] for _, last in one.source_ports)
    )


def _covers(service: Service) -> bool:
    if service == ANY_SERVICE:
        return True
    low, high = service.ports or _ACCEPTED
    return service.protocol == TCP and low <= _ACCEPTED[1] and high >= _ACCEPTED[0]


# --- the systems ----------------------------------------------------------------------------------


def _nothing() -> Series:
    return Series("nothing", {}, protect=lambda _lab: "", remove=lambda _lab: None)


def _vgw(size: int, options: Options, lab: Lab) -> Series:
    rules = late_rules(size, options.shape, options.version)
    text = policy_text(rules, lab.endpoint)

    def protect(lab: Lab) -> str:
        lab.write_policy(text)
        attach = lab.vgw("attach", "--vm", VM)
        if attach.returncode != 0:
            is_refusal = attach.returncode == ExitCode.POLICY_INVALID
            raise (RefusedError if is_refusal else BenchError)(attach.stderr.strip())
        loaded = _loaded_rules(lab)
        return "" if loaded == size else f"{loaded} of the rules were loaded"

    def remove(lab: Lab) -> None:
        detach = lab.vgw("detach", "--all")
        if detach.returncode != 0:
            raise BenchError(detach.stderr.strip())

    return Series("vgw", {"rules": size}, protect, remove)


def _loaded_rules(lab: Lab) -> int:
    """Return how many rules toward the VM are in force, as vgw reads it back."""
    (vm,) = json.loads(lab.vgw("status", "-o", "json").stdout)["vms"]
    (interface,) = vm["interfaces"]
    return int(interface["rules"]["ingress"])


def _nft(what: str, size: int, options: Options) -> Series:
    form, difference = NFT_FORMS[what]
    rules = late_rules(size, options.shape, options.version)
    ruleset = form(rules, options.version, VM_MAC)

    def protect(lab: Lab) -> str:
        lab.filter_bridged(on=True)
        lab.nft(ruleset.text)
        return f"{ruleset.maps} maps in turn; {difference}" if ruleset.maps else difference

    def remove(lab: Lab) -> None:
        lab.nft("flush ruleset\n")
        lab.filter_bridged(on=False)

    return Series(what, {"rules": size}, protect, remove)


# --- measuring ------------------------------------------------------------------------------------


def _sample(lab: Lab, series: Series, options: Options, *, control: bool) -> None:
    """Take one sample; a system that refuses its rules says so in its note instead."""
    version = options.version
    with server(lab, version), _removed_after(lab, series):
        try:
            series.note = series.protect(lab)
        except RefusedError as error:
            series.refused = True
            series.note = f"refused: {error}"
            return
        burst(lab, version, options.seconds * _WARM_UP, limit=20_000)
        if control:
            _check_control(lab, series, version)
        found = burst(lab, version, options.seconds)
        if found.failed or not found.completed:
            raise BenchError(
                f"{series.what}: {found.completed} connections completed, {found.failed} failed"
            )
        series.bursts.append(found)


@contextmanager
def _removed_after(lab: Lab, series: Series) -> Iterator[None]:
    try:
        yield
    finally:
        series.remove(lab)


def _check_control(lab: Lab, series: Series, version: int) -> None:
    """Check that the port that is to be dropped is dropped, and only by a firewall."""
    found = burst(lab, version, _CONTROL_SECONDS, first_port=DROPPED_PORT, ports=1, limit=4)
    if bool(found.completed) is (series.what != "nothing"):
        raise BenchError(
            f"{series.what}: {found.completed} connections to a port that the rules drop, so the "
            "measurement is void"
        )


def _rows(series: Sequence[Series], unit: str) -> list[Row]:
    """Return one figure of all series, beside it how it compares with nothing and fewest rules."""
    samples = [tuple(map(FIGURES[unit], one.bursts)) for one in series]
    fewest: dict[str, int] = {}
    rows = []
    for number, one in enumerate(series):
        least = fewest.setdefault(one.what, number)
        bases = {"nothing": samples[0]}
        if "rules" in one.facts:
            bases["fewest rules"] = samples[least]
        quotients = {name: ratio(samples[number], base) for name, base in bases.items()}
        ratios = {name: value for name, value in quotients.items() if value is not None}
        rows.append(Row(PART, one.what, unit, samples[number], one.facts, ratios, one.note))
    return rows
