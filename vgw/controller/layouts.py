# SPDX-License-Identifier: Apache-2.0
"""Where the fields of the tables' structures are, kept for versions with another ABI.

Each version writes its own layout beside its state, so that any other one, older or newer, can read
its tables field by field, by name. A field that only one side has is left out, or zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vgw import abi
from vgw.abi_maps import MAP_SIZES
from vgw.controller.state_file import read_state, write_state
from vgw.errors import VgwError

_SCHEMA: Final = "vgw/layout/v1"
_DAMAGED: Final = (KeyError, TypeError, ValueError, AttributeError)
#: How pins are named and endpoints are attached; other values are not for this version to touch.
PINS: Final = 1
_WORDS: Final = (1, 2, 4, 8)


class LayoutError(VgwError):
    """Tables of another version that this one cannot read."""


@dataclass(frozen=True, slots=True)
class FieldLayout:
    """A field: `count` elements of `size` bytes from `offset` on.

    Elements are unsigned numbers in the host's byte order, or structures named by `structure`.
    """

    offset: int
    size: int
    count: int = 1
    structure: str | None = None


@dataclass(frozen=True, slots=True)
class StructLayout:
    """A structure: its bytes, and its fields by name."""

    size: int
    fields: Mapping[str, FieldLayout]


@dataclass(frozen=True, slots=True)
class Layout:
    """The structures, enumerations (name -> number) and sizes of the maps of an ABI version."""

    abi: int
    structures: Mapping[str, StructLayout]
    enums: Mapping[str, Mapping[str, int]]
    reason_slots: int
    maps: Mapping[str, tuple[int, int]]
    pins: int = PINS


def own_layout() -> Layout:
    """Return the layout of this version."""
    names = {structure: name for name, structure in abi.STRUCTURES.items()}
    return Layout(
        abi.ABI_VERSION,
        {name: _structure(each, names) for name, each in abi.STRUCTURES.items()},
        {
            name: {member.name: int(member) for member in members}
            for name, (_, members) in abi.ENUMERATIONS.items()
        },
        abi.REASON_SLOTS,
        dict(MAP_SIZES),
    )


def _structure(
    structure: type[ctypes.Structure], names: Mapping[type[ctypes.Structure], str]
) -> StructLayout:
    fields: dict[str, FieldLayout] = {}
    for name, declared, *_ in structure._fields_:
        kind: Any = declared
        is_array = issubclass(kind, ctypes.Array)
        element, count = (kind._type_, kind._length_) if is_array else (kind, 1)
        offset: int = getattr(structure, name).offset
        fields[name] = FieldLayout(offset, ctypes.sizeof(element), count, names.get(element))
    return StructLayout(ctypes.sizeof(structure), fields)


def layout_file(state_dir: Path, version: int) -> Path:
    """Return where the layout of an ABI version is kept."""
    return state_dir / "layouts" / f"v{version}.json"


def keep_layout(state_dir: Path) -> None:
    """Write the layout of this version, unless it is there. Raises VgwError."""
    file, own = layout_file(state_dir, abi.ABI_VERSION), own_layout()
    try:
        if load_layout(state_dir, abi.ABI_VERSION) == own:
            return
    except LayoutError:
        pass
    write_state(file, _SCHEMA, asdict(own))


def load_layout(state_dir: Path, version: int) -> Layout:
    """Return the layout of an ABI version; raises LayoutError when it is unknown or unreadable."""
    body = read_state(layout_file(state_dir, version), _SCHEMA)
    if body is None:
        raise LayoutError(f"nothing tells what the tables of ABI {version} are like")
    try:
        layout = _from_json(body)
    except _DAMAGED as error:
        raise LayoutError(f"what tells of the tables of ABI {version} is damaged") from error
    if (layout.abi, layout.pins) != (version, PINS):
        raise LayoutError(f"ABI {version} keeps its tables in another way than this version")
    return layout


def _from_json(body: Mapping[str, Any]) -> Layout:
    layout = Layout(
        int(body["abi"]),
        {
            str(name): StructLayout(
                int(each["size"]),
                {str(field): FieldLayout(**place) for field, place in each["fields"].items()},
            )
            for name, each in body["structures"].items()
        },
        {
            str(name): {str(member): int(number) for member, number in members.items()}
            for name, members in body["enums"].items()
        },
        int(body["reason_slots"]),
        {str(name): (int(key), int(value)) for name, (key, value) in body["maps"].items()},
        int(body["pins"]),
    )
    for structure in layout.structures.values():
        _check(layout, structure)
    return layout


def _check(layout: Layout, structure: StructLayout) -> None:
    """Raise ValueError for fields that are not within their structure, or of an unknown kind."""
    for field in structure.fields.values():
        whole = field.offset + field.size * field.count <= structure.size
        if field.structure is None:
            known = field.size in _WORDS
        else:
            known = layout.structures[field.structure].size == field.size
        if not whole or not known or min(field.offset, field.size - 1, field.count - 1) < 0:
            raise ValueError("a field that is not in its structure")
