# SPDX-License-Identifier: Apache-2.0
"""Stages of the packet programs: where the lookup in a large policy is done, by a tail call.

A program finds its stage in a map of programs. Stages take as long to load as the programs
themselves, so an endpoint gets them only with the first policy that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from vgw import abi, libbpf, loader
from vgw.errors import VgwError
from vgw.loader import Artefact
from vgw.loader.sources import PROGRAMS


class Stage(NamedTuple):
    """The stage of a program, and where the program looks for it."""

    program: str
    map_name: str
    place: int


#: Program -> its stage.
STAGES: Final = {
    "xdp_from_vm": Stage("xdp_from_vm_stage", "xdp_stages", 0),
    "xdp_shield": Stage("xdp_shield_stage", "xdp_stages", 1),
    "tc_from_vm": Stage("tc_from_vm_stage", "tc_stages", abi.Path.FROM_VM),
    "tc_to_vm": Stage("tc_to_vm_stage", "tc_stages", abi.Path.TO_VM),
}
STAGE_MAPS: Final = tuple({stage.map_name: None for stage in STAGES.values()})
_ID_BYTES: Final = 4


def with_stages(programs: Iterable[str]) -> list[str]:
    """Return programs and their stages, as far as there are such programs."""
    names = list(programs)
    stages = [STAGES[name].program for name in names if name in STAGES]
    return names + [stage for stage in stages if stage in PROGRAMS]


def load_stages(
    artefact: Artefact, programs: Collection[str], fds: Mapping[str, int], events_fd: int
) -> None:
    """Load the stages of an endpoint's programs, and put them where the programs look for them.

    `fds` are all maps of the endpoint. Stages that are there already stay, and of those that
    `artefact` does not have there are none: a lookup that needs one drops the packet. Raises
    VgwError when the endpoint lacks a map.
    """
    missing = missing_stages(artefact, programs, fds)
    if not missing:
        return
    reuse = {**fds, "events": events_fd}
    names = [stage.program for stage in missing]
    with loader.instantiate(artefact, names, reuse=reuse) as instance:
        if instance.maps:
            raise VgwError(
                f"the endpoint has no map {next(iter(instance.maps))}: detach the VM and attach it "
                "again"
            )
        for stage in missing:
            program = instance.programs[stage.program]
            libbpf.map_update(fds[stage.map_name], _u32(stage.place), _u32(program))


def has_stages(fds: Mapping[str, int]) -> bool:
    """Tell whether an endpoint, whose maps these are, has any stage loaded."""
    return any(_is_loaded(fds, stage) for stage in STAGES.values())


def missing_stages(
    artefact: Artefact, programs: Collection[str], fds: Mapping[str, int]
) -> list[Stage]:
    """Return the stages of an endpoint's programs that are not in their places."""
    wanted = [STAGES[name] for name in programs if name in STAGES]
    return [
        stage
        for stage in wanted
        if stage.program in artefact.programs and not _is_loaded(fds, stage)
    ]


def unload_stages(fds: Mapping[str, int], stages: Iterable[Stage]) -> None:
    """Take stages out of their places again; those that are not there are no error."""
    for stage in stages:
        if stage.map_name in fds:
            libbpf.map_delete(fds[stage.map_name], _u32(stage.place))


def _is_loaded(fds: Mapping[str, int], stage: Stage) -> bool:
    """Tell whether a stage is in its place; one without a place is not."""
    fd = fds.get(stage.map_name)
    return fd is not None and libbpf.map_lookup(fd, _u32(stage.place), _ID_BYTES) is not None


def _u32(value: int) -> bytes:
    """Return a u32 as the kernel reads it."""
    return value.to_bytes(4, sys.byteorder)
