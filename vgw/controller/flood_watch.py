# SPDX-License-Identifier: Apache-2.0
"""The thread that meets floods: it raises shields where programs tell of one, and lowers them.

Nothing is looked at until a program tells of a flood. From then on the counters of that endpoint
are read once a second, until the flood is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vgw import libbpf
from vgw.controller.changes import Changes
from vgw.controller.events import control_record
from vgw.controller.floods import FloodJudge, Step, Traffic, traffic_from_vm
from vgw.controller.shield import PROGRAM, Shields
from vgw.controller.stages import with_stages
from vgw.errors import VgwError
from vgw.maps import EndpointMaps

#: How often the packets of a VM that floods are looked at.
LOOK_SECONDS: Final = 1.0
#: How long a VM gets no shield after one was lowered or could not be raised: to load it takes some
#: tenths of a second of a processor, so a VM must not have that done at will.
PUT_OFF_SECONDS: Final = 60.0
#: The thread shows at least this often that it goes round.
_TURN_SECONDS: Final = 1.0

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    """An endpoint whose packets are looked at, by the counters that are held open."""

    vm: str
    interface: str
    maps: EndpointMaps
    judge: FloodJudge

    def look(self) -> Step:
        return self.judge.look(self.traffic(), time.monotonic())

    def traffic(self) -> Traffic:
        return traffic_from_vm(self.maps.stats())


class FloodWatch:
    """Meets the floods of a host in a thread of its own, once started until stopped."""

    def __init__(
        self, changes: Changes, shields: Shields, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Raise and lower `shields`; `alive` is called at every turn."""
        self._changes = changes
        self._shields = shields
        self._alive = alive
        self._told = threading.Condition()
        self._reported: dict[int, tuple[str, str]] = {}
        self._stopping = False
        self._watched: dict[int, _Watched] = {}
        #: Endpoint -> until when it gets no shield, by the monotonic clock.
        self._put_off: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, name="floods", daemon=True)

    def heard(self, endpoint: int, vm: str, interface: str) -> None:
        """Take the report of a program that an endpoint floods; by any thread, at once."""
        with self._told:
            self._reported[endpoint] = (vm, interface)
            self._told.notify()

    def start(self) -> None:
        """Begin to meet floods."""
        self._thread.start()

    def stop(self) -> None:
        """Lower all shields and end the thread."""
        with self._told:
            self._stopping = True
            self._told.notify()
        self._thread.join()

    def _run(self) -> None:
        look_at = 0.0
        while not self._stopping:
            self._alive()
            try:
                self._take_reports(look_at)
                if self._watched and time.monotonic() >= look_at:
                    look_at = time.monotonic() + LOOK_SECONDS
                    for identity in list(self._watched):
                        self._look(identity)
            except Exception:
                # A bug that one endpoint meets must not leave the floods of all.
                _logger.exception("meeting floods goes on after an internal error")
                time.sleep(1)
        for identity in list(self._watched):
            self._forget(identity)
        self._shields.close()

    def _take_reports(self, look_at: float) -> None:
        """Wait until there are reports or it is time to look; begin to watch what is reported."""
        with self._told:
            wait = max(0.0, look_at - time.monotonic()) if self._watched else _TURN_SECONDS
            self._told.wait_for(lambda: self._reported or self._stopping, min(wait, _TURN_SECONDS))
            reported, self._reported = self._reported, {}
        now = time.monotonic()
        self._put_off = {each: until for each, until in self._put_off.items() if until > now}
        for identity, (vm, interface) in reported.items():
            if identity not in self._watched and identity not in self._put_off:
                self._watch(identity, vm, interface)

    def _watch(self, identity: int, vm: str, interface: str) -> None:
        directory = self._changes.host.paths.endpoint_dir(vm, interface)
        try:
            maps = EndpointMaps({"stats": libbpf.get_pinned(directory / "stats")})
        except VgwError:
            return  # it went at this moment
        watched = _Watched(vm, interface, maps, FloodJudge(Traffic(0, 0, 0), 0.0))
        watched.judge = FloodJudge(watched.traffic(), time.monotonic())
        self._watched[identity] = watched

    def _look(self, identity: int) -> None:
        watched = self._watched[identity]
        if watched.judge.up and identity not in self._shields.up():
            self._say(watched, "shield_lowered")  # by a change, after which the VM may go on
            self._forget(identity)
            return
        match watched.look():
            case Step.RAISE:
                self._raise(identity, watched)
            case Step.LOWER:
                self._shields.lower(identity)
                self._say(watched, "shield_lowered")
                self._put_off_and_forget(identity)
            case Step.FORGET:
                self._forget(identity)

    def _raise(self, identity: int, watched: _Watched) -> None:
        try:
            self._changes.host.artefact(with_stages((PROGRAM,)))  # which may take seconds
            with self._changes.one():
                self._changes.host.raise_shield(watched.vm, watched.interface)
                watched.judge.up = True
                self._say(watched, "shield_raised")
        except VgwError as error:
            _logger.warning(
                "%s %s floods, and is met at tc alone: %s", watched.vm, watched.interface, error
            )
            self._put_off_and_forget(identity)

    def _say(self, watched: _Watched, event: str) -> None:
        self._changes.log.add(control_record(event, vm=watched.vm, interface=watched.interface))

    def _put_off_and_forget(self, identity: int) -> None:
        self._put_off[identity] = time.monotonic() + PUT_OFF_SECONDS
        self._forget(identity)

    def _forget(self, identity: int) -> None:
        self._watched.pop(identity).maps.close()
