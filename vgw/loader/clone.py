# SPDX-License-Identifier: Apache-2.0
"""Giving each endpoint its own programs and maps: clones of the compiled ones, without LLVM."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Final

from vgw.errors import VgwError
from vgw.libbpf import MapType, map_create, outcomes, possible_cpus, prog_load
from vgw.loader.artefact import Artefact, MapSpec, ProgramSpec

_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})
_INSN_BYTES: Final = 8
_IMMEDIATE: Final = struct.Struct("=i")
_IMMEDIATE_OFFSET: Final = 4
#: The verifier keeps a CPU busy; more programs at a time than CPUs would only delay the threads
#: that wait for something else of the kernel.
_VERIFYING: Final = threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass(slots=True)
class Instance:
    """File descriptors of the maps and programs that instantiate() made, by name.

    Reused maps are not in it. close() closes all; take what shall live longer out of the dicts.
    """

    maps: dict[str, int] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        """Close every fd that is still in `maps` and `programs`."""
        for fds in (self.maps, self.programs):
            while fds:
                os.close(fds.popitem()[1])

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def instantiate(
    artefact: Artefact,
    programs: Sequence[str],
    *,
    max_entries: Mapping[str, int] = _NOTHING,
    reuse: Mapping[str, int] = _NOTHING,
) -> Instance:
    """Create the maps that `programs` refer to and load the programs with them.

    `max_entries` replaces the compiled sizes by map name; `reuse` gives fds of maps to use
    instead of new ones, which stay the caller's. Maps of maps are left empty. On failure all
    that was made is closed. Raises KernelError, VerifierError, and VgwError for an unknown
    program. May be called from several threads at once.
    """
    unknown = [name for name in programs if name not in artefact.programs]
    if unknown:
        raise VgwError(f"there is no program {unknown[0]} among {', '.join(artefact.programs)}")
    chosen = [artefact.programs[name] for name in programs]
    instance = Instance()
    try:
        for map_name in {name: None for program in chosen for _, name in program.relocations}:
            if map_name not in reuse:
                instance.maps[map_name] = _create(artefact, map_name, max_entries)
        _load(chosen, {**instance.maps, **reuse}, instance.programs)
    except BaseException:
        instance.close()
        raise
    return instance


def _load(programs: Sequence[ProgramSpec], fds: Mapping[str, int], loaded: dict[str, int]) -> None:
    """Load programs side by side, for the verifier takes its time; fill in the fds by name."""

    def load(program: ProgramSpec) -> None:
        code = _patch(program, fds)
        with _VERIFYING:
            loaded[program.name] = prog_load(program.prog_type, program.name, code)

    for future in outcomes([partial(load, program) for program in programs], len(programs)):
        future.result()


def new_inner(artefact: Artefact, outer_name: str, max_entries: int) -> int:
    """Create a map of `max_entries` to be put into the map of maps `outer_name`; return its fd.

    Raises KernelError.
    """
    template = artefact.maps[outer_name].inner
    if template is None:
        raise VgwError(f"{outer_name} is not a map of maps")
    return _create_plain(artefact.maps[template], max_entries)


def _create(artefact: Artefact, name: str, max_entries: Mapping[str, int]) -> int:
    """Create a map of an endpoint and return its fd."""
    spec = artefact.maps[name]
    entries = max_entries.get(name, spec.max_entries)
    if spec.map_type == MapType.PERF_EVENT_ARRAY:
        entries = possible_cpus()
    if spec.inner is None:
        return _create_plain(spec, entries)
    template = artefact.maps[spec.inner]
    inner = _create_plain(template, max_entries.get(spec.inner, template.max_entries))
    try:
        return _create_plain(spec, entries, inner)
    finally:
        os.close(inner)


def _create_plain(spec: MapSpec, entries: int, inner: int | None = None) -> int:
    return map_create(
        spec.map_type, spec.name, spec.key_size, spec.value_size, entries, spec.flags, inner
    )


def _patch(program: ProgramSpec, fds: Mapping[str, int]) -> bytes:
    """Return the program's bytecode with the maps' fds in it."""
    code = bytearray(program.insns)
    for index, name in program.relocations:
        _IMMEDIATE.pack_into(code, index * _INSN_BYTES + _IMMEDIATE_OFFSET, fds[name])
    return bytes(code)
