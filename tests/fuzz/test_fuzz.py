# SPDX-License-Identifier: Apache-2.0
"""The fuzzer finds no disagreement in a minute, and finds what is wrong on purpose soon."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import pytest

from tests.cases import TABLES, fixtures, table
from tests.cases.fixtures import OPEN
from tests.engines import CannotRunError, Engine, EvaluatorEngine, changes_endpoint, play, report
from tests.fuzz import trial
from tests.fuzz.__main__ import main
from tests.fuzz.compare import Rig, pinned
from tests.fuzz.hunt import Hunt, describe
from tests.fuzz.quick_engine import AuditError, QuickEngine
from tests.fuzz.rows import case_of
from tests.fuzz.run import Settings, WorkerDiedError, run
from tests.fuzz.sequences import Sequences
from tests.fuzz.summary import accepted_share, problems, reasons_missing, text
from tests.fuzz.work_memory import WorkMemory, read_layout
from tests.program_engine import ProgramEngine
from vgw import abi, libbpf, loader
from vgw.abi import FlowState, Guard, Path
from vgw.policy.flows import SECOND_NS
from vgw.policy.guards import EndpointFacts
from vgw.policy.model import EffectivePolicy, Hook

pytestmark = pytest.mark.bpf

SECONDS = 60
#: Reasons that a run may miss: what needs settings that no scene has.
MOST_MISSING = 3
#: The least packets of a run: a busy machine takes longer for them.
FEWEST_PACKETS = 20_000
#: Sequences within which a mistake must be found, and the longest row that may be left of it.
SOON, SHORT = 4000, 6


@pytest.fixture(scope="module")
def memory() -> WorkMemory:
    return read_layout()


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return Sequences(seed=4)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    with pinned():
        yield


def test_engines_agree_for_a_minute(artefact: loader.Artefact) -> None:
    """Each run looks elsewhere; the seed in the message makes it again."""
    seed = random.SystemRandom().getrandbits(31)
    jobs = len(os.sched_getaffinity(0))
    result = run(Settings(seed, seconds=SECONDS, least=FEWEST_PACKETS, jobs=jobs), artefact)
    assert not problems(result), text(result)
    assert len(reasons_missing(result)) <= MOST_MISSING, text(result)
    assert 0.15 < accepted_share(result) < 0.7, text(result)
    assert result.counts.packets >= FEWEST_PACKETS, text(result)


def test_command_writes_what_it_prints(
    artefact: loader.Artefact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    """The command line, and that a budget of packets ends a run."""
    monkeypatch.setattr(loader, "load_artefact", lambda _: artefact)
    file = tmp_path / "result.json"
    command = ["--packets", "500", "--seed", "3", "--jobs", "1", "--hook", "tc", "-o", "json"]
    assert main([*command, "--out", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert printed["seed"] == 3
    assert 500 <= printed["packets"] < 600
    assert set(printed["engines"]) == {"evaluator", "tc"}


def test_a_worker_that_dies_ends_the_run(artefact: loader.Artefact) -> None:
    """Nothing is reported as agreement when a process could not go on."""
    lame = replace(artefact, programs={})
    with pytest.raises(WorkerDiedError):
        run(Settings(seed=1, packets=100), lame)


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_quick_engine_agrees_with_tables(
    artefact: loader.Artefact, memory: WorkMemory, hook: Hook
) -> None:
    """What is read from the work memory is what the counters say: verdict, reason and rule."""
    engines: dict[tuple[str, int], QuickEngine] = {}
    differences = []
    for case in chain(*TABLES.values()):
        key = case.fixture.name, case.conntrack_max
        if key not in engines:
            facts, policy = case.fixture.facts, case.fixture.policy
            engines[key] = QuickEngine(
                artefact, hook, facts, policy, conntrack_max=case.conntrack_max, memory=memory
            )
        with contextlib.suppress(CannotRunError):
            differences += play(engines[key], case)
        engines[key].audit()
        if changes_endpoint(case):
            engines.pop(key).close()
    for engine in engines.values():
        engine.close()
    assert not differences, report(differences)


@pytest.mark.usefixtures("one_cpu")
def test_audit_notices_a_packet_that_was_not_read(
    artefact: loader.Artefact, memory: WorkMemory
) -> None:
    engine = QuickEngine(
        artefact, Hook.XDP, OPEN.facts, OPEN.policy, conntrack_max=1024, memory=memory
    )
    try:
        engine.judge(Path.FROM_VM, bytes(60))
        engine.audit()
        libbpf.prog_test_run(engine._instance.programs["xdp_from_vm"], bytes(60))
        with pytest.raises(AuditError):
            engine.audit()
    finally:
        engine.close()


def without(guard: Guard) -> Callable[[pytest.MonkeyPatch], type[EvaluatorEngine]]:
    """Return what makes an evaluator that lacks a guard."""

    def make(_: pytest.MonkeyPatch) -> type[EvaluatorEngine]:
        class Unguarded(EvaluatorEngine):
            def __init__(
                self, facts: EndpointFacts, policy: EffectivePolicy | None, conntrack_max: int
            ) -> None:
                less = replace(facts, guards=facts.guards & ~guard)
                super().__init__(less, policy, conntrack_max)

        return Unguarded

    return make


def any_reset_closes(patch: pytest.MonkeyPatch) -> type[EvaluatorEngine]:
    """Make an evaluator that heeds resets out of sequence."""
    patch.setattr("vgw.policy.tracking._reset_is_exact", lambda *_: True)
    return EvaluatorEngine


def short_memory(_: pytest.MonkeyPatch) -> type[EvaluatorEngine]:
    """Make an evaluator that forgets answered UDP flows too soon."""

    class Forgetful(EvaluatorEngine):
        def __init__(
            self, facts: EndpointFacts, policy: EffectivePolicy | None, conntrack_max: int
        ) -> None:
            timeouts = {**facts.timeouts_ns, FlowState.UDP_REPLIED: 30 * SECOND_NS}
            super().__init__(replace(facts, timeouts_ns=timeouts), policy, conntrack_max)

    return Forgetful


def deaf_to_policies(_: pytest.MonkeyPatch) -> type[EvaluatorEngine]:
    """Make an evaluator that goes on with the policy it began with."""

    class Deaf(EvaluatorEngine):
        def set_policy(self, policy: EffectivePolicy | None) -> None:
            pass

    return Deaf


MISTAKES = (
    *(without(guard) for guard in Guard),
    any_reset_closes,
    short_memory,
    deaf_to_policies,
)
IDS = (*(f"no {guard.name} guard" for guard in Guard), *(each.__name__ for each in MISTAKES[-3:]))


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("make", MISTAKES, ids=IDS)
def test_a_wrong_evaluator_is_found(
    artefact: loader.Artefact,
    memory: WorkMemory,
    sequences: Sequences,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[pytest.MonkeyPatch], type[EvaluatorEngine]],
) -> None:
    """Negative controls: a short row is left of each mistake, and shows it again."""
    wrong = make(monkeypatch)
    rig = Rig(artefact, memory, (Hook.TC,), model=wrong)
    try:
        catch = Hunt(rig, sequences, range(SOON)).next(lambda: False)
    finally:
        rig.close()
    assert catch is not None, f"not found in {rig.counts.packets} packets"
    finding = describe(catch, artefact, (Hook.TC,))
    assert finding.steps <= min(SHORT, finding.steps_before), finding.row
    case = case_of(catch.small)
    assert _pasted(finding.row) == case
    facts, policy = case.fixture.facts, case.fixture.policy
    model = wrong(facts, policy, case.conntrack_max)
    program = ProgramEngine(artefact, Hook.TC, facts, policy, case.conntrack_max)
    try:
        assert _last_is_different(program, case)
        assert not _last_is_different(model, case)
    finally:
        program.close()


def _last_is_different(engine: Engine, case: table.Case) -> bool:
    return len(case.steps) in {difference.step for difference in play(engine, case)}


def _pasted(row: str) -> table.Case:
    """Return what a row says in a module of the verdict tables."""
    names = {**vars(table), **vars(fixtures), **vars(trial), **vars(abi)}
    (case,) = eval(f"(\n{row}\n)", names)  # noqa: S307 (the text is our own)
    assert isinstance(case, table.Case)
    return case
