# SPDX-License-Identifier: Apache-2.0
"""Lookups that are made in a stage: the same answer at every hook, and none without the stage."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.cases.fixtures import UNGUARDED
from tests.engines import EvaluatorEngine, Outcome
from tests.frames import IN, OUT, TCP, Wire, tcp
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import Action, Mode, Reason, Verdict
from vgw.abi_maps import packed
from vgw.maps_images import read_chunks
from vgw.policy.compile import compile_policy
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
#: So many fill one part of an image in a few blocks, and programs need no stage for them.
MEDIUM_RULES = 1000
HERE = "10.0.0.0"


def rules(direction: Direction, count: int = RULES) -> tuple[EffectiveRule, ...]:
    """Return so many rules and one more.

    Each block has some for either address, and only the last one is for both. Rules are arranged
    by the first of their remote addresses, which is another for each.
    """
    found = []
    for number in range(count):
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


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC])
def test_a_medium_policy_is_asked_without_a_stage(artefact: loader.Artefact, hook: Hook) -> None:
    ingress, egress = (rules(direction, MEDIUM_RULES) for direction in Direction)
    policy = EffectivePolicy("vm", ingress, egress, Defaults(egress=Action.DROP))
    for image in compile_policy(policy).values():
        assert len(image.data) > ctypes.sizeof(abi.ImageChunk)
        assert not image.staged
    engine = ProgramEngine(artefact, hook, FACTS, policy)
    try:
        for wire in (IN, OUT):
            assert ask(engine, wire, 80).verdict is Verdict.ACCEPT
            assert ask(engine, wire, 81).reason is Reason.DEFAULT
        assert all(libbpf.map_lookup(*place, 4) is None for place in engine.stages())
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("count", "outer"), [(RULES, "policy_parts"), (MEDIUM_RULES, "policies_medium")]
)
@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC])
def test_without_the_maps_behind_its_header_nothing_passes(
    artefact: loader.Artefact, hook: Hook, count: int, outer: str
) -> None:
    ingress, egress = (rules(direction, count) for direction in Direction)
    engine = ProgramEngine(artefact, hook, FACTS, EffectivePolicy("vm", ingress, egress))
    with closing(engine):
        assert ask(engine, IN, 80).verdict is ask(engine, OUT, 80).verdict is Verdict.ACCEPT
        places = list(read_chunks(engine.fd(outer)))
        assert places
        for place in places:
            assert libbpf.map_delete(engine.fd(outer), packed(place))
        for wire in (IN, OUT):
            outcome = ask(engine, wire, 80)
            assert (outcome.verdict, outcome.reason) == (Verdict.DROP, Reason.NO_POLICY)
