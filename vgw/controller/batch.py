# SPDX-License-Identifier: Apache-2.0
"""Changes of many VMs at a time: side by side, and what fails for one keeps no other back."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from vgw import files, libbpf
from vgw.controller import fitness
from vgw.controller.change import Change
from vgw.controller.desired import Desired
from vgw.controller.endpoint import reworded
from vgw.controller.tools import Tools
from vgw.errors import VgwError, out_of_memory
from vgw.threads import Call

#: A change waits most of its time for grace periods of the kernel, so many run side by side; those
#: that wait at the same time wait for the same one.
_WORKERS: Final = 48

#: Files that are open for an interface that is changed, at most: tables, old and new, and programs.
_FILES: Final = 40

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class AttachResult:
    """What became of one VM.

    No `interfaces` at all: nothing of it is protected. `compiled`: the programs had to be compiled
    for it. `named`: the policy has the VM, others get its defaults. `pending` says what the policy
    asks for and does not take effect yet. `kept`: a policy before had the VM and this one has not,
    so it keeps what that one said of it.
    """

    vm: str
    interfaces: list[str]
    generation: int
    changed: bool
    compiled: bool
    seconds: float
    named: bool = True
    pending: list[str] = field(default_factory=list)
    kept: bool = False


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What became of several VMs; `waiting` are interfaces that do not exist (yet), by VM."""

    vms: list[AttachResult] = field(default_factory=list)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0


def run_changes(
    tools: Tools,
    wanted: Sequence[Desired],
    compiled: Callable[[], bool],
    *,
    dry_run: bool = False,
) -> dict[str, AttachResult | VgwError]:
    """Make the changes of several VMs and return what became of each.

    `compiled` tells afterwards whether programs were compiled on the way. With `dry_run` nothing
    is changed, and the results say what would be.
    """
    started = time.monotonic()
    outcomes: dict[str, AttachResult | VgwError] = {}
    for part in _parts(wanted):
        outcomes |= _run_part(tools, part, compiled, started, dry_run=dry_run)
    return outcomes


def _parts(wanted: Sequence[Desired]) -> Iterator[Sequence[Desired]]:
    """Yield VMs in parts that do not need more open files than half of what there may be."""
    room = fitness.room_for(_FILES)
    part: list[Desired] = []
    interfaces = 0
    for desired in wanted:
        if part and interfaces + len(desired.interfaces) > room:
            yield part
            part, interfaces = [], 0
        part.append(desired)
        interfaces += len(desired.interfaces)
    yield part


def _run_part(
    tools: Tools,
    wanted: Sequence[Desired],
    compiled: Callable[[], bool],
    started: float,
    *,
    dry_run: bool,
) -> dict[str, AttachResult | VgwError]:
    """Make the changes of VMs; the tables of those that change are open until the last is done."""
    outcomes: dict[str, AttachResult | VgwError] = {}
    changed: dict[str, Change] = {}
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        changes = {each.vm: stack.enter_context(Change(tools, each)) for each in wanted}
        needed: dict[str, bool] = {}

        def prepare(vm: str) -> bool:
            change = changes[vm]
            needed[vm] = change.prepare()
            if not needed[vm]:
                if not dry_run:
                    change.commit()  # for a process that died may have left something
                change.close()
            seconds[vm] = time.monotonic() - started
            return needed[vm] and not dry_run

        def commit(vm: str) -> None:
            changes[vm].commit()
            seconds[vm] = time.monotonic() - started

        for vm, outcome in in_two_steps(prepare, commit, changes, _WORKERS, tools.alive):
            if isinstance(outcome, VgwError):
                outcomes[vm] = outcome
                continue
            change = changes[vm]
            if needed[vm]:
                changed[vm] = change
            outcomes[vm] = AttachResult(
                vm,
                change.interfaces,
                change.generation,
                needed[vm],
                compiled(),
                seconds[vm],
                change.named,
                change.pending(),
                change.kept,
            )
        if changed and not dry_run:
            outcomes |= _finish(tools, changed)
    return outcomes


def _finish(tools: Tools, changed: Mapping[str, Change]) -> dict[str, VgwError]:
    """Free what the changes of VMs have replaced; return of which of them that failed.

    What it leaves then is freed by the next change of the VM.
    """
    try:
        libbpf.wait_for_programs()
    except VgwError as error:
        failed = dict.fromkeys(changed, error)
    else:
        failed = {}
        finished = each_of(lambda vm: changed[vm].finish(), changed, _WORKERS, tools.alive)
        for vm, late in finished:
            if isinstance(late, VgwError):
                failed[vm] = late
    return {
        vm: reworded(error, f"{vm} was changed, but cleaning up behind it failed: {error}")
        for vm, error in failed.items()
    }


def each_of(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    alive: Callable[[], None],
) -> Iterator[tuple[_Item, _Result | VgwError]]:
    """Yield what a function returns for each item, side by side, or the error that it raises.

    `alive` is called whenever an item is done, by whichever thread did it.
    """
    order = list(items)
    functions = [functools.partial(_told, function, item, alive) for item in order]
    for item, call in zip(order, libbpf.outcomes(functions, workers), strict=True):
        yield item, _outcome(call)


def in_two_steps(
    first: Callable[[_Item], bool],
    then: Callable[[_Item], None],
    items: Iterable[_Item],
    workers: int,
    alive: Callable[[], None],
) -> Iterator[tuple[_Item, VgwError | None]]:
    """Do `first` for each item, and `then` where that returns True; yield items with their errors.

    The first step computes, and threads that compute at the same time only take the interpreter
    from each other: this thread does it, for one item after the other. The second one waits, so it
    is done side by side, and beside the first step of the items that follow. `alive` is called
    whenever a step is done, by whichever thread did it.
    """
    order = list(items)
    calls: list[Call[Any]] = []
    with libbpf.Helpers(workers - 1) as helpers:
        for item in order:
            call = libbpf.made(functools.partial(_told, first, item, alive))
            if call.error is None and call.result():
                call = helpers.begin(functools.partial(_told, then, item, alive))
            calls.append(call)
    for item, call in zip(order, calls, strict=True):
        outcome = _outcome(call)
        yield item, outcome if isinstance(outcome, VgwError) else None


def _told(function: Callable[[_Item], _Result], item: _Item, alive: Callable[[], None]) -> _Result:
    """Return what a function returns for an item, and tell that it is done."""
    try:
        return function(item)
    finally:
        alive()


def _outcome(call: Call[_Result]) -> _Result | VgwError:
    """Return the result of a call, or the error that it raised."""
    try:
        return call.result()
    except VgwError as error:
        return error
    except OSError as error:
        return files.failure(error)
    except MemoryError:
        return out_of_memory()
