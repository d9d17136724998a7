# SPDX-License-Identifier: Apache-2.0
"""The compiled programs: bytecode, the maps it refers to, and their form in a file."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from vgw.abi import ABI_VERSION
from vgw.errors import CompileError

_MAGIC: Final = b"vgwprog1"
_HEADER: Final = struct.Struct("=8sI32sI")


@dataclass(frozen=True, slots=True)
class MapSpec:
    """How to create a map; sizes in bytes, `inner` names the template of a map of maps."""

    name: str
    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    inner: str | None = None


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """Bytecode of a program and the instructions (by index) that need a map's fd."""

    name: str
    prog_type: int
    insns: bytes
    relocations: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Artefact:
    """Compiled programs and their maps; `digest` names what they were compiled from."""

    digest: str
    maps: Mapping[str, MapSpec]
    programs: Mapping[str, ProgramSpec]

    def encode(self) -> bytes:
        """Return the artefact as the bytes of a file, in the host's byte order."""
        table = {
            "digest": self.digest,
            "maps": [asdict(spec) for spec in self.maps.values()],
            "programs": [
                [program.name, program.prog_type, len(program.insns), program.relocations]
                for program in self.programs.values()
            ],
        }
        text = json.dumps(table).encode()
        body = text + b"".join(program.insns for program in self.programs.values())
        header = _HEADER.pack(_MAGIC, ABI_VERSION, hashlib.sha256(body).digest(), len(text))
        return header + body

    @classmethod
    def decode(cls, data: bytes) -> Artefact:
        """Return the artefact in `data`; raises ValueError when it is damaged or of another ABI."""
        if len(data) < _HEADER.size:
            raise ValueError("too short")
        magic, version, checksum, length = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if (magic, version) != (_MAGIC, ABI_VERSION) or hashlib.sha256(body).digest() != checksum:
            raise ValueError("damaged or of another version")
        table = json.loads(body[:length])
        programs: dict[str, ProgramSpec] = {}
        start = length
        for name, prog_type, size, relocations in table["programs"]:
            programs[name] = ProgramSpec(
                name,
                prog_type,
                body[start : start + size],
                tuple((index, map_name) for index, map_name in relocations),
            )
            start += size
        maps = {spec["name"]: MapSpec(**spec) for spec in table["maps"]}
        return cls(table["digest"], maps, programs)


def merge(parts: Sequence[Artefact]) -> Artefact:
    """Return one artefact of programs that were compiled apart.

    Raises CompileError when two of them define a map differently.
    """
    maps: dict[str, MapSpec] = {}
    programs: dict[str, ProgramSpec] = {}
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.digest.encode())
        programs.update(part.programs)
        for name, spec in part.maps.items():
            if maps.setdefault(name, spec) != spec:
                raise CompileError(
                    f"the map {name} is defined differently in {', '.join(part.programs)} "
                    "and another program: define it once, in a header"
                )
    return Artefact(digest.hexdigest(), maps, programs)
