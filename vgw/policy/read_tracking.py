# SPDX-License-Identifier: Apache-2.0
"""The `conntrack` section of a VM: timeouts of its flows by state, and limits of new ones."""

from __future__ import annotations

from functools import partial
from typing import Final

from vgw.abi import FlowState
from vgw.policy import values
from vgw.policy.fields import Fields, Keys
from vgw.policy.flows import SECOND_NS
from vgw.policy.model import Tracking
from vgw.policy.report import Report
from vgw.policy.yaml_nodes import Node

_DAY: Final = 24 * 3600
#: A dead flow is over, whatever its age.
_STATES: Final = {state.name.lower(): state for state in FlowState if state is not FlowState.DEAD}

_KEYS: Final = Keys("`conntrack`", ("timeouts", "half_open_max", "new_per_second", "grace"))
_TIMEOUT_KEYS: Final = Keys("`timeouts`", tuple(_STATES))
_TIMEOUT: Final = partial(values.duration, lowest=1, highest=30 * _DAY)
_GRACE: Final = partial(values.duration, lowest=0, highest=3600)
_HALF_OPEN_MAX: Final = partial(values.integer, lowest=512, highest=131072)
_NEW_PER_SECOND: Final = partial(values.integer, lowest=0, highest=10_000_000)


def read_tracking(report: Report, node: Node | None) -> Tracking:
    """Read how the connections of a VM are tracked; without a node, as by default."""
    usual = Tracking()
    if node is None:
        return usual
    found = Fields(report, node, _KEYS)
    return Tracking(
        timeouts_ns=_read_timeouts(report, found.value("timeouts")),
        half_open_max=found.scalar("half_open_max", _HALF_OPEN_MAX, usual.half_open_max),
        new_per_second=found.scalar("new_per_second", _NEW_PER_SECOND, usual.new_per_second),
        grace_seconds=found.scalar("grace", _GRACE, usual.grace_seconds),
    )


def _read_timeouts(report: Report, node: Node | None) -> tuple[tuple[FlowState, int], ...]:
    if node is None:
        return ()
    found = Fields(report, node, _TIMEOUT_KEYS)
    seconds = {state: found.scalar(name, _TIMEOUT, 0) for name, state in _STATES.items()}
    return tuple((state, each * SECOND_NS) for state, each in seconds.items() if each)
