# SPDX-License-Identifier: Apache-2.0
"""Whether values that were read from a file have the types that their dataclasses say.

A checksum tells what was written from what was not, not who wrote it: a file of a later version, or
of another program, may be whole and have other things in it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

#: Numbers in state files are of the kernel's unsigned types; the largest has 64 bits.
_BEYOND: Final = 1 << 64

_Check = Callable[[Any], bool]


def is_typed(value: object, hint: Any) -> bool:
    """Tell whether a value is of a type, down to what is in it: a class, a union or a container.

    An int is one from 0 to 2**64 - 1, and no bool; other values of bool are bools.
    """
    return _check(hint)(value)


@functools.cache
def _check(hint: Any) -> _Check:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        checks = [_check(each) for each in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is tuple:
        return _check_tuple(arguments)
    if origin is not None and issubclass(origin, Mapping):
        of_key, of_value = (_check(each) for each in arguments)
        return lambda value: (
            isinstance(value, Mapping)
            and all(of_key(key) and of_value(each) for key, each in value.items())
        )
    if hint is int:
        return lambda value: type(value) is int and 0 <= value < _BEYOND
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return _check_fields(hint)
    return lambda value: isinstance(value, hint)


def _check_tuple(arguments: tuple[Any, ...]) -> _Check:
    if arguments[-1] is Ellipsis:
        of_item = _check(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(of_item, value))
    checks = [_check(each) for each in arguments]
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(checks)
        and all(check(each) for check, each in zip(checks, value, strict=True))
    )


def _check_fields(hint: Any) -> _Check:
    """Return the check of a dataclass or named tuple: all its fields."""
    checks = [(name, _check(each)) for name, each in typing.get_type_hints(hint).items()]
    return lambda value: (
        isinstance(value, hint) and all(check(getattr(value, name)) for name, check in checks)
    )
