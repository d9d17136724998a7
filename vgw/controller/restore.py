# SPDX-License-Identifier: Apache-2.0
"""An endpoint that somebody took apart is put together again, with its maps, flows and counters.

Programs that were detached are attached again, pins that were removed are made again from what the
kernel still runs. What cannot be done so, because nothing of the endpoint is left or because the
interface is another one now, has to be made anew.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vgw import abi, files, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller import links, pinned
from vgw.controller.endpoint import PINNED_MAPS, BrokenEndpointError, OpenEndpoint
from vgw.controller.hook_move import move_hook
from vgw.controller.links import opened
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import EVENTS_PIN, Paths
from vgw.controller.tools import Tools
from vgw.errors import ForeignProgramError, KernelError
from vgw.libbpf import ProgType
from vgw.maps_counters import counters_pin
from vgw.maps_images import read_chunks
from vgw.policy.model import Hook


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """An endpoint with which something may be wrong.

    `links` are descriptors of its links, held since it was whole, so that they and what they run
    outlive their pins. `same` tells whether the interface of an index is surely the one that the
    endpoint was on then.
    """

    vm: str
    interface: str
    links: Mapping[abi.Path, int]
    same: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back, in words; `moved` is the identity of an endpoint that is at tc now."""

    done: tuple[str, ...]
    moved: int | None = None


def restore(tools: Tools, suspect: Suspect) -> Restored | None:
    """Put back what is missing of an endpoint; None when it has to be made anew.

    To be called under the writer lock. Where the place of an XDP program has been taken by somebody
    else's, which is never removed, the packets from the VM are judged at tc. Raises VgwError when
    the kernel refuses.
    """
    directory = tools.paths.endpoint_dir(suspect.vm, suspect.interface)
    pins = tuple(f"pin {name}" for name in _repin(tools.paths, directory, suspect.links))
    try:
        endpoint = endpoints.open_endpoint(suspect.vm, suspect.interface, directory)
    except BrokenEndpointError:
        return None
    with endpoint:
        ifindex = pinned.present_ifindex(suspect.interface)
        if ifindex is None:
            return Restored(pins)
        missing = [path for path in abi.Path if endpoint.attachment(ifindex, path) is None]
        # What is still attached shows that the interface is the same; it would have gone with it.
        sure = len(missing) < len(abi.Path)
        if not sure and not suspect.same(ifindex):
            return None
        at_tc = [_put_back(tools, endpoint, ifindex, path) for path in missing]
        if not sure and not suspect.same(ifindex):
            # It was replaced at this moment, and must not have what belongs to another.
            for path in missing:
                links.detach(ifindex, path, links.link_pin(directory, path))
            return None
        programs = tuple(f"{path.name.lower()} program" for path in missing)
        return Restored(pins + programs, endpoint.maps.config().endpoint if any(at_tc) else None)


def alive(held: Mapping[abi.Path, int]) -> bool:
    """Tell whether one of the links still has its program on an interface."""
    return any(libbpf.link_info(fd).ifindex for fd in held.values())


def is_filed(paths: Paths, held: Mapping[abi.Path, int]) -> bool:
    """Tell whether any endpoint has one of the links pinned: after a rename another has."""
    ids = {libbpf.link_info(fd).id for fd in held.values()}
    for interface, vms in pinned.owners(paths).items():
        for vm in vms:
            for path in abi.Path:
                pin = links.link_pin(paths.endpoint_dir(vm, interface), path)
                with contextlib.suppress(KernelError), opened(pin) as fd:
                    if libbpf.link_info(fd).id in ids:
                        return True
    return False


def put_back(
    endpoint: OpenEndpoint,
    ifindex: int,
    path: abi.Path,
    *,
    prefer_link: bool = True,
    force: bool = False,
) -> None:
    """Attach the program of a path again, as it is pinned; errors are those of links.attach().

    To be called only where the interface is surely the one that the endpoint was on.
    """
    pin = links.link_pin(endpoint.directory, path)
    with opened(links.program_pin(endpoint.directory, path)) as program:
        files.unlink(pin)  # of a link that is detached, which for good
        links.attach(
            program, ifindex, path, _hook_of(program), pin, force=force, prefer_link=prefer_link
        )


def pinned_hook(endpoint: OpenEndpoint, path: abi.Path) -> Hook:
    """Return the hook that the program of a path is made for. Raises KernelError."""
    with opened(links.program_pin(endpoint.directory, path)) as program:
        return _hook_of(program)


def _hook_of(program: int) -> Hook:
    return Hook.XDP if libbpf.prog_info(program).prog_type == ProgType.XDP else Hook.TC


def _put_back(tools: Tools, endpoint: OpenEndpoint, ifindex: int, path: abi.Path) -> bool:
    """Attach the program of a path again; return whether at tc because XDP is taken."""
    try:
        put_back(endpoint, ifindex, path, prefer_link=tools.prefer_link)
    except ForeignProgramError:
        if pinned_hook(endpoint, path) is not Hook.XDP:
            raise
        manifest = load_manifest(tools.paths.manifest(endpoint.vm))
        staged = manifest is None or manifest.is_staged
        move_hook(tools, endpoint, ifindex, Hook.TC, staged=staged).finish()
        return True
    return False


def _repin(paths: Paths, directory: pathlib.Path, held: Mapping[abi.Path, int]) -> list[str]:
    """Pin again what links that are in force use and what is not pinned; return names of it."""
    made: list[str] = []
    for path, link in held.items():
        info = libbpf.link_info(link)
        if not info.ifindex:
            continue
        files.mkdir(directory, 0o700, exist_ok=True)
        with contextlib.ExitStack() as stack:
            wanted = {links.link_pin(directory, path): link}
            # Without CAP_SYS_ADMIN only the link can be had, and the rest is made anew.
            with contextlib.suppress(KernelError):
                program = libbpf.prog_fd_by_id(info.prog_id)
                stack.callback(os.close, program)
                wanted[links.program_pin(directory, path)] = program
                wanted |= _maps(paths, directory, program, stack)
            for pin, fd in wanted.items():
                if not pin.exists():
                    libbpf.pin(fd, pin)
                    made.append(pin.name)
    return made


def _maps(
    paths: Paths, directory: pathlib.Path, program: int, stack: contextlib.ExitStack
) -> dict[pathlib.Path, int]:
    """Return the maps that a program uses by where they are pinned; closed with `stack`."""
    found: dict[pathlib.Path, int] = {}
    for map_id in libbpf.prog_info(program).map_ids:
        fd = _open(map_id, stack)
        name = libbpf.map_info(fd).name
        if name in PINNED_MAPS:
            found[directory / name] = fd
            if name == "rule_counters":
                found |= {
                    counters_pin(directory, slot): _open(counters, stack)
                    for slot, counters in read_chunks(fd).items()
                }
        elif name == EVENTS_PIN:
            found[paths.events] = fd
    return found


def _open(map_id: int, stack: contextlib.ExitStack) -> int:
    fd = libbpf.map_fd_by_id(map_id)
    stack.callback(os.close, fd)
    return fd
