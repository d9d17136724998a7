# SPDX-License-Identifier: Apache-2.0
"""What the programs of an engine put into its perf buffer, decoded."""

from __future__ import annotations

from types import TracebackType

from tests.program_engine import ProgramEngine
from vgw import abi, libbpf
from vgw.controller.event_decoder import Decoded, Lease, decode


class EventTap:
    """Reads the events of an engine while it is open; later ones are lost."""

    def __init__(self, engine: ProgramEngine, pages: int = 64) -> None:
        self._taken: list[Decoded] = []
        self._reader = libbpf.PerfReader(
            engine.fd("events"), self._take, lambda *_: None, pages, wakeup_events=1
        )

    def __enter__(self) -> EventTap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()

    def packets(self) -> list[abi.Event]:
        """Return the events of packets since the last call of any of these."""
        return [event for event in self._new() if isinstance(event, abi.Event)]

    def flows(self) -> list[abi.FlowEvent]:
        """Return the events of flows since the last call of any of these."""
        return [event for event in self._new() if isinstance(event, abi.FlowEvent)]

    def _new(self) -> list[Decoded]:
        self._reader.consume()
        taken, self._taken = self._taken, []
        return sorted(taken, key=_time)

    def _take(self, _cpu: int, data: bytes) -> None:
        event = decode(data)
        assert event is not None, f"malformed record {data.hex()}"
        self._taken.append(event)


def _time(event: Decoded) -> int:
    if isinstance(event, Lease | abi.FlowEvent):
        return event.event.time_ns  # type: ignore[no-any-return]
    return event.time_ns  # type: ignore[no-any-return]
