# SPDX-License-Identifier: Apache-2.0
"""Lookups that go on in a stage: the same answer at every hook, and none without the stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.cases.fixtures import UNGUARDED
from tests.engines import EvaluatorEngine, Outcome
from tests.frames import IN, OUT, TCP, Wire, tcp
from tests.program_engine import ProgramEngine
from vgw import libbpf, loader
from vgw.abi import Action, Mode, Reason, Verdict
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import (
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Hook,
    Service,
    Tier,
)

pytestmark = pytest.mark.bpf

FACTS = endpoint_facts(replace(UNGUARDED, conntrack_max=1024), Mode.ENFORCE)
RULES = 5000
HERE = "10.0.0.0"


def rules(direction: Direction) -> tuple[EffectiveRule, ...]:
    """Return rules of which each block has some for either address, and only the last is for both.

    Rules are arranged by the first of their remote addresses, which is another for each.
    """
    found = []
    for number in range(RULES):
        other = ip_network((1 << 24 | number << 8, 24))
        here = (other, ip_network(HERE))
        peers, local = (here, (other,)) if number % 2 else ((other,), here)
        name = f"{direction}-{number}"
        found.append(
            EffectiveRule(direction, Tier.GROUP, "p", name, Action.DROP, peers=peers, local=local)
        )
    last = replace(found[-1], name="last", peers=here, local=here, services=(Service(6, (80, 80)),))
    return (*found, replace(last, action=Action.ACCEPT, tier=Tier.BASELINE))


@pytest.fixture(scope="module", params=[Hook.XDP, Hook.TC])
def engine(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[ProgramEngine]:
    policy = EffectivePolicy(
        "vm", rules(Direction.INGRESS), rules(Direction.EGRESS), Defaults(egress=Action.DROP)
    )
    made = ProgramEngine(artefact, request.param, FACTS, policy)
    yield made
    made.close()


def ask(engine: ProgramEngine, wire: Wire, port: int) -> Outcome:
    engine.reset()
    return engine.judge(wire.path, wire.wrap(tcp(4000, port), TCP, HERE, HERE))


@pytest.mark.parametrize("wire", [IN, OUT], ids=["to_vm", "from_vm"])
def test_the_last_rule_is_found_behind_many_candidates(engine: ProgramEngine, wire: Wire) -> None:
    policy = EffectivePolicy(
        "vm", rules(Direction.INGRESS), rules(Direction.EGRESS), Defaults(egress=Action.DROP)
    )
    model = EvaluatorEngine(FACTS, policy)
    for port in (80, 81):
        model.reset()
        frame = wire.wrap(tcp(4000, port), TCP, HERE, HERE)
        assert ask(engine, wire, port) == model.judge(wire.path, frame)
    assert ask(engine, wire, 80).reason is Reason.RULE


@pytest.mark.parametrize("wire", [IN, OUT], ids=["to_vm", "from_vm"])
def test_without_its_stage_nothing_passes(engine: ProgramEngine, wire: Wire) -> None:
    """Negative control: these lookups do need the stage, and a missing one drops."""
    assert ask(engine, wire, 80).verdict is Verdict.ACCEPT
    for place in engine.stages():
        assert libbpf.map_delete(*place)
    outcome = ask(engine, wire, 80)
    assert (outcome.verdict, outcome.reason) == (Verdict.DROP, Reason.NO_POLICY)
    engine.load_stages()
    assert ask(engine, wire, 80).verdict is Verdict.ACCEPT
