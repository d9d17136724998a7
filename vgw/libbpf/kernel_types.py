# SPDX-License-Identifier: Apache-2.0
"""The running kernel's own description (BTF) of its types: their numbers, where members are."""

from __future__ import annotations

import contextlib
import ctypes
import enum
from collections.abc import Collection, Iterator, Mapping
from ctypes import c_char_p, c_uint32, c_void_p
from typing import Any, Final, NamedTuple

from vgw.errors import KernelError
from vgw.libbpf.library import failure, library

_UNION: Final = 5
_ADVICE: Final = (
    "it has no description of its types in /sys/kernel/btf/vmlinux; "
    "use a kernel with CONFIG_DEBUG_INFO_BTF, as distributions build theirs"
)


class TypeKind(enum.IntEnum):
    """Kinds of what the kernel describes (BTF_KIND_*)."""

    STRUCT = 4
    FUNCTION = 12


class Member(NamedTuple):
    """Place of a member in its structure; `bits` is the size of a bit field, 0 for others."""

    first_bit: int
    bits: int


class _Type(ctypes.Structure):
    """struct btf_type without what follows it: one _Member for each member."""

    _fields_ = [("name", c_uint32), ("info", c_uint32), ("size", c_uint32)]


class _Member(ctypes.Structure):
    _fields_ = [("name", c_uint32), ("type", c_uint32), ("place", c_uint32)]


def struct_members(structure: str, names: Collection[str]) -> dict[str, Member]:
    """Return where members of a kernel structure are, also those of nameless ones inside it.

    Those that it does not have are left out. Raises KernelError when the kernel does not describe
    its types.
    """
    with _description() as description:
        number = _find(description, structure, TypeKind.STRUCT)
        return {name: member for name, member in _members(description, number, 0) if name in names}


def type_numbers(kinds: Mapping[str, TypeKind]) -> dict[str, int]:
    """Return by which number the kernel knows each structure or function, by name.

    Those that it does not have are left out. Raises KernelError as struct_members() does.
    """
    with _description() as description:
        found = {name: _find(description, name, kind) for name, kind in kinds.items()}
    return {name: number for name, number in found.items() if number > 0}


@contextlib.contextmanager
def _description() -> Iterator[int]:
    """Load the kernel's description for a block."""
    calls = _calls()
    description = calls.btf__load_vmlinux_btf()
    if not description:
        raise failure("learn the layout of the kernel", ctypes.get_errno(), _ADVICE)
    try:
        yield description
    finally:
        calls.btf__free(description)


def _find(description: int, name: str, kind: TypeKind) -> int:
    """Return the number of a type, negative where there is none."""
    number: int = _calls().btf__find_by_name_kind(description, name.encode(), kind)
    return number


def _members(description: int, number: int, first_bit: int) -> Iterator[tuple[str, Member]]:
    """Yield name and place of each member of a type, if it is a structure or union."""
    calls = _calls()
    address = calls.btf__type_by_id(description, number) if number > 0 else None
    if not address:
        return
    info = _Type.from_address(address).info
    if info >> 24 & 0x1F not in (TypeKind.STRUCT, _UNION):
        return
    count, has_bit_fields = info & 0xFFFF, info >> 31
    for member in (_Member * count).from_address(address + ctypes.sizeof(_Type)):
        name = calls.btf__name_by_offset(description, member.name).decode()
        place = member.place & 0xFFFFFF if has_bit_fields else member.place
        if name:
            bits = member.place >> 24 if has_bit_fields else 0
            yield name, Member(first_bit + place, bits)
        else:
            yield from _members(description, member.type, first_bit + place)


def _calls() -> Any:
    """Return the library with the prototypes of what this module uses; raises KernelError."""
    loaded = library()
    try:
        loaded.btf__load_vmlinux_btf.restype = c_void_p
        loaded.btf__load_vmlinux_btf.argtypes = ()
        loaded.btf__find_by_name_kind.argtypes = (c_void_p, c_char_p, c_uint32)
        loaded.btf__type_by_id.restype = c_void_p
        loaded.btf__type_by_id.argtypes = (c_void_p, c_uint32)
        loaded.btf__name_by_offset.restype = c_char_p
        loaded.btf__name_by_offset.argtypes = (c_void_p, c_uint32)
        loaded.btf__free.restype = None
        loaded.btf__free.argtypes = (c_void_p,)
    except AttributeError as error:
        raise KernelError(f"libbpf.so.1 is too old: {error}", 0) from None
    return loaded
