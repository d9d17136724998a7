# SPDX-License-Identifier: Apache-2.0
"""What is tried: steps of one endpoint, and the endpoints and policies that there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.cases import fixtures
from tests.cases.fixtures import (
    ALL_ACCEPTED,
    CLOSED,
    CUT_OFF,
    GUARDED,
    NAMELESS_OPEN,
    NO_MAC_OPEN,
    NOTHING_ACCEPTED,
    OPEN,
    OTHER_PROTOCOLS,
    SERVER,
    SERVICES,
    TRUNK,
    TYPICAL,
    UNGUARDED_OPEN,
    USUAL,
    WATCHED,
    policy,
)
from tests.cases.table import Apply, Fixture, Wait
from vgw.abi import Action, Path
from vgw.policy.model import EffectivePolicy


class Shot(NamedTuple):
    """A packet; `gso` as in table.Send."""

    path: Path
    frame: bytes
    gso: bool = False


Step = Shot | Wait | Apply


@dataclass(frozen=True, slots=True)
class Scene:
    """An endpoint with its first policy and those that may follow it in a sequence.

    In a small table nothing may die during a sequence: the programs find dead flows by and by,
    the evaluator at once.
    """

    fixture: Fixture
    weight: int
    others: tuple[EffectivePolicy | None, ...] = (NOTHING_ACCEPTED, SERVICES, None)
    conntrack_max: int = 1024

    @property
    def is_small(self) -> bool:
        """Whether a sequence can fill the table of flows."""
        return self.conntrack_max < 100


REJECTING: Final = Fixture(
    "rejecting", GUARDED, policy(ingress=Action.REJECT, egress=Action.REJECT)
)
SCENES: Final = (
    Scene(OPEN, 24),
    Scene(TYPICAL, 20, (ALL_ACCEPTED, SERVICES, None)),
    Scene(SERVER, 16, (ALL_ACCEPTED, USUAL, NOTHING_ACCEPTED)),
    Scene(WATCHED, 6, (ALL_ACCEPTED, USUAL, None)),
    Scene(TRUNK, 6),
    Scene(UNGUARDED_OPEN, 6),
    Scene(OTHER_PROTOCOLS, 6, (ALL_ACCEPTED, USUAL)),
    Scene(NAMELESS_OPEN, 3),
    Scene(NO_MAC_OPEN, 3),
    Scene(REJECTING, 3, (USUAL, SERVICES)),
    Scene(CLOSED, 2, (ALL_ACCEPTED,)),
    Scene(OPEN, 4, (), conntrack_max=4),
    Scene(CUT_OFF, 1),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """Steps that start without any state; `name` says how to get them again."""

    name: str
    scene: Scene
    steps: tuple[Step, ...]


def name_of(value: Fixture | EffectivePolicy | None) -> str:
    """Return the name by which a fixture or a policy is to be had in tests/cases/fixtures.py."""
    if value is None:
        return "None"
    for module in (vars(fixtures), globals()):
        for name, each in module.items():
            if name.isupper() and each is value:
                return name
    raise ValueError(f"no constant has the value {value}")
