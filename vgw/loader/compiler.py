# SPDX-License-Identifier: Apache-2.0
"""BCC at work, in a process of its own: `python -m vgw.loader DIRECTORY NAME TYPE`.

Reads DIRECTORY/NAME.c and DIRECTORY/options, writes DIRECTORY/NAME.vgw. LLVM takes about 120 MB
that are never given back, so no other process of vgw imports bcc. Diagnostics go to stderr.
"""

from __future__ import annotations

import struct
import sys
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any, Final

from vgw.libbpf import MAPS_OF_MAPS, map_info
from vgw.loader.artefact import Artefact, MapSpec, ProgramSpec

#: Exit codes: the programs are wrong, or BCC is.
EXIT_REJECTED: Final = 1
EXIT_NO_BCC: Final = 3

#: Sources call a function of the kernel as a helper whose number is this and the function's: BCC
#: cannot compile such calls, and no kernel has so many helpers.
KERNEL_FUNCTION: Final = 1 << 30

_INSN: Final = struct.Struct("=BBhi")
_LOAD_IMMEDIATE: Final = 0x18
_CALL: Final = 0x85
_CALL_HELPER: Final = 0
_CALL_KERNEL: Final = 2
_SOURCE_NUMBER: Final = 0
_SOURCE_MAP_FD: Final = 1


class RejectedError(Exception):
    """The program cannot be cloned for each endpoint."""


def import_bcc() -> Any:
    """Return the bcc module; exits with EXIT_NO_BCC when it is missing or another package."""
    try:
        import bcc  # noqa: PLC0415 (only here, and only in this process)
    except Exception as error:  # a module of that name that is not BCC may raise anything
        print(f"Python's bcc module cannot be imported ({_one_line(error)})", file=sys.stderr)
        sys.exit(EXIT_NO_BCC)
    if not hasattr(bcc, "BPF"):
        print(f"the bcc module in {bcc.__file__} is not BCC (PyPI's is not)", file=sys.stderr)
        sys.exit(EXIT_NO_BCC)
    return bcc


def compile_program(
    bcc: Any, name: str, prog_type: int, source: bytes, options: list[str]
) -> Artefact:
    """Compile the function `name` of a flattened source and return it with its maps.

    BCC creates the maps to do so; their sizes are read back from the kernel. Raises
    RejectedError, or what BCC raises once clang has printed its diagnostics.
    """
    module = bcc.BPF(text=source, cflags=options)
    if not bcc.lib.bpf_function_start(module.module, name.encode()):
        raise RejectedError(f"bpf/{name}.c: defines no function {name}")
    tables = table_names(bcc.lib, module.module)
    insns = link_kernel_functions(module.dump_func(name.encode()))
    relocations = find_relocations(name, insns, tables)
    fds = {table: fd for fd, table in tables.items()}
    maps: dict[str, MapSpec] = {}
    for table in sorted({map_name for _, map_name in relocations}):
        spec = maps[table] = describe_map(table, fds)
        if spec.inner is not None:
            maps[spec.inner] = describe_map(spec.inner, fds)
    program = ProgramSpec(name, prog_type, insns, relocations)
    return Artefact("", maps, {name: program})


def table_names(library: Any, module: int) -> dict[int, str]:
    """Return fd -> name of the maps that BCC created for a module."""
    library.bpf_num_tables.restype = c_size_t
    library.bpf_num_tables.argtypes = (c_void_p,)
    library.bpf_table_fd_id.restype = c_int
    library.bpf_table_fd_id.argtypes = (c_void_p, c_size_t)
    library.bpf_table_name.restype = c_char_p
    library.bpf_table_name.argtypes = (c_void_p, c_size_t)
    return {
        library.bpf_table_fd_id(module, index): library.bpf_table_name(module, index).decode()
        for index in range(library.bpf_num_tables(module))
    }


def link_kernel_functions(insns: bytes) -> bytes:
    """Return the program with the calls of helpers from KERNEL_FUNCTION on made what they mean."""
    linked = bytearray()
    for code, registers, offset, immediate in _INSN.iter_unpack(insns):
        kind, number = registers, immediate
        if code == _CALL and _source(registers) == _CALL_HELPER and immediate >= KERNEL_FUNCTION:
            kind = _CALL_KERNEL << 4 if sys.byteorder == "little" else _CALL_KERNEL
            number = immediate - KERNEL_FUNCTION
        linked += _INSN.pack(code, kind, offset, number)
    return bytes(linked)


def _source(registers: int) -> int:
    """Return the source register of an instruction."""
    return registers >> 4 if sys.byteorder == "little" else registers & 0xF


def find_relocations(
    name: str, insns: bytes, tables: dict[int, str]
) -> tuple[tuple[int, str], ...]:
    """Return (instruction index, map name) of each reference to a map; raises RejectedError."""
    found: list[tuple[int, str]] = []
    for index, (code, registers, _offset, immediate) in enumerate(_INSN.iter_unpack(insns)):
        source = _source(registers)
        if code == _CALL and source not in (_CALL_HELPER, _CALL_KERNEL):
            raise RejectedError(f"bpf/{name}.c: calls a function that is not inlined")
        if code != _LOAD_IMMEDIATE or source == _SOURCE_NUMBER:
            continue
        if source != _SOURCE_MAP_FD or immediate not in tables:
            raise RejectedError(f"bpf/{name}.c: uses global data or an unknown map")
        found.append((index, tables[immediate]))
    return tuple(found)


def describe_map(name: str, fds: dict[str, int]) -> MapSpec:
    """Return how BCC created a map; a map of maps X has its template in X_inner."""
    info = map_info(fds[name])
    inner = f"{name}_inner" if info.map_type in MAPS_OF_MAPS else None
    if inner is not None and inner not in fds:
        raise RejectedError(f"the map of maps {name} needs a template named {inner}")
    return MapSpec(
        name,
        info.map_type,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.flags,
        inner,
    )


def _one_line(error: Exception) -> str:
    """Return the first line of an exception that says something, or else its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def main(arguments: list[str]) -> int:
    """Compile one program, `arguments` being directory, name and type; return the exit code."""
    directory, name, prog_type = Path(arguments[0]), arguments[1], int(arguments[2])
    options = (directory / "options").read_text().splitlines()
    source = (directory / f"{name}.c").read_bytes()
    bcc = import_bcc()
    try:
        artefact = compile_program(bcc, name, prog_type, source, options)
    except RejectedError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REJECTED
    except Exception as error:  # BCC raises nothing more special
        print(_one_line(error), file=sys.stderr)
        return EXIT_REJECTED
    (directory / f"{name}.vgw").write_bytes(artefact.encode())
    return 0
