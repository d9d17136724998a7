# SPDX-License-Identifier: Apache-2.0
"""How two lists of rules of a VM differ, and two sets of settings: pure, and quick for many rules.

A rule is the same rule while its direction, tier, policy and name are.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Final

from vgw.policy.model import EffectiveRule
from vgw.policy.services import range_text, service_text

Row = dict[str, Any]

#: Networks, services and ports of one difference that are listed; the rest is counted.
LISTED: Final = 10
_SETS: Final = ("peers", "local", "services", "source_ports")


@dataclasses.dataclass(frozen=True, slots=True)
class RuleChanges:
    """What has to happen to the rules of one direction, in the order of the new list.

    `moved` are (rule, place before, place after) of a smallest number of rules that explains the
    new order; places count from 1. `modified` are pairs of before and after.
    """

    added: Sequence[tuple[EffectiveRule, int]] = ()
    removed: Sequence[tuple[EffectiveRule, int]] = ()
    modified: Sequence[tuple[EffectiveRule, EffectiveRule]] = ()
    moved: Sequence[tuple[EffectiveRule, int, int]] = ()


def compare_rules(old: Sequence[EffectiveRule], new: Sequence[EffectiveRule]) -> RuleChanges:
    """Return how a list of rules becomes another; both are of one direction."""
    old_places = {rule.key: place for place, rule in enumerate(old, 1)}
    new_places = {rule.key: place for place, rule in enumerate(new, 1)}
    kept = [(rule, old_places[rule.key]) for rule in new if rule.key in old_places]
    staying = _longest_rising([place for _, place in kept])
    return RuleChanges(
        added=[(rule, new_places[rule.key]) for rule in new if rule.key not in old_places],
        removed=[(rule, old_places[rule.key]) for rule in old if rule.key not in new_places],
        modified=[
            (old[place - 1], rule) for rule, place in kept if not _same(old[place - 1], rule)
        ],
        moved=[(rule, place, new_places[rule.key]) for rule, place in kept if place not in staying],
    )


def rule_row(rule: EffectiveRule, place: int) -> Row:
    """Return a rule that comes or goes, as JSON."""
    row: Row = {"rule": rule.key, "place": place, "action": rule.action.name.lower()}
    row["log"] = rule.log
    for name in _SETS:
        row[name] = _listed([_text(name, each) for each in getattr(rule, name)])
    return row


def modified_row(old: EffectiveRule, new: EffectiveRule) -> Row:
    """Return what is different about a rule, as JSON: "fields" has old and new, or what differs."""
    fields: Row = {}
    if old.action is not new.action:
        fields["action"] = changed(old.action.name.lower(), new.action.name.lower())
    if old.log != new.log:
        fields["log"] = changed(old.log, new.log)
    for name in _SETS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            fields[name] = changed_set(before, after, functools.partial(_text, name))
    return {"rule": new.key, "fields": fields}


def changed(old: object, new: object) -> Row:
    """Return a value that changes, as JSON."""
    return {"old": old, "new": new}


def changed_set(
    old: Collection[Hashable], new: Collection[Hashable], text: Callable[[Any], str] = str
) -> Row:
    """Return what comes into a set and what leaves it, as JSON; long lists are cut and counted."""
    before, after = set(old), set(new)
    return {
        "added": _listed([text(each) for each in new if each not in before]),
        "removed": _listed([text(each) for each in old if each not in after]),
    }


def changed_fields(old: object, new: object, names: Iterable[str]) -> Row:
    """Return which attributes of two objects differ, as JSON."""
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in names}
    return {
        name: changed(_plain(before), _plain(after))
        for name, (before, after) in pairs.items()
        if before != after
    }


def _text(name: str, value: Any) -> str:
    """Return one value of a set of a rule as a policy file writes it."""
    if name == "services":
        return service_text(value)
    return range_text(value) if name == "source_ports" else str(value)


def _plain(value: object) -> object:
    """Return an attribute as JSON."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _same(old: EffectiveRule, new: EffectiveRule) -> bool:
    """Tell whether two rules mean the same, wherever they are written."""
    return old is new or all(
        getattr(old, name) == getattr(new, name) for name in ("action", "log", *_SETS)
    )


def _longest_rising(places: Sequence[int]) -> set[int]:
    """Return a longest subsequence of different numbers that rises (patience sorting)."""
    tops: list[int] = []
    before: dict[int, int | None] = {}
    for place in places:
        pile = bisect.bisect_left(tops, place)
        before[place] = tops[pile - 1] if pile else None
        tops[pile : pile + 1] = [place]
    found: set[int] = set()
    last = tops[-1] if tops else None
    while last is not None:
        found.add(last)
        last = before[last]
    return found


def _listed(texts: Sequence[str]) -> Row:
    return {"count": len(texts), "first": list(texts[:LISTED])}
