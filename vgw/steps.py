# SPDX-License-Identifier: Apache-2.0
"""Steps: whatever vgw changes outside its own process is announced here before it is changed.

Calls into the kernel are steps in vgw/libbpf/ and vgw/controller/links_netlink.py, changes of files
and directories in vgw/files.py. Whoever watches sees every step in its order, and may end the
process there or have the step fail; nothing but a test ever watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

#: Takes what is about to be done and to what: a path, the fd of a map or program, or a name.
#: Returns 0, or the errno with which it shall fail instead. Called from several threads.
Watcher = Callable[[str, object], int]

_watcher: Watcher | None = None


def announce(step: str, target: object) -> int:
    """Say what is about to be changed; return 0, or the errno with which that shall fail."""
    return 0 if _watcher is None else _watcher(step, target)


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Have the steps of a `with` block watched, in all threads."""
    global _watcher  # noqa: PLW0603 (one process, one sequence of steps)
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
