# SPDX-License-Identifier: Apache-2.0
"""Tables of structures as numpy arrays, and from one version's layout to another's, by name.

Kept apart from what every start of the command needs: numpy takes its time to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from vgw import libbpf
from vgw.controller.layouts import Layout, LayoutError

#: An array of structures.
Columns = np.ndarray[Any, np.dtype[Any]]

_PAD: Final = "pad"


def dtype_of(layout: Layout, structure: str) -> np.dtype[Any]:
    """Return a structure as a numpy type. Raises LayoutError when the layout does not have it."""
    found = layout.structures.get(structure)
    if found is None:
        raise LayoutError(f"ABI {layout.abi} has no {structure}")
    names, formats, offsets = [], [], []
    for name, field in found.fields.items():
        element: Any = f"=u{field.size}"
        if field.structure is not None:
            element = dtype_of(layout, field.structure)
        names.append(name)
        formats.append((element, (field.count,)) if field.count > 1 else element)
        offsets.append(field.offset)
    return np.dtype(
        {"names": names, "formats": formats, "offsets": offsets, "itemsize": found.size}
    )


def read_hash(fd: int, key: np.dtype[Any], value: np.dtype[Any]) -> tuple[Columns, Columns]:
    """Return keys and values of a hash map. Raises KernelError.

    The map's own sizes must have been compared with those of the types before.
    """
    entries = list(libbpf.map_entries(fd, key.itemsize, value.itemsize))
    keys = np.frombuffer(b"".join(each for each, _ in entries), key)
    return keys, np.frombuffer(b"".join(each for _, each in entries), value)


def converted(rows: Columns, wanted: np.dtype[Any]) -> Columns:
    """Return rows in another layout: fields of the same name, zero where there was none.

    Numbers that are wider than the field that they get are cut to its greatest.
    """
    made = np.zeros(rows.shape, wanted)
    for name in wanted.names or ():
        if name in (rows.dtype.names or ()) and not name.startswith(_PAD):
            _assign(made, rows, name)
    return made


def _assign(made: Columns, rows: Columns, name: str) -> None:
    source, target = rows[name], made[name]
    if source.dtype.names and target.dtype.names:
        made[name] = converted(source, target.dtype)
    elif not source.dtype.names and not target.dtype.names:
        made[name] = fitting(source, target)


def fitting(source: Columns, target: Columns) -> Columns:
    """Return numbers for a field of the same number of rows: as many of each as it has room for."""
    limit = np.iinfo(target.dtype).max
    if source.dtype.itemsize > target.dtype.itemsize:
        source = np.minimum(source, source.dtype.type(limit))
    if source.shape == target.shape:
        return source
    wide = source.reshape(len(source), -1)
    made = np.zeros((len(source), int(np.prod(target.shape[1:], dtype=int))), target.dtype)
    shared = min(wide.shape[1], made.shape[1])
    made[:, :shared] = wide[:, :shared]
    return made.reshape(target.shape)


def renumbered(
    values: Columns, old: Mapping[str, int], new: Mapping[str, int]
) -> tuple[Columns, Columns]:
    """Return members of an enumeration by their new numbers, and which of them have one."""
    size = 256
    numbers = np.zeros(size, values.dtype)
    known = np.zeros(size, bool)
    for name, number in old.items():
        if name in new and 0 <= number < size:
            numbers[number], known[number] = new[name], True
    return numbers[values], known[values]
