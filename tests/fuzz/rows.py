# SPDX-License-Identifier: Apache-2.0
"""A disagreement as a row for the verdict tables: as a Case, and as text to paste."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.table import Apply, Case, Expected, Send, Wait
from tests.cases.table import Step as TableStep
from tests.engines import Outcome
from tests.fuzz.compare import MODEL, Disagreement, Said
from tests.fuzz.trial import Shot, name_of

_HEX_DIGITS = 76
#: What Case takes when it is not told.
_USUAL_MAX = 1024


def case_of(found: Disagreement) -> Case:
    """Return the row that says of each packet what the evaluator says."""
    scene = found.trial.scene
    steps = tuple(_steps(found))
    return Case(f"fuzz {found.trial.name}", scene.fixture, steps, conntrack_max=scene.conntrack_max)


def row_of(found: Disagreement) -> str:
    """Return the row as Python, with what the engines say of its last packet."""
    case = case_of(found)
    lines = [f"    # {name}: {said_text(said)}" for name, said in found.last.items()]
    lines += [
        "    Case(",
        f'        "{case.name}",',
        f"        {name_of(case.fixture)},",
        "        (",
    ]
    for step in case.steps:
        lines += _step_lines(step)
    lines.append("        ),")
    if case.conntrack_max != _USUAL_MAX:
        lines.append(f"        conntrack_max={case.conntrack_max},")
    return "\n".join([*lines, "    ),"])


def said_text(said: Said) -> str:
    """Return what an engine says, for people."""
    if isinstance(said, Outcome):
        return f"{said.verdict.name} {said.reason.name} {said.rule_key or '-'}"
    return said or "cannot be given this packet"


def _steps(found: Disagreement) -> Iterator[TableStep]:
    for place, step in enumerate(found.trial.steps):
        if isinstance(step, Shot):
            expected = _expected(
                [found.said[MODEL][place], *(s[place] for s in found.said.values())]
            )
            yield Send(step.path, step.frame, expected, gso=step.gso)
        else:
            yield step


def _expected(said: list[Said]) -> Expected:
    """Return what the first engine that has an outcome says."""
    verdict, reason, rule_key = next(each for each in said if isinstance(each, Outcome))
    return Expected(verdict, reason, None if rule_key is None else rule_key.rsplit("/", 1)[1])


def _step_lines(step: TableStep) -> Iterator[str]:
    indent = " " * 12
    match step:
        case Wait(seconds):
            yield f"{indent}Wait({seconds}),"
        case Apply(policy):
            yield f"{indent}Apply({name_of(policy)}),"
        case Send(path, frame, expected, gso=gso):
            digits = frame.hex()
            verdict, reason, rule = expected
            name = "None" if rule is None else f'"{rule}"'
            yield f"{indent}Send("
            yield f"{indent}    Path.{path.name},"
            yield f"{indent}    bytes.fromhex("
            for start in range(0, len(digits), _HEX_DIGITS):
                yield f'{indent}        "{digits[start : start + _HEX_DIGITS]}"'
            yield f"{indent}    ),"
            yield f"{indent}    Expected(Verdict.{verdict.name}, Reason.{reason.name}, {name}),"
            if gso:
                yield f"{indent}    gso=True,"
            yield f"{indent}),"
