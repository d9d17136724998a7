# SPDX-License-Identifier: Apache-2.0
"""Upgrade within an ABI: the programs of a running endpoint replaced by those of this build.

The tables stay, so flows and counters go on. Work memory and stages are not part of the ABI: the
new programs get theirs. All is loaded, verified and pinned aside before the first program is
replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vgw import abi, files, loader
from vgw.abi_maps import PRIVATE_MAPS
from vgw.controller import endpoint as endpoints
from vgw.controller.builds import build_of, mark_build
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.pins import beside
from vgw.controller.replacement import Placing
from vgw.controller.stages import STAGE_MAPS, has_stages, load_stages, with_stages
from vgw.controller.tools import Tools
from vgw.errors import VgwError
from vgw.policy.model import Hook

#: Maps that belong to a build: not for other programs, even of the same ABI.
_OF_BUILD = (*PRIVATE_MAPS, *STAGE_MAPS)


def is_outdated(directory: Path, build: str) -> bool:
    """Tell whether an endpoint runs programs of another build, or an upgrade is unfinished."""
    return build_of(directory) != build or beside(directory).exists()


def upgrade_programs(tools: Tools, vm: str, interface: str, ifindex: int) -> bool:
    """Bring an endpoint's programs to this build; return whether they were replaced.

    To be called when settle() has ended what others began. An endpoint that is not whole and
    attached is left as it is: an attach makes it anew. Raises VgwError, and the programs that ran
    go on then.
    """
    directory = tools.paths.endpoint_dir(vm, interface)
    if build_of(directory) == tools.build():
        return False
    try:
        endpoint = endpoints.open_endpoint(vm, interface, directory)
    except endpoints.BrokenEndpointError:
        return False
    with endpoint:
        there = {path: endpoint.attachment(ifindex, path) for path in abi.Path}
        from_vm = there[abi.Path.FROM_VM]
        if from_vm is None or there[abi.Path.TO_VM] is None:
            return False
        try:
            placing = Placing(directory, ifindex)
            try:
                _replace(tools, endpoint, Hook(from_vm.hook), placing)
            except BaseException:
                placing.undo()
                raise
            placing.finish()
            mark_build(directory, tools.build())
        except OSError as error:
            raise files.failure(error) from error
    return True


def _replace(tools: Tools, endpoint: OpenEndpoint, hook: Hook, placing: Placing) -> None:
    """Load programs with the endpoint's tables, pin them aside, and have the hooks run them."""
    names: Mapping[abi.Path, str] = endpoints.programs_of(hook)
    programs = tuple(names.values())
    staged = has_stages(endpoint.fds)
    artefact = tools.artefact(with_stages(programs) if staged else programs)
    events_fd = tools.events_fd()
    shared = {name: fd for name, fd in endpoint.fds.items() if name not in _OF_BUILD}
    with loader.instantiate(artefact, programs, reuse={**shared, "events": events_fd}) as instance:
        added = [name for name in instance.maps if name not in _OF_BUILD]
        if added:
            raise VgwError(f"this version needs a map {added[0]} that the endpoint does not have")
        if staged:
            load_stages(artefact, programs, {**shared, **instance.maps}, events_fd)
        placing.make_room()
        endpoints.pin_parts(placing.place, instance.maps, instance.programs, names)
        for path, name in names.items():
            at = hook if path is abi.Path.FROM_VM else Hook.TC
            placing.attach(instance.programs[name], path, at, force=False)
