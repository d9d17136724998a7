# SPDX-License-Identifier: Apache-2.0
"""What judges packets in tests: the reference evaluator, and runs of the verdict tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict, Unpack

from tests.cases.table import Apply, Case, Expected, Fixture, Reconfigure, Send, Wait
from vgw.abi import Path, Reason, Verdict
from vgw.policy.evaluate import Evaluator
from vgw.policy.flows import SECOND_NS
from vgw.policy.guards import EndpointFacts
from vgw.policy.model import EffectivePolicy


class Outcome(NamedTuple):
    """What an engine said of a packet; `rule_key` is EffectiveRule.key."""

    verdict: Verdict
    reason: Reason
    rule_key: str | None

    def matches(self, expected: Expected) -> bool:
        name = None if self.rule_key is None else self.rule_key.rsplit("/", 1)[1]
        return (self.verdict, self.reason, name) == expected


class Beside(TypedDict, total=False):
    """What the kernel holds beside the bytes of a packet, as Evaluator.judge() takes it."""

    gso: bool
    vlan_tag: int | None
    checksum: tuple[int, int] | None


class CannotRunError(Exception):
    """This engine has no way to be given such a packet."""


class Engine(Protocol):
    """Judges the packets of one endpoint and keeps its state."""

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        """Judge one packet; raises CannotRunError for one that it cannot be given."""

    def advance(self, seconds: float) -> None:
        """Let time pass for the flows."""

    def set_policy(self, policy: EffectivePolicy | None) -> None:
        """Put a policy in force as a new generation, or take it away."""

    def set_facts(self, facts: EndpointFacts) -> None:
        """Change what the guards know."""

    def reset(self) -> None:
        """Forget all state."""

    def set_grace(self, seconds: float) -> None:
        """Begin a time in which open TCP connections are taken over, or end it."""

    def close(self) -> None:
        """Give everything back."""


class EvaluatorEngine:
    """The reference evaluator with a clock that only `advance` moves."""

    def __init__(
        self, facts: EndpointFacts, policy: EffectivePolicy | None, conntrack_max: int = 1024
    ) -> None:
        self._evaluator = Evaluator(facts, policy)
        self._conntrack_max = conntrack_max
        self._now_ns = 0

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        decision = self._evaluator.judge(
            path,
            frame,
            now_ns=self._now_ns,
            conntrack_max=self._conntrack_max,
            **beside,
        )
        rule_key = None if decision.rule is None else decision.rule.key
        return Outcome(decision.verdict, decision.reason, rule_key)

    def advance(self, seconds: float) -> None:
        self._now_ns += int(seconds * SECOND_NS)

    def set_policy(self, policy: EffectivePolicy | None) -> None:
        self._evaluator.set_policy(policy)

    def set_facts(self, facts: EndpointFacts) -> None:
        self._evaluator.facts = facts

    def reset(self) -> None:
        self._evaluator.reset()

    def set_grace(self, seconds: float) -> None:
        self._evaluator.grace_until_ns = self._now_ns + int(seconds * SECOND_NS)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Difference:
    """A packet that did not get what it should."""

    case: str
    step: int
    path: Path
    frame: bytes
    expected: Expected
    outcome: Outcome

    def __str__(self) -> str:
        verdict, reason, rule = self.outcome
        return (
            f"{self.case}, step {self.step}, {self.path.name}: expected "
            f"{self.expected.verdict.name} {self.expected.reason.name} {self.expected.rule}, "
            f"got {verdict.name} {reason.name} {rule}; frame {self.frame.hex()}"
        )


def play(engine: Engine, case: Case) -> list[Difference]:
    """Play a case from a clean state; returns the packets that did not get what they should.

    Raises CannotRunError when the engine cannot be given one of them.
    """
    engine.reset()
    engine.set_grace(case.grace)
    differences = []
    for number, step in enumerate(case.steps, 1):
        match step:
            case Send(path, frame, expected, vlan_tag, gso, checksum):
                outcome = engine.judge(path, frame, gso=gso, vlan_tag=vlan_tag, checksum=checksum)
                if not outcome.matches(expected):
                    differences.append(
                        Difference(case.name, number, path, frame, expected, outcome)
                    )
            case Wait(seconds):
                engine.advance(seconds)
            case Apply(policy):
                engine.set_policy(policy)
            case Reconfigure(interface, mode):
                fixture = Fixture("changed", interface, case.fixture.policy, mode)
                engine.set_facts(fixture.facts)
    return differences


def changes_endpoint(case: Case) -> bool:
    """Tell whether a case leaves its engine under another policy or other facts."""
    return any(isinstance(step, Apply | Reconfigure) for step in case.steps)


def report(differences: Sequence[Difference]) -> str:
    """Return the text of a failed comparison, cut where it stops being readable."""
    shown = [str(difference) for difference in differences[:20]]
    return f"{len(differences)} packets differ:\n" + "\n".join(shown)
