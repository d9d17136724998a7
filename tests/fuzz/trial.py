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
    egress,
    ingress,
    networks,
    policy,
    ports,
)
from tests.cases.table import Apply, Fixture, Wait
from tests.frames import PEER4, PEER6, STRANGER4, TCP, UDP
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
    """An endpoint with its policy and another one that may follow it in a sequence.

    Two policies and no more, because programs change quickly between two that they hold. In a
    small table nothing may die during a sequence: the programs find dead flows by and by, the
    evaluator at once.
    """

    fixture: Fixture
    weight: int
    other: EffectivePolicy | None
    conntrack_max: int = 1024

    @property
    def is_small(self) -> bool:
        """Whether a sequence can fill the table of flows."""
        return self.conntrack_max < 100


REJECTING: Final = Fixture(
    "rejecting", GUARDED, policy(ingress=Action.REJECT, egress=Action.REJECT)
)
#: More rules than a program looks through in one go, about ports and hosts that packets have.
MANY_RULES: Final = Fixture(
    "many-rules",
    GUARDED,
    policy(
        *(
            make(
                f"{peer}-{protocol}-{port}",
                action,
                peers=networks(peer),
                services=(ports(protocol, port),),
            )
            for make in (ingress, egress)
            for peer in (PEER4, PEER6, STRANGER4, "10.20.0.0/24")
            for protocol in (TCP, UDP)
            for port, action in (
                (22, Action.ACCEPT),
                (23, Action.REJECT),
                (53, Action.ACCEPT),
                (443, Action.ACCEPT),
                (3306, Action.DROP),
                (8050, Action.ACCEPT),
                (40000, Action.ACCEPT),
                (65535, Action.DROP),
                (1, Action.DROP),
            )
        ),
        ingress=Action.DROP,
        egress=Action.DROP,
    ),
)
SCENES: Final = (
    Scene(OPEN, 12, NOTHING_ACCEPTED),
    Scene(OPEN, 8, SERVICES),
    Scene(OPEN, 4, None),
    Scene(TYPICAL, 10, ALL_ACCEPTED),
    Scene(TYPICAL, 10, SERVICES),
    Scene(SERVER, 10, USUAL),
    Scene(SERVER, 6, OTHER_PROTOCOLS.policy),
    Scene(WATCHED, 6, NOTHING_ACCEPTED),
    Scene(TRUNK, 6, SERVICES),
    Scene(UNGUARDED_OPEN, 6, SERVICES),
    Scene(OTHER_PROTOCOLS, 6, USUAL),
    Scene(NAMELESS_OPEN, 3, NOTHING_ACCEPTED),
    Scene(NO_MAC_OPEN, 3, NOTHING_ACCEPTED),
    Scene(REJECTING, 3, SERVICES),
    Scene(CLOSED, 2, ALL_ACCEPTED),
    Scene(MANY_RULES, 4, SERVICES),
    Scene(OPEN, 4, NOTHING_ACCEPTED, conntrack_max=4),
    Scene(CUT_OFF, 1, NOTHING_ACCEPTED),
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
            if isinstance(each, Fixture) and each.policy is value:
                return f"{name}.policy"
    raise ValueError(f"no constant has the value {value}")
