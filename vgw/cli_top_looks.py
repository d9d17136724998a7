# SPDX-License-Identifier: Apache-2.0
"""What `vgw top` shows at a moment; a thread keeps it up to date, so that keys need not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vgw.cli_target import Target
from vgw.cli_top_rates import Row, rule_rates, seconds_between, talker_rates, vm_rates
from vgw.errors import ControllerUnreachableError, VgwError

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """All that is on the screen; `focus` is the VM that talkers and rules are of."""

    vms: list[Row] = field(default_factory=list)
    focus: str | None = None
    talkers: list[Row] = field(default_factory=list)
    complete: bool = True
    rules: list[Row] = field(default_factory=list)
    error: str | None = None
    number: int = 0


class Looker:
    """Takes samples and makes rates of them; `look` is the newest."""

    def __init__(self, connect: Callable[[], Target]) -> None:
        """Remember how to get at who answers, which is done anew when it has gone."""
        self._connect = connect
        self._target: Target | None = None
        self._sample: Answer | None = None
        self._talkers: Answer | None = None
        self._rules: tuple[float, Answer] | None = None
        self.look = Look()

    def refresh(self, focus: str | None, *, rules: bool = False) -> Look:
        """Take a sample, with the talkers of one VM and, if asked for, its rules. Never raises."""
        try:
            sample = self._ask().sample()
            rows = vm_rates(self._sample, sample)
            self._sample = sample
            names = {row["vm"] for row in rows}
            look = replace(self.look, vms=rows, error=None, number=self.look.number + 1)
            self.look = self._focused(look, focus if focus in names else None, rules=rules)
        except ControllerUnreachableError as error:
            self._target = None
            self.look = replace(self.look, error=str(error))
        except VgwError as error:
            self.look = replace(self.look, error=str(error))
        return self.look

    def refocus(self, focus: str | None, *, rules: bool = False) -> Look:
        """Look at another VM's talkers and rules; rates of VMs stay until the next sample."""
        try:
            self.look = self._focused(self.look, focus, rules=rules)
        except VgwError as error:
            self.look = replace(self.look, error=str(error))
        return self.look

    def over(self, seconds: float, focus: str | None) -> tuple[Look, float]:
        """Return a look with rates over a time, and how many seconds it really were.

        Raises VgwError when there is none.
        """
        if self.refresh(focus).error is None:
            first = self._sample
            time.sleep(seconds)
            look = self.refresh(focus, rules=focus is not None)
            if look.error is None and first is not None and self._sample is not None:
                return look, seconds_between(first, self._sample)
        raise VgwError(self.look.error or "there is no sample")

    def _ask(self) -> Target:
        if self._target is None:
            self._target = self._connect()
        return self._target

    def _focused(self, look: Look, focus: str | None, *, rules: bool) -> Look:
        if focus is None:
            self._talkers = self._rules = None
            return replace(look, focus=None, talkers=[], complete=True, rules=[])
        if focus != self.look.focus:
            self._talkers = self._rules = None
        talkers = self._ask().talkers(focus)
        found = talker_rates(self._talkers, talkers)
        self._talkers = talkers
        return replace(
            look,
            focus=focus,
            talkers=found,
            complete=talkers["complete"],
            rules=self._looked_at_rules(focus) if rules else [],
        )

    def _looked_at_rules(self, vm: str) -> list[Row]:
        now, answer = time.monotonic(), self._ask().rules(vm)
        old, self._rules = self._rules, (now, answer)
        if old is None:
            return rule_rates(None, answer, 1.0)
        return rule_rates(old[1], answer, max(now - old[0], 1e-3))


class Watcher:
    """Has a Looker look again every `interval` seconds, and at once when the focus changes."""

    def __init__(self, looker: Looker, interval: float, changed: Callable[[], None]) -> None:
        """Be ready; `changed` is called by the thread whenever there is something new."""
        self._looker = looker
        self._interval = interval
        self._changed = changed
        self._condition = threading.Condition()
        self._focus: tuple[str | None, bool] = (None, False)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="top", daemon=True)

    @property
    def look(self) -> Look:
        """The newest look."""
        return self._looker.look

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a look that hangs is not waited for."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def focus(self, vm: str | None, *, rules: bool) -> None:
        """Look at this VM's talkers from now on, and at its rules if asked for."""
        with self._condition:
            if self._focus != (vm, rules):
                self._focus = vm, rules
                self._condition.notify()

    def _run(self) -> None:
        due = time.monotonic()
        shown: tuple[str | None, bool] = (None, False)
        while True:
            with self._condition:
                while not self._stopped and self._focus == shown and time.monotonic() < due:
                    self._condition.wait(max(due - time.monotonic(), 0))
                if self._stopped:
                    return
                focus = self._focus
            vm, rules = focus
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval
                self._looker.refresh(vm, rules=rules)
            else:
                self._looker.refocus(vm, rules=rules)
            shown = focus
            self._changed()
