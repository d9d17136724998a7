# SPDX-License-Identifier: Apache-2.0
"""Stages of programs: put where the programs look for them, once, on the endpoint's own maps."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from vgw import abi, libbpf, loader
from vgw.controller.stages import STAGES, load_stages, with_stages
from vgw.errors import VgwError
from vgw.libbpf import MapType, ProgType
from vgw.loader.artefact import MapSpec, ProgramSpec

#: r0 = 0; exit, behind the load of a map's address into r1.
_LOAD_MAP = struct.pack("=BBhi", 0x18, 0x11, 0, 0) + bytes(8)
_RETURN = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)


def program(name: str, map_name: str) -> ProgramSpec:
    """Return a program that refers to a map and does nothing."""
    kind = ProgType.XDP if name.startswith("xdp") else ProgType.SCHED_CLS
    return ProgramSpec(name, kind, _LOAD_MAP + _RETURN, ((0, map_name),))


ARTEFACT = loader.Artefact(
    "test",
    {
        "stats": MapSpec("stats", MapType.ARRAY, 4, 8, 1, 0),
        "xdp_stages": MapSpec("xdp_stages", MapType.PROG_ARRAY, 4, 4, 2, 0),
        "tc_stages": MapSpec("tc_stages", MapType.PROG_ARRAY, 4, 4, 2, 0),
    },
    {stage.program: program(stage.program, "stats") for stage in STAGES.values()},
)


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    """The maps of an endpoint, as far as stages matter."""
    made = {
        name: libbpf.map_create(
            spec.map_type, name, spec.key_size, spec.value_size, spec.max_entries
        )
        for name, spec in ARTEFACT.maps.items()
    }
    yield made
    for fd in made.values():
        os.close(fd)


def stage_ids(fds: dict[str, int]) -> dict[str, int | None]:
    """Return the ids of the programs in the places of stages, by program."""
    found: dict[str, int | None] = {}
    for name, stage in STAGES.items():
        value = libbpf.map_lookup(fds[stage.map_name], struct.pack("=I", stage.place), 4)
        found[name] = None if value is None else struct.unpack("=I", value)[0]
    return found


@pytest.mark.bpf
def test_stages_are_loaded_once_and_for_the_programs_in_use(fds: dict[str, int]) -> None:
    load_stages(ARTEFACT, ("tc_to_vm", "xdp_from_vm"), fds, fds["stats"])
    first = stage_ids(fds)
    assert first["tc_from_vm"] is None
    assert first["tc_to_vm"] is not None
    assert first["xdp_from_vm"] is not None

    load_stages(ARTEFACT, ("tc_to_vm", "tc_from_vm"), fds, fds["stats"])

    second = stage_ids(fds)
    assert second["tc_from_vm"] is not None
    assert second | {"tc_from_vm": None} == first
    program_fd = libbpf.prog_fd_by_id(second["tc_to_vm"] or 0)
    used = libbpf.prog_info(program_fd).map_ids
    os.close(program_fd)
    assert used == (libbpf.map_info(fds["stats"]).id,)


@pytest.mark.bpf
def test_without_stage_programs_nothing_is_loaded(fds: dict[str, int]) -> None:
    """Negative control: an artefact of before there were stages."""
    empty = loader.Artefact("test", ARTEFACT.maps, {})
    load_stages(empty, tuple(STAGES), fds, fds["stats"])
    assert set(stage_ids(fds).values()) == {None}


@pytest.mark.bpf
def test_a_stage_never_gets_maps_of_its_own(fds: dict[str, int]) -> None:
    without = {name: fd for name, fd in fds.items() if name != "stats"}
    with pytest.raises(VgwError, match="has no map stats: detach the VM and attach it again"):
        load_stages(ARTEFACT, ("tc_to_vm",), without, fds["stats"])
    assert stage_ids(fds)["tc_to_vm"] is None


def test_every_stage_has_a_place_of_its_own() -> None:
    places = [(stage.map_name, stage.place) for stage in STAGES.values()]
    assert len(set(places)) == len(places)
    assert STAGES["tc_from_vm"].place == abi.Path.FROM_VM
    assert with_stages(["conntrack_reap"]) == ["conntrack_reap"]
