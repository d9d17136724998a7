# SPDX-License-Identifier: Apache-2.0
"""The search: inputs that come to something new are kept and changed again.

What is new is told by what came of an input, and, for one in some, by the lines of vgw that it ran
through: to trace every input would take five times as long as to try it.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import vgw
from tests.fuzz.inputs.bytes_mutator import Mutator
from tests.fuzz.inputs.target import Target

#: What one input may take: seconds of processor time, seconds at all, bytes more than before.
MAX_SECONDS: Final = 5.0
HANG_SECONDS: Final = 60
MAX_BYTES: Final = 512 << 20
#: One input in so many is traced.
_TRACED: Final = 16
_SHRINK_TRIES: Final = 300
_PACKAGE: Final = str(Path(vgw.__file__).parent)


class HangError(BaseException):
    """An input does not come to an end; not an Exception, which somebody may catch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that something is wrong with; `what` is the same for all inputs of a mistake."""

    data: bytes
    what: str
    details: str


@dataclass(slots=True)
class Result:
    """What a hunt came to."""

    inputs: int = 0
    outcomes: set[Hashable] = field(default_factory=set)
    lines: set[tuple[str, int]] = field(default_factory=set)
    corpus: int = 0
    slowest: float = 0.0
    memory: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)


def hunt(
    target: Target,
    seed: int,
    *,
    seconds: float = float("inf"),
    inputs: int = sys.maxsize,
    findings: int = 1,
) -> Result:
    """Give a target inputs for so long, or so many; stop after mistakes of so many kinds."""
    chance = random.Random(seed)
    mutator = Mutator(chance, target.words)
    result = Result()
    deadline = time.monotonic() + seconds
    with _limits(), target.running():
        corpus = list(target.seeds())
        fresh: Iterator[bytes] = iter(list(corpus))
        memory_before = _memory()
        while time.monotonic() < deadline and result.inputs < inputs:
            data = next(fresh, None)
            if data is None:
                # The newest are the least explored.
                base = corpus[max(chance.randrange(len(corpus)) for _ in range(2))]
                if not target.has_structure or chance.random() < 0.5:
                    base = mutator.mutate(base, chance.choice(corpus))
                data = target.shape(chance, base)
            is_traced = result.inputs % _TRACED == 0
            result.inputs += 1
            if _try(target, data, result, is_traced=is_traced):
                corpus.append(data)
            if len(result.findings) >= findings:
                break
        result.corpus, result.memory = len(corpus), _memory() - memory_before
        for what, finding in list(result.findings.items()):
            result.findings[what] = _shrunk(target, finding)
    return result


def _try(target: Target, data: bytes, result: Result, *, is_traced: bool) -> bool:
    """Give one input and tell whether it came to something new; mistakes go into the result."""
    started = time.process_time()
    lines: set[tuple[str, int]] = set()
    found = _problem(target, data, lines if is_traced else None)
    if isinstance(found, Finding):
        result.findings.setdefault(found.what, found)
        return False
    taken = time.process_time() - started
    result.slowest = max(result.slowest, taken)
    if taken > MAX_SECONDS and not is_traced:
        what = f"takes {taken:.1f} s of processor time"
        result.findings.setdefault("slow", Finding(data, what, what))
    is_new = found not in result.outcomes or not lines <= result.lines
    result.outcomes.add(found)
    result.lines |= lines
    return is_new


def _problem(
    target: Target, data: bytes, lines: set[tuple[str, int]] | None = None
) -> Finding | Hashable:
    """Return what came of an input, or a Finding when that is wrong."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    if lines is not None:
        sys.settrace(_tracer(lines))
    try:
        return target.give(data)
    except (Exception, HangError) as error:
        sys.settrace(None)
        return Finding(data, _kind(error), traceback.format_exc())
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _kind(error: BaseException) -> str:
    """Return a name for a mistake: the exception and where in vgw, or else at all, it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(_PACKAGE)] or frames
    where = inside[-1]
    return f"{type(error).__name__} in {Path(where.filename).name}:{where.name}: {error}"[:200]


def _tracer(lines: set[tuple[str, int]]) -> Callable[..., Any]:
    def local(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, _event: str, _argument: object) -> Callable[..., Any] | None:
        return local if frame.f_code.co_filename.startswith(_PACKAGE) else None

    return enter


def _shrunk(target: Target, finding: Finding) -> Finding:
    """Return a smaller input with the same mistake, by leaving parts out."""
    best, tries = finding, 0
    size = max(len(finding.data) // 2, 1)
    while size and tries < _SHRINK_TRIES and finding.what != "slow":
        start = 0
        while start < len(best.data) and tries < _SHRINK_TRIES:
            tries += 1
            less = best.data[:start] + best.data[start + size :]
            found = _problem(target, less)
            if isinstance(found, Finding) and found.what == finding.what:
                best = found
            else:
                start += size
        size //= 2
    return best


@contextmanager
def _limits() -> Iterator[None]:
    """Bound the memory of this process, and end what hangs."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"no end within {HANG_SECONDS} s")

    handler = signal.signal(signal.SIGALRM, end)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    # Not of the address space: for each thread that allocates while others live, and a busy machine
    # has many that are about to end, the C library reserves 64 MiB of it that nobody ever uses.
    resource.setrlimit(resource.RLIMIT_DATA, (_data() + MAX_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, handler)


def _data() -> int:
    """Return the bytes of memory that this process may write to, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024


def _memory() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
