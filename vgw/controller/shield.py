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
from collections.abc import Mapping, Sequence
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


class _Raised:
    """A shield of a VM that is up, or on its way there or off."""

    def __init__(self, vm: str) -> None:
        self.vm = vm
        #: What takes it off, from its link to its maps.
        self.undo = contextlib.ExitStack()
        self._link = -1

    def put_up(self, shield: Instance, directory: pathlib.Path, ifindex: int) -> None:
        """Pin and attach a shield that was loaded, in front of the endpoint in a directory.

        Whatever fails, `undo` has what was done. Raises KernelError.
        """
        program = shield.programs[PROGRAM]
        number = libbpf.prog_info(program).id
        files.unlink(shield_pin(directory))  # of a killed controller; its link went with it
        self.undo.callback(_unpin, directory.parent, number)
        libbpf.pin(program, shield_pin(directory))
        self.undo.callback(self._let_go)
        self._link = libbpf.link_create(program, ifindex, AttachType.XDP, libbpf.XDP_NATIVE)

    def _let_go(self) -> None:
        """Take it off its interface, which ends with the descriptor of its link."""
        if self._link >= 0:
            with contextlib.suppress(KernelError):  # of an interface that is gone
                libbpf.link_detach(self._link)
            os.close(self._link)


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
        with self._lock:
            if identity in self._raised:
                return
            raised = self._raised[identity] = _Raised(endpoint.vm)
            try:
                shield = _loaded(tools, endpoint)
                raised.undo.callback(shield.close)
                raised.put_up(shield, endpoint.directory, ifindex)
                self._up |= {identity}
            except BaseException:
                self._take_off(identity)
                raise

    def lower(self, identity: int) -> None:
        """Take the shield off an endpoint; one that has none is no error."""
        with self._lock:
            self._take_off(identity)

    def lower_all_of(self, vm: str) -> None:
        """Take the shields off a VM, before something changes that they stand on."""
        with self._lock:
            self._take_off_all([each for each, raised in self._raised.items() if raised.vm == vm])

    def close(self) -> None:
        """Take all shields off."""
        with self._lock:
            self._take_off_all(list(self._raised))

    def up(self) -> frozenset[int]:
        """Return the identities of the endpoints that have one, at once."""
        return self._up

    def _take_off_all(self, identities: Sequence[int]) -> None:
        with contextlib.ExitStack() as stack:  # what fails for one must not leave the others
            for identity in identities:
                stack.callback(self._take_off, identity)

    def _take_off(self, identity: int) -> None:
        raised = self._raised.pop(identity, None)
        if raised is not None:
            try:
                raised.undo.close()
            finally:
                self._up = frozenset(self._raised)


def _loaded(tools: Tools, endpoint: OpenEndpoint) -> Instance:
    """Load a shield for an endpoint. Raises VgwError, also where it would be of another build."""
    artefact = tools.artefact(with_stages((PROGRAM,)))
    # The sources may be newer than this process, and the shield is made of them.
    if build_of(endpoint.directory) != packet_build():
        raise VgwError("its programs are of another build")
    fds = {**endpoint.fds, "events": tools.events_fd()}
    return load_shield(artefact, fds, staged=has_stages(endpoint.fds))


def _unpin(vm_dir: pathlib.Path, program: int) -> None:
    """Remove the pin of a shield; its interface may have got another name meanwhile."""
    for directory in endpoint_dirs(vm_dir):
        pinned = pinned_program(shield_pin(directory))
        if pinned is not None and pinned.id == program:
            quietly(files.unlink, shield_pin(directory))
