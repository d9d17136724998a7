# SPDX-License-Identifier: Apache-2.0
"""Makes the trial of a disagreement small: fewer steps, shorter frames, plainer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.cases.table import Wait
from tests.fuzz import values
from tests.fuzz.compare import Disagreement
from tests.fuzz.mutate import fix_lengths
from tests.fuzz.trial import SCENES, Shot, Step, Trial

#: Plays a trial and returns what engines disagree on, as Rig.check.
Check = Callable[[Trial], Disagreement | None]
MOST_PLAYS = 4000


class _Shrinking:
    """The smallest trial so far, of the same kind of disagreement as the first."""

    def __init__(self, found: Disagreement, check: Check) -> None:
        self.best = found
        self._check = check
        self._plays = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.best.trial.steps

    def try_steps(self, steps: tuple[Step, ...]) -> bool:
        """Keep a trial of these steps, if they are others and engines disagree as before."""
        return steps != self.steps and self._keep(replace(self.best.trial, steps=steps))

    def try_scenes(self) -> None:
        """Prefer the scenes that come first."""
        for scene in SCENES[: SCENES.index(self.best.trial.scene)]:
            if self._keep(replace(self.best.trial, scene=scene)):
                return

    def try_frame(self, place: int, frame: bytes) -> bool:
        shot = self.steps[place]
        assert isinstance(shot, Shot)
        return self._replace(place, shot._replace(frame=frame))

    def try_plain(self, place: int) -> None:
        """Try the step at a place without what makes it unusual."""
        step = self.steps[place]
        if isinstance(step, Shot) and step.gso:
            self._replace(place, step._replace(gso=False))
        elif isinstance(step, Wait):
            for seconds in values.WAITS:
                shorter = Wait(seconds + values.OVER_SECOND)
                if shorter.seconds < step.seconds and self._replace(place, shorter):
                    return

    def _replace(self, place: int, step: Step) -> bool:
        return self.try_steps((*self.steps[:place], step, *self.steps[place + 1 :]))

    def _keep(self, trial: Trial) -> bool:
        if self._plays >= MOST_PLAYS:
            return False
        self._plays += 1
        found = self._check(trial)
        if found is None or found.kind != self.best.kind:
            return False
        self.best = found
        return True


def shrink(found: Disagreement, check: Check) -> Disagreement:
    """Return a disagreement of the same kind about a trial that is as small as was found."""
    shrinking = _Shrinking(found, check)
    shrinking.try_scenes()
    before = None
    while before != shrinking.steps:
        before = shrinking.steps
        _drop_steps(shrinking)
        for place in reversed(range(len(shrinking.steps))):
            # A disagreement that comes earlier than before leaves fewer steps.
            if place < len(shrinking.steps):
                shrinking.try_plain(place)
                _simplify(shrinking, place)
    return shrinking.best


def _drop_steps(shrinking: _Shrinking) -> None:
    size = max(len(shrinking.steps) // 2, 1)
    while size:
        place = 0
        while place < len(shrinking.steps):
            steps = shrinking.steps
            if not shrinking.try_steps(steps[:place] + steps[place + size :]):
                place += size
        size //= 2


def _simplify(shrinking: _Shrinking, place: int) -> None:
    """Shorten the frame at a place and set what bytes of it do not matter to zero."""
    for simpler in (_shorter, _plainer):
        done = False
        while not done and place < len(shrinking.steps):
            step = shrinking.steps[place]
            if not isinstance(step, Shot):
                return
            done = not any(shrinking.try_frame(place, frame) for frame in simpler(step.frame))


def _shorter(frame: bytes) -> Iterator[bytes]:
    """Yield the frame with less at its end, once with its length fields made right."""
    size = len(frame) - 14
    while size > 0:
        cut = bytearray(frame[: len(frame) - size])
        for fix in (True, False):
            if fix:
                fixed = bytearray(cut)
                fix_lengths(fixed)
                yield bytes(fixed)
            else:
                yield bytes(cut)
        size //= 2


def _plainer(frame: bytes) -> Iterator[bytes]:
    """Yield the frame with zeros in other places, the longest first."""
    size = 1 << (len(frame) // 2).bit_length()
    while size:
        for start in range(0, len(frame), size):
            if any(frame[start : start + size]):
                zeros = bytes(len(frame[start : start + size]))
                yield frame[:start] + zeros + frame[start + size :]
        size //= 2
