# SPDX-License-Identifier: Apache-2.0
"""The targets of the fuzzer by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.fuzz.inputs.policy_target import PolicyTarget
from tests.fuzz.inputs.record_target import RecordTarget
from tests.fuzz.inputs.socket_target import SocketTarget
from tests.fuzz.inputs.state_target import StateTarget
from tests.fuzz.inputs.target import Target

TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "policy": PolicyTarget,
    "state": StateTarget,
    "socket": SocketTarget,
    "records": RecordTarget,
}
