# SPDX-License-Identifier: Apache-2.0
"""Shields: programs at XDP that meet a VM's floods in front of the one at tc (bpf/shield.h).

A shield lives as long as the controller holds the descriptor of its link, so a controller that
ends takes its shields along and leaves packets to tc, where they are judged in any case. Its
program is pinned beside the endpoint's, by which everybody knows it for vgw's; what a killed
controller leaves is that pin, until the endpoint gets another shield or goes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vgw import files, libbpf, loader
from vgw.controller.builds import build_of
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.links import pinned_program, shield_pin
from vgw.controller.pins import endpoint_dirs, quietly
from vgw.controller.stages import has_stages, load_stages, with_stages
from vgw.controller.tools import Tools
from vgw.errors import KernelError, VgwError
from vgw.libbpf import AttachType
from vgw.loader import Artefact, Instance, packet_build

PROGRAM: Final = "xdp_shield"


def load_shield(artefact: Artefact, fds: Mapping[str, int], *, staged: bool = True) -> Instance:
    """Load a shield that uses the maps of an endpoint, the host's `events` among them.

    `staged`: the policy in force needs the programs' stages. Raises VgwError.
    """
    shield = loader.instantiate(artefact, (PROGRAM,), reuse=fds)
    try:
        if staged:
            load_stages(artefact, (PROGRAM,), {**fds, **shield.maps}, fds["events"])
    except BaseException:
        shield.close()
        raise
    return shield


@dataclass(frozen=True, slots=True)
class _Raised:
    """A shield on an interface; `link` is the descriptor that keeps it there.

    `vm_dir` is where the endpoints of its VM are pinned; interfaces may get other names.
    """

    vm: str
    vm_dir: pathlib.Path
    shield: Instance
    link: int


class Shields:
    """The shields that are up on this host; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held until a shield is up, or off its interface
        self._raised: dict[int, _Raised] = {}
        self._up: frozenset[int] = frozenset()

    def raise_for(self, tools: Tools, endpoint: OpenEndpoint, ifindex: int) -> None:
        """Put a shield in front of an endpoint's program at tc.

        To be called under the writer lock; an endpoint that has one keeps it. Raises VgwError when
        it cannot have one: its programs are of another build, XDP is taken or refused.
        """
        identity = endpoint.maps.config().endpoint
        with self._lock, contextlib.ExitStack() as undo:
            if identity in self._raised:
                return
            artefact = tools.artefact(with_stages((PROGRAM,)))
            # The sources may be newer than this process, and the shield is made of them.
            if build_of(endpoint.directory) != packet_build():
                raise VgwError("its programs are of another build")
            fds = {**endpoint.fds, "events": tools.events_fd()}
            shield = load_shield(artefact, fds, staged=has_stages(endpoint.fds))
            undo.callback(shield.close)
            pin = shield_pin(endpoint.directory)
            files.unlink(pin)  # of a controller that was killed; its link went with it
            libbpf.pin(shield.programs[PROGRAM], pin)
            undo.callback(files.unlink, pin)
            link = libbpf.link_create(
                shield.programs[PROGRAM], ifindex, AttachType.XDP, libbpf.XDP_NATIVE
            )
            self._raised[identity] = _Raised(endpoint.vm, endpoint.directory.parent, shield, link)
            self._up = frozenset(self._raised)
            undo.pop_all()

    def lower(self, identity: int) -> None:
        """Take the shield off an endpoint; one that has none is no error."""
        with self._lock:
            raised = self._raised.pop(identity, None)
            self._up = frozenset(self._raised)
            if raised is not None:
                _take_off(raised)

    def lower_all_of(self, vm: str) -> None:
        """Take the shields off a VM, before something changes that they stand on."""
        with self._lock:
            identities = [each for each, raised in self._raised.items() if raised.vm == vm]
        for identity in identities:
            self.lower(identity)

    def close(self) -> None:
        """Take all shields off."""
        with self._lock:
            identities = list(self._raised)
        for identity in identities:
            self.lower(identity)

    def up(self) -> frozenset[int]:
        """Return the identities of the endpoints that have one, at once."""
        return self._up


def _take_off(raised: _Raised) -> None:
    with contextlib.suppress(KernelError):  # of an interface that is gone
        libbpf.link_detach(raised.link)
    os.close(raised.link)
    program = libbpf.prog_info(raised.shield.programs[PROGRAM]).id
    raised.shield.close()
    for directory in endpoint_dirs(raised.vm_dir):
        pinned = pinned_program(shield_pin(directory))
        if pinned is not None and pinned.id == program:
            quietly(files.unlink, shield_pin(directory))
