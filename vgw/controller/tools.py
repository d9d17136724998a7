# SPDX-License-Identifier: Apache-2.0
"""What changes are made with: the host's places, its shared maps, and what is made only once."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from vgw import abi, files, libbpf
from vgw.controller.images import Images
from vgw.controller.last_flows import LastFlows
from vgw.controller.links import opened, program_pin
from vgw.controller.paths import Paths
from vgw.controller.pins import all_endpoint_dirs
from vgw.controller.policy_store import PolicyStore, RuleNames
from vgw.errors import KernelError
from vgw.loader import Artefact

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Tools:
    """What changes are made with.

    `artefact` gives packet programs by name, `events_fd` the host's perf buffer; both are asked
    for only when needed. `images` are the maps of policies, `store` what their rules are, `names`
    what their rules are called. `build` says of which build the packet programs are. `progress` is
    told what takes long, `last_flows` logs the flows of endpoints that go. `lower_shields` takes
    the shields off a VM of which programs or policy change.
    """

    paths: Paths
    images: Images
    store: PolicyStore
    names: RuleNames
    artefact: Callable[[Collection[str]], Artefact]
    events_fd: Callable[[], int]
    build: Callable[[], str]
    prefer_link: bool = True
    progress: Callable[[str], None] | None = None
    last_flows: LastFlows | None = None
    alive: Callable[[], None] = lambda: None
    lower_shields: Callable[[str], None] = lambda _: None


class Once(Generic[_Value]):
    """A value that is made when it is first asked for, once, whichever thread asks."""

    def __init__(self, make: Callable[[], _Value]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[_Value] = []

    def __call__(self) -> _Value:
        """Return the value."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def open_events(paths: Paths, stack: contextlib.ExitStack) -> int:
    """Return the perf buffer's map that all endpoints share; it is made if there is none.

    The one that programs use is pinned again if another one, or none, is in its place. It is
    closed with `stack`. Raises KernelError and OSError.
    """
    fd = _pinned_events(paths)
    used = _used_events(paths)
    if used is not None and (fd is None or libbpf.map_info(fd).id != used):
        if fd is not None:
            os.close(fd)
        fd = libbpf.map_fd_by_id(used)
        files.unlink(paths.events)
        libbpf.pin(fd, paths.events)
    if fd is None:
        fd = _make_events(paths)
    stack.callback(os.close, fd)
    return fd


def _pinned_events(paths: Paths) -> int | None:
    try:
        return libbpf.get_pinned(paths.events)
    except KernelError:
        return None


def _used_events(paths: Paths) -> int | None:
    """Return the id of the perf buffer's map that a program of an endpoint uses, if there is one.

    Any program will do, for all are given the same.
    """
    directories = all_endpoint_dirs(paths.pins)
    for pin in (program_pin(each, path) for each in directories for path in abi.Path):
        with contextlib.suppress(KernelError):
            for number in _maps_of(pin):
                fd = libbpf.map_fd_by_id(number)
                try:
                    if libbpf.map_info(fd).map_type == libbpf.MapType.PERF_EVENT_ARRAY:
                        return number
                finally:
                    os.close(fd)
    return None


def _maps_of(pin: pathlib.Path) -> tuple[int, ...]:
    """Return the ids of the maps that a pinned program uses."""
    with opened(pin) as fd:
        return libbpf.prog_info(fd).map_ids


def _make_events(paths: Paths) -> int:
    fd = libbpf.map_create(libbpf.MapType.PERF_EVENT_ARRAY, "events", 4, 4, libbpf.possible_cpus())
    try:
        files.mkdir(paths.pins, 0o700, exist_ok=True)
        libbpf.pin(fd, paths.events)
    except BaseException:
        os.close(fd)
        raise
    return fd
