# SPDX-License-Identifier: Apache-2.0
"""Upgrade within an ABI: the programs of a running endpoint replaced by those of this build.

The tables stay, so flows and counters go on. Work memory and stages are not part of the ABI: the
new programs get theirs. All is loaded, verified and pinned aside before the first program is
replaced; from then on the upgrade is only ever carried on, by whoever finds it unfinished.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from vgw import abi, libbpf, loader
from vgw.controller import endpoint as endpoints
from vgw.controller import links
from vgw.controller.builds import build_of, mark_build
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.links import opened
from vgw.controller.pins import ASIDE, entries, quietly, remove_tree
from vgw.controller.stages import STAGE_MAPS, has_stages, load_stages, with_stages
from vgw.controller.tools import Tools
from vgw.errors import VgwError
from vgw.policy.model import Hook

#: Maps that belong to a build: not for other programs, even of the same ABI.
_OF_BUILD = ("scratch", *STAGE_MAPS)


def is_outdated(directory: Path, build: str) -> bool:
    """Tell whether an endpoint runs programs of another build, or an upgrade is unfinished."""
    return build_of(directory) != build or _fresh_of(directory).exists()


def upgrade_programs(tools: Tools, vm: str, interface: str, ifindex: int) -> bool:
    """Bring an endpoint's programs to this build; return whether they were replaced.

    An endpoint that is not whole and attached is left as it is: an attach makes it anew. Raises
    VgwError, and the programs that ran go on then.
    """
    directory = tools.paths.endpoint_dir(vm, interface)
    carry_on(directory, ifindex)
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
            _prepare(tools, endpoint, endpoints.programs_of(Hook(from_vm.hook)))
        except (VgwError, OSError):
            quietly(remove_tree, _fresh_of(directory))
            raise
    try:
        _replace(directory, ifindex)
    except VgwError:
        quietly(remove_tree, _fresh_of(directory))
        raise
    _finish(directory)
    return True


def carry_on(directory: Path, ifindex: int) -> None:
    """Finish the upgrade of a process that died in it, or remove what came to nothing."""
    fresh = _fresh_of(directory)
    if not fresh.exists():
        return
    if build_of(fresh) is None:
        remove_tree(fresh)
        return
    _replace(directory, ifindex)
    _finish(directory)


def _fresh_of(directory: Path) -> Path:
    return directory / f"{ASIDE}build"


def _prepare(tools: Tools, endpoint: OpenEndpoint, names: Mapping[abi.Path, str]) -> None:
    """Load the new programs with the endpoint's tables and pin them aside; the mark comes last."""
    fresh = _fresh_of(endpoint.directory)
    programs = tuple(names.values())
    staged = has_stages(endpoint.fds)
    artefact = tools.artefact(with_stages(programs) if staged else programs)
    events_fd = tools.events_fd()
    shared = {name: fd for name, fd in endpoint.fds.items() if name not in _OF_BUILD}
    reuse = {**shared, "events": events_fd}
    with loader.instantiate(artefact, programs, reuse=reuse) as instance:
        added = [name for name in instance.maps if name not in _OF_BUILD]
        if added:
            raise VgwError(f"this version needs a map {added[0]} that the endpoint does not have")
        if staged:
            load_stages(artefact, programs, {**shared, **instance.maps}, events_fd)
        fresh.mkdir(mode=0o700)
        for name, fd in instance.maps.items():
            libbpf.pin(fd, fresh / name)
        for path, name in names.items():
            libbpf.pin(instance.programs[name], links.program_pin(fresh, path))
    mark_build(fresh, tools.build())


def _replace(directory: Path, ifindex: int) -> None:
    """Have the hooks run the programs that are pinned aside; all of them or, on failure, none."""
    fresh = _fresh_of(directory)
    with contextlib.ExitStack() as undo:
        for path in abi.Path:
            if not links.program_pin(fresh, path).exists():
                continue  # it has taken its place already
            if links.read_attachment(ifindex, path, fresh) is None:
                _exchange(fresh, directory, ifindex, path)
            undo.callback(quietly, _exchange_back, directory, fresh, ifindex, path)
        undo.pop_all()


def _exchange(fresh: Path, directory: Path, ifindex: int, path: abi.Path) -> None:
    with opened(links.program_pin(fresh, path)) as program:
        links.replace(program, ifindex, path, links.link_pin(directory, path))


def _exchange_back(directory: Path, fresh: Path, ifindex: int, path: abi.Path) -> None:
    with opened(links.program_pin(directory, path)) as program:
        pin = links.link_pin(directory, path)
        links.replace(program, ifindex, path, pin if pin.exists() else links.link_pin(fresh, path))


def _finish(directory: Path) -> None:
    """Put the pins of the new programs and their maps in the place of the old ones."""
    fresh = _fresh_of(directory)
    build = build_of(fresh)
    for entry in entries(fresh):
        if not entry.is_dir():
            entry.replace(directory / entry.name)
    if build is not None:
        mark_build(directory, build)
    remove_tree(fresh)
