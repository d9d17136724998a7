# SPDX-License-Identifier: Apache-2.0
"""The rows of each catalogue id, played on the evaluator and on the programs of both hooks.

The name of each test has the id in it. Ids that need a device or the control side are tests
elsewhere, named test_catalogue_ID_...; test_complete.py says which ids have neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from tests.catalogue.ids import CATALOGUE
from tests.catalogue.rows import ROWS, can_run
from tests.engine_pool import Engines
from tests.engines import EvaluatorEngine, play, report
from vgw import loader
from vgw.policy.model import Hook

HOOKS = (Hook.XDP, Hook.TC)


def _tests() -> Iterator[object]:
    """Yield each id that has rows, with each engine that can be given at least one of them."""
    for identity in CATALOGUE:
        rows = ROWS.get(identity, ())
        if rows:
            yield pytest.param(identity, None, id=f"{identity}-evaluator")
        for hook in HOOKS:
            if any(can_run(hook, case) for case in rows):
                yield pytest.param(identity, hook, id=f"{identity}-{hook}", marks=pytest.mark.bpf)


@pytest.fixture(scope="module")
def programs(artefact: loader.Artefact) -> Iterator[Mapping[Hook, Engines]]:
    engines = {hook: Engines(artefact, hook) for hook in HOOKS}
    yield engines
    for made in engines.values():
        made.close()


@pytest.mark.parametrize(("identity", "hook"), [*_tests()])
def test_catalogue(identity: str, hook: Hook | None, request: pytest.FixtureRequest) -> None:
    rows = ROWS[identity]
    if hook is None:
        differences = [
            difference
            for case in rows
            for difference in play(
                EvaluatorEngine(case.fixture.facts, case.fixture.policy, case.conntrack_max), case
            )
        ]
    else:
        programs: Mapping[Hook, Engines] = request.getfixturevalue("programs")
        differences, not_run = programs[hook].play(rows)
        print(f"{identity} {CATALOGUE[identity].title}: {len(rows) - len(not_run)} rows on {hook}")
    assert not differences, report(differences)
