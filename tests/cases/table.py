# SPDX-License-Identifier: Apache-2.0
"""What a verdict table is made of: cases of steps, and the fixtures they start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.frames import IN, OUT, Wire
from vgw.abi import Mode, Path, Reason, Verdict
from vgw.policy.guards import EndpointFacts, endpoint_facts
from vgw.policy.model import EffectivePolicy, Interface


@dataclass(frozen=True, slots=True)
class Fixture:
    """An endpoint under a policy."""

    name: str
    interface: Interface
    policy: EffectivePolicy
    mode: Mode = Mode.ENFORCE

    @property
    def facts(self) -> EndpointFacts:
        return endpoint_facts(self.interface, self.mode)


class Expected(NamedTuple):
    """What a packet must get; `rule` is the name of the rule that judged it."""

    verdict: Verdict
    reason: Reason
    rule: str | None = None


def accepted(reason: Reason = Reason.DEFAULT) -> Expected:
    return Expected(Verdict.ACCEPT, reason)


def dropped(reason: Reason) -> Expected:
    return Expected(Verdict.DROP, reason)


def by_rule(rule: str, verdict: Verdict = Verdict.ACCEPT) -> Expected:
    return Expected(verdict, Reason.RULE, rule)


DEFAULT = accepted()
ESTABLISHED = accepted(Reason.CT_ESTABLISHED)
RELATED = accepted(Reason.CT_RELATED)
NO_STATE = dropped(Reason.NO_STATE)
UNRELATED = dropped(Reason.ICMP_UNRELATED)
DENIED = dropped(Reason.DEFAULT)


@dataclass(frozen=True, slots=True)
class Send:
    """A packet and what it must get.

    `vlan_tag`, `gso` and `checksum` are what the kernel holds beside it, as in parse_frame.
    """

    path: Path
    frame: bytes
    expected: Expected
    vlan_tag: int | None = None
    gso: bool = False
    checksum: tuple[int, int] | None = None

    @property
    def for_test_run(self) -> bool:
        """Whether BPF_PROG_TEST_RUN has a way to be given what is beside the frame."""
        return self.vlan_tag is None and self.checksum is None


@dataclass(frozen=True, slots=True)
class Wait:
    """Time passes."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Apply:
    """Another policy comes into force, or none at all."""

    policy: EffectivePolicy | None


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """What the endpoint's guards know changes."""

    interface: Interface
    mode: Mode = Mode.ENFORCE


Step = Send | Wait | Apply | Reconfigure


@dataclass(frozen=True, slots=True)
class Case:
    """A row: steps that start without any flow. Most have one step.

    For `grace` seconds TCP connections that nobody saw begin are taken over.
    """

    name: str
    fixture: Fixture
    steps: tuple[Step, ...]
    conntrack_max: int = 1024
    grace: float = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Makes the one-packet cases of a table for one fixture."""

    fixture: Fixture

    def out(
        self,
        name: str,
        frame: bytes,
        expected: Expected,
        *,
        vlan_tag: int | None = None,
        gso: bool = False,
        checksum: tuple[int, int] | None = None,
    ) -> Case:
        """Return the case of a frame that the VM sends."""
        send = Send(Path.FROM_VM, frame, expected, vlan_tag, gso, checksum)
        return Case(f"{name}, from_vm", self.fixture, (send,))

    def into(
        self,
        name: str,
        frame: bytes,
        expected: Expected,
        *,
        vlan_tag: int | None = None,
        gso: bool = False,
        checksum: tuple[int, int] | None = None,
    ) -> Case:
        """Return the case of a frame toward the VM."""
        send = Send(Path.TO_VM, frame, expected, vlan_tag, gso, checksum)
        return Case(f"{name}, to_vm", self.fixture, (send,))

    def both(
        self,
        name: str,
        make: Callable[[Wire], bytes],
        expected: Expected,
        *,
        gso: bool = False,
        checksum: tuple[int, int] | None = None,
    ) -> Iterator[Case]:
        """Yield the cases of a frame and its mirror image, which must get the same."""
        yield self.out(name, make(OUT), expected, gso=gso, checksum=checksum)
        yield self.into(name, make(IN), expected, gso=gso, checksum=checksum)


def out(frame: bytes, expected: Expected) -> Send:
    """Return the step in which the VM sends a frame."""
    return Send(Path.FROM_VM, frame, expected)


def into(frame: bytes, expected: Expected) -> Send:
    """Return the step in which a frame comes for the VM."""
    return Send(Path.TO_VM, frame, expected)
