# SPDX-License-Identifier: Apache-2.0
"""A VM that whoever starts it tells of, before a source can find it: as JSON of a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from vgw.controller.finding.found import FoundVm, clean_interface
from vgw.controller.parameters import Parameters
from vgw.errors import VgwError
from vgw.policy import values

_SOURCE: Final = "told"


def told(name: str, interfaces: Iterable[Sequence[str | None]]) -> FoundVm:
    """Return a running VM from its name and the [name, MAC or None] of its interfaces.

    Raises VgwError when a name is none.
    """
    found = [clean_interface(*each) for each in interfaces]
    own = tuple(each for each in found if each is not None)
    if len(own) != len(found):
        raise VgwError("an interface that is told of has no name that an interface can have")
    try:
        return FoundVm(values.name(name), _SOURCE, True, own)
    except ValueError as error:
        raise VgwError(str(error)) from error


def told_vm(parameters: Parameters) -> FoundVm | None:
    """Return the VM that a request tells of, None when it tells of none. Raises VgwError."""
    interfaces: Any = parameters.values.get("told")
    if interfaces is None:
        return None
    if not isinstance(interfaces, list) or not all(map(_is_interface, interfaces)):
        raise VgwError("told in the request is not a list of [interface, MAC or null]")
    return told(parameters.text("vm"), interfaces)


def _is_interface(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and (value[1] is None or isinstance(value[1], str))
    )
