# SPDX-License-Identifier: Apache-2.0
"""The thread that meets floods: it raises shields where programs tell of one, and lowers them.

Nothing is looked at until a program tells of a flood. From then on the counters of that endpoint
are read once a second, until the flood is over.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
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


class _Watched:
    """An endpoint whose packets are looked at, by the counters that are held open."""

    def __init__(self, vm: str, interface: str, directory: pathlib.Path) -> None:
        """Begin with what the endpoint pinned in a directory has counted by now.

        Raises VgwError when it is gone.
        """
        self.vm, self.interface = vm, interface
        self._maps = EndpointMaps({"stats": libbpf.get_pinned(directory / "stats")})
        try:
            self.judge = FloodJudge(self._traffic(), time.monotonic())
        except BaseException:
            self._maps.close()
            raise

    def look(self) -> Step:
        return self.judge.look(self._traffic(), time.monotonic())

    def close(self) -> None:
        self._maps.close()

    def _traffic(self) -> Traffic:
        return traffic_from_vm(self._maps.stats(), self._maps.flood_drops())


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
        try:
            self._go_round()
        finally:
            self._shields.close()
            for watched in self._watched.values():
                watched.close()

    def _go_round(self) -> None:
        look_at = 0.0
        while not self._stopping:
            self._alive()
            for identity, (vm, interface) in self._reports(look_at).items():
                with self._apart(identity, vm, interface):
                    self._watch(identity, vm, interface)
            if self._watched and time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_SECONDS
                for identity, watched in list(self._watched.items()):
                    self._alive()  # for each: a shield may have to be compiled
                    with self._apart(identity, watched.vm, watched.interface):
                        self._look(identity, watched)

    def _reports(self, look_at: float) -> dict[int, tuple[str, str]]:
        """Wait until there are reports or it is time to look; return those of new floods."""
        with self._told:
            wait = max(0.0, look_at - time.monotonic()) if self._watched else _TURN_SECONDS
            self._told.wait_for(lambda: self._reported or self._stopping, min(wait, _TURN_SECONDS))
            reported, self._reported = self._reported, {}
        now = time.monotonic()
        self._put_off = {each: until for each, until in self._put_off.items() if until > now}
        known = self._watched.keys() | self._put_off.keys()
        return {identity: named for identity, named in reported.items() if identity not in known}

    @contextlib.contextmanager
    def _apart(self, identity: int, vm: str, interface: str) -> Iterator[None]:
        """Do something about one endpoint: what goes wrong must not leave the floods of others."""
        try:
            yield
        except Exception as error:
            if isinstance(error, VgwError | OSError):
                _logger.warning("%s %s floods, and is met at tc alone: %s", vm, interface, error)
            else:
                _logger.exception("%s %s floods, and is left alone", vm, interface)
            with contextlib.suppress(Exception):  # once more what went wrong
                self._end(identity)

    def _watch(self, identity: int, vm: str, interface: str) -> None:
        directory = self._changes.host.paths.endpoint_dir(vm, interface)
        self._watched[identity] = _Watched(vm, interface, directory)

    def _look(self, identity: int, watched: _Watched) -> None:
        if watched.judge.up and identity not in self._shields.up():
            self._say(watched, "shield_lowered")  # by a change, after which the VM may go on
            self._forget(identity)
            return
        match watched.look():
            case Step.RAISE:
                self._raise(identity, watched)
            case Step.LOWER:
                self._end(identity)
            case Step.FORGET:
                self._forget(identity)

    def _raise(self, identity: int, watched: _Watched) -> None:
        self._changes.host.artefact(with_stages((PROGRAM,)))  # which may take seconds
        with self._changes.one():
            self._changes.host.raise_shield(identity, watched.vm, watched.interface)
            watched.judge.up = True
            self._say(watched, "shield_raised")

    def _end(self, identity: int) -> None:
        """Lower the shield of an endpoint, if it has one, and give it none for some time."""
        self._put_off[identity] = time.monotonic() + PUT_OFF_SECONDS
        watched = self._watched.pop(identity, None)
        try:
            self._shields.lower(identity)
        finally:
            if watched is not None:
                watched.close()
        if watched is not None and watched.judge.up:
            self._say(watched, "shield_lowered")

    def _say(self, watched: _Watched, event: str) -> None:
        self._changes.log.add(control_record(event, vm=watched.vm, interface=watched.interface))

    def _forget(self, identity: int) -> None:
        self._watched.pop(identity).close()
