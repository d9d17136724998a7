# SPDX-License-Identifier: Apache-2.0
"""An endpoint at tc during a flood: the shield at XDP, and behind it the program that judges."""

from __future__ import annotations

from typing import Unpack

from tests.engines import Beside, Outcome
from tests.program_engine import ProgramEngine, is_tagged
from vgw import abi, libbpf, loader
from vgw.abi import Path, Verdict
from vgw.controller.shield import PROGRAM, load_shield
from vgw.policy.guards import EndpointFacts
from vgw.policy.model import EffectivePolicy, Hook

XDP_DROP, XDP_PASS = 1, 2


class ShieldedEngine(ProgramEngine):
    """A ProgramEngine with a shield; what that hands on must be as if it had not been there."""

    def __init__(
        self,
        artefact: loader.Artefact,
        facts: EndpointFacts,
        policy: EffectivePolicy | None,
        conntrack_max: int = 1024,
    ) -> None:
        super().__init__(artefact, Hook.TC, facts, policy, conntrack_max)
        self._shield = load_shield(artefact, self._instance.maps)
        #: Packets that the shield dropped.
        self.met = 0

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        if path is Path.FROM_VM and not is_tagged(beside) and self.is_met(frame):
            self.met += 1
            verdict, reason = self._moved_counter(path)
            assert verdict is Verdict.DROP
            return Outcome(verdict, reason, self._moved_rule())
        return super().judge(path, frame, **beside)

    def close(self) -> None:
        self._shield.close()
        super().close()

    def is_met(self, frame: bytes) -> bool:
        """Show a frame to the shield; return whether it dropped it."""
        before = self._state()
        run = libbpf.prog_test_run(self._shield.programs[PROGRAM], frame)
        assert run.data_out == frame, "the shield changed the packet"
        if run.retval == XDP_DROP:
            return True
        assert run.retval == XDP_PASS
        assert self._state() == before, "the shield left a trace of what it handed on"
        return False

    def _state(self) -> object:
        """Return all that packets leave, but for when the VM asked for an address."""
        meta = abi.ConntrackMeta.from_buffer_copy(self.maps.meta())
        meta.dhcp_renewed_ns = 0
        meta.dhcp_asked_ns[:] = [0, 0]
        return (
            self.maps.stats(),
            self._rule_hits(),
            bytes(meta),
            [(bytes(key), bytes(flow)) for key, flow in self.maps.flows()],
            [(key, bytes(first)) for key, first in self._fragments()],
            bytes(self.maps.event_meter()),
            bytes(self.maps.reject_meter()),
        )
