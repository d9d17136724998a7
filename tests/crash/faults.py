# SPDX-License-Identifier: Apache-2.0
"""One scenario whose steps fail, each in turn, and what about it is not as it has to be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from tests.crash.killing import Step, run_change
from tests.crash.run import Choice, Result, asserted, shown, unharmed
from tests.crash.scenarios import Scenario
from tests.crash.world import Left, World

#: What the kernel answers to each kind of step where it goes wrong.
ERRNOS: Final = {
    "map create": (errno.ENOMEM, errno.EPERM, errno.E2BIG, errno.ENOSPC),
    "map update": (errno.ENOMEM, errno.E2BIG, errno.ENOSPC, errno.EPERM),
    "map delete": (errno.ENOMEM, errno.EPERM),
    "program load": (errno.ENOMEM, errno.EPERM),
    "link create": (errno.ENOMEM, errno.EPERM, errno.EBUSY),
    "link update": (errno.ENOMEM, errno.EINVAL, errno.EPERM),
    "link detach": (errno.ENOMEM, errno.EPERM),
    "pin": (errno.ENOSPC, errno.EROFS, errno.EPERM, errno.ENOMEM),
    "filter add": (errno.ENOMEM, errno.EPERM),
    "filter delete": (errno.ENOMEM, errno.EPERM),
    "qdisc add": (errno.ENOMEM, errno.EPERM),
    "qdisc delete": (errno.ENOMEM, errno.EPERM),
    "mkdir": (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO),
    "rename": (errno.EIO, errno.EROFS, errno.ENOSPC),
    "unlink": (errno.EIO, errno.EROFS),
    "rmdir": (errno.EIO, errno.EROFS),
    "create": (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
}
#: A longer error is none that anybody reads.
LONGEST: Final = 500


def fail_at_steps(
    world: World, scenario: Scenario, choice: Choice, *, all_errnos: bool = False
) -> Result:
    """Have some steps of a scenario's change fail, each from where it starts.

    By default with one of the errnos that its kind may meet, these in turn.
    """
    result = Result(scenario.name)
    whole = unharmed(world, scenario, result)
    before = world.prober.probes
    for place, step in enumerate(choice(result.steps)):
        known = ERRNOS[step.what]
        for number in known if all_errnos else (known[place % len(known)],):
            if scenario.bare:
                world.clear()
            fault = Fault(step, number)
            for problem in asserted(_failed(world, scenario, fault, whole, result)):
                result.problems.append(f"{fault}: {problem}")
            result.killed += 1
    world.clear()
    result.probes = world.prober.probes - before
    return result


@dataclass(frozen=True)
class Fault:
    """A step and with which errno it fails."""

    step: Step
    number: int

    def __str__(self) -> str:
        return f"{errno.errorcode[self.number]} at {self.step}"


def _failed(
    world: World, scenario: Scenario, fault: Fault, whole: Left, result: Result
) -> Iterator[str]:
    scenario.before(world)
    hidden = world.unpinned()
    start = world.left(hidden)
    world.prober.seen()
    before = world.prober.seen()
    change = partial(scenario.change, world)
    ended = run_change(world.paths, change, fault.step, lambda: fault.number)
    if fault.step not in ended.steps:
        yield "it did not come to that"
    after = world.prober.seen()
    now = world.prober.now()
    if ended.error is not None:
        result.errors.append(ended.error)
        where = str(world.paths.run_dir.parent)  # as long as it happens to be
        yield from _said(ended.error.replace(where, ""), fault.number)
    if scenario.removes:
        pass
    elif ended.error is not None and scenario.order[0] in now and not _is_behind(ended.error):
        left = world.left(hidden)
        if not (scenario.is_left_over and set(left.names) < set(start.names)):
            yield from _differences("left after the failure", start, left)
    elif scenario.order[-1] not in now:
        yield f"packets are judged by {sorted(now)}, and it says {ended.error}"
    try:
        scenario.change(world)
    except Exception as error:
        yield f"the next try fails: {type(error).__name__}: {error}"
    end = world.prober.seen()
    if not scenario.allows([*before, *after, *end], undone=True):
        yield f"packets were judged by something else: {shown(before, after, end)}"
    if scenario.order[-1] not in world.prober.now():
        yield "the next try does not put the new policy in force"
    yield from _differences("left by the next try", whole, world.left())


def _is_behind(error: str) -> bool:
    """Tell whether it failed behind the change."""
    return "was changed, but" in error


def _said(error: str, number: int) -> Iterator[str]:
    """Look at how it was said."""
    if error.startswith("escaped"):
        yield error
    if "\n" in error or len(error) > LONGEST:
        yield f"the error is no line to read: {error}"
    if os.strerror(number) not in error:
        yield f"the error does not say what it was: {error}"


def _differences(what: str, wanted: Left, found: Left) -> Iterator[str]:
    more, less = set(found.names) - set(wanted.names), set(wanted.names) - set(found.names)
    if more or less:
        yield f"{what}: more {sorted(more)}, less {sorted(less)}"
    elif wanted != found:
        yield f"{what}: {found[1:]} instead of {wanted[1:]}"
