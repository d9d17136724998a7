# SPDX-License-Identifier: Apache-2.0
"""Changes made by a process that is killed on the way, at any step or at a certain one."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, Final

from vgw import libbpf
from vgw.loader import clone

_MAP_STEPS: Final = ("map_update", "map_update_many", "map_delete", "map_create", "pin")

#: Everything by which a change touches the kernel or the disk.
_STEPS: Final = (
    *((libbpf, name) for name in _MAP_STEPS),
    *((libbpf, name) for name in ("link_create", "link_update", "link_detach")),
    *((clone, name) for name in ("map_create", "prog_load")),
    *((pathlib.Path, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir")),
)


def killed_after(steps: int, change: Callable[[], object]) -> bool:
    """Make a change in a process that dies after so many steps; return whether it finished."""
    left = steps

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return function(*arguments, **options)

        return counted

    def prepare() -> None:
        for owner, name in _STEPS:
            setattr(owner, name, counting(getattr(owner, name)))

    return _finished(prepare, change)


def killed_at(owner: object, name: str, change: Callable[[], object]) -> None:
    """Make a change in a process that dies where it calls a function, which it has to do."""

    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    assert not _finished(lambda: setattr(owner, name, die), change), f"{name} was not called"


def _finished(prepare: Callable[[], object], change: Callable[[], object]) -> bool:
    """Make a change in a process of its own; return whether that came to its end."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0
