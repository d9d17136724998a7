# SPDX-License-Identifier: Apache-2.0
"""Changes with an entry in the history: written before them, completed or withdrawn after them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.history import ARMED, Entry, History, outcome_of
from vgw.errors import PartlyAppliedError, VgwError
from vgw.policy.parse import Sources

_logger = logging.getLogger(__name__)

#: Makes a change: returns what became of VMs, raises PartlyAppliedError when some failed.
Work = Callable[[], ApplyResult]


def recorded(history: History, draft: Entry, sources: Sources, work: Work) -> ApplyResult:
    """Make a change and remember its policy, unless that is the current one and nothing changed.

    Raises what `work` raises, and VgwError before it when the history cannot be written.
    """
    current = history.current()
    if current is None or not says_the_same(draft, current):
        needed = [number for number in (draft.back,) if number is not None]
        return completed(history, history.begin(draft, sources, needed), work)
    result = work()
    if any(each.changed for each in result.vms):
        finish(history, history.begin(draft, sources), result.vms, {})
    return result


def recorded_if_possible(
    history: History, draft: Entry, sources: Sources, work: Work
) -> ApplyResult:
    """Make a change that has to be made, and remember its policy if it is new and can be written.

    For what this host's policy file says: that is not lost, and VMs have to be protected.
    """
    current = history.current()
    if current is not None and says_the_same(draft, current):
        return work()
    try:
        entry = history.begin(draft, sources)
    except VgwError as error:
        _logger.error("%s; the policy is applied and cannot be gone back to", error)
        return work()
    try:
        result = work()
    except PartlyAppliedError as error:
        finish(history, entry, results_of(error), error.failures)
        raise
    except VgwError as error:
        # The policy is good all the same, and will be applied when what is wrong has been righted.
        finish(history, entry, (), {"*": str(error)})
        raise
    finish(history, entry, result.vms, {})
    return result


def completed(history: History, entry: Entry, work: Work) -> ApplyResult:
    """Make a change and complete its entry, which goes when nothing was changed at all."""
    try:
        result = work()
    except PartlyAppliedError as error:
        if error.done:
            finish(history, entry, results_of(error), error.failures)
        else:
            history.withdraw(entry)
        raise
    except VgwError:
        history.withdraw(entry)
        raise
    finish(history, entry, result.vms, {})
    return result


def finish(
    history: History, entry: Entry, results: Sequence[AttachResult], failures: Mapping[str, str]
) -> None:
    """Complete an entry by what became of the VMs; they were changed, so a failure is only told."""
    try:
        history.save(dataclasses.replace(entry, outcome=outcome_of(results, failures)))
    except VgwError as error:
        _logger.error("%s; the history does not say what became of the VMs", error)


def results_of(error: PartlyAppliedError) -> list[AttachResult]:
    """Return what became of the VMs that did not fail."""
    return [AttachResult(**fields) for fields in error.done]


def says_the_same(draft: Entry, current: Entry) -> bool:
    """Tell whether an entry would add nothing to the current one."""
    same = draft.digest == current.digest and draft.source == current.source
    return same and draft.confirm is None and current.confirm != ARMED
