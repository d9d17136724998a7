# SPDX-License-Identifier: Apache-2.0
"""Changes in processes of their own, forked from this one: counted step by step, and killed at one.

A step is known by what it does to what, and as the how-manieth of that kind: steps of threads come
in any order, and a step has to be met again in the next run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from vgw import libbpf, steps
from vgw.controller.paths import Paths
from vgw.errors import KernelError, VgwError

#: After so long a change shows where its threads are, and ends.
MOST_SECONDS: Final = 120


class Step(NamedTuple):
    """A step, and the how-manieth of its like it is."""

    what: str
    target: str
    number: int

    def __str__(self) -> str:
        return f"{self.what} {self.target} #{self.number}"


@dataclass(frozen=True)
class Ended:
    """How a change ended: None, the error's text, or the kill."""

    error: str | None
    killed: bool
    steps: list[Step]


class Watch:
    """Notes the steps of a change; `at` one of them does something instead, or besides."""

    def __init__(self, paths: Paths, at: Step | None, action: Callable[[], int]) -> None:
        self._roots = sorted((str(paths.bpffs.parent), str(paths.state_dir.parent)), reverse=True)
        self._at, self._action = at, action
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self.steps: list[Step] = []

    def __call__(self, what: str, target: object) -> int:
        with self._lock:
            kind = what, self._describe(target)
            self._seen[kind] += 1
            step = Step(*kind, self._seen[kind])
            self.steps.append(step)
        return self._action() if step == self._at else 0

    def _describe(self, target: object) -> str:
        if isinstance(target, int):
            for info in (libbpf.map_info, libbpf.prog_info):
                try:
                    return info(target).name
                except KernelError:
                    continue
            return "link"
        text = str(target)
        for root in self._roots:
            text = text.replace(f"{root}/", "")
        text = re.sub(r"/counters_\d$", "/counters", text)  # of either slot, whichever is spare
        return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)


def run_change(
    paths: Paths,
    change: Callable[[], object],
    at: Step | None = None,
    action: Callable[[], int] | None = None,
) -> Ended:
    """Make a change in a child, which does something `at` a step: it dies, unless told otherwise.

    `action` returns the errno with which the step shall fail, 0: it goes on.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(paths, change, at, action or _die, writing)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        return Ended(None, True, [])
    assert text, f"the child ended with {status} and said nothing"
    error, seen = json.loads(text)
    return Ended(error, False, [Step(*step) for step in seen])


def _die() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _child(
    paths: Paths,
    change: Callable[[], object],
    at: Step | None,
    action: Callable[[], int],
    writing: int,
) -> None:
    """Make the change and answer; never return, not even for want of memory."""
    code = 1
    try:
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        watch = Watch(paths, at, action)
        ended = _outcome(watch, change)
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # where memory ran out
        with os.fdopen(writing, "w") as answer:
            json.dump([ended, watch.steps], answer)
        code = 0
    finally:
        os._exit(code)


def _outcome(watch: Watch, change: Callable[[], object]) -> str | None:
    try:
        with steps.watched_by(watch):
            change()
    except VgwError as problem:
        return f"{type(problem).__name__}: {problem}"
    except BaseException as problem:
        return f"escaped: {type(problem).__name__}: {problem}"
    return None
