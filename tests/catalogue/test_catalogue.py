# SPDX-License-Identifier: Apache-2.0
"""The rows of each catalogue id, played on the evaluator and on the programs of both hooks.

They are played at tc behind a shield as well.

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

#: What judges -> the hook of the program on whose word packets pass.
JUDGES = {"xdp": Hook.XDP, "tc": Hook.TC, "shielded": Hook.TC}


def _tests() -> Iterator[object]:
    """Yield each id that has rows, with each engine that can be given at least one of them."""
    for identity in CATALOGUE:
        rows = ROWS.get(identity, ())
        if rows:
            yield pytest.param(identity, None, id=f"{identity}-evaluator")
        for judge, hook in JUDGES.items():
            if any(can_run(hook, case) for case in rows):
                yield pytest.param(identity, judge, id=f"{identity}-{judge}", marks=pytest.mark.bpf)


@pytest.fixture(scope="module")
def programs(artefact: loader.Artefact) -> Iterator[Mapping[str, Engines]]:
    engines = {
        judge: Engines(artefact, hook, shielded=judge == "shielded")
        for judge, hook in JUDGES.items()
    }
    yield engines
    for made in engines.values():
        made.close()


@pytest.mark.parametrize(("identity", "judge"), [*_tests()])
def test_catalogue(identity: str, judge: str | None, request: pytest.FixtureRequest) -> None:
    rows = ROWS[identity]
    if judge is None:
        differences = [
            difference
            for case in rows
            for difference in play(
                EvaluatorEngine(case.fixture.facts, case.fixture.policy, case.conntrack_max), case
            )
        ]
    else:
        programs: Mapping[str, Engines] = request.getfixturevalue("programs")
        differences, not_run = programs[judge].play(rows)
        print(f"{identity} {CATALOGUE[identity].title}: {len(rows) - len(not_run)} rows on {judge}")
    assert not differences, report(differences)
