# SPDX-License-Identifier: Apache-2.0
"""What rules have counted over changes of their policy: the counts of counters that are gone.

Each policy counts in a map of its own. When it is replaced, its counters are final after a grace
period, and are added to a file of the VM's by the rules' keys. That file says too up to which
policy of each endpoint they were added, so that a process that is killed on the way neither loses
counts nor adds them twice: what it left in a spare slot is added by the next change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from vgw import abi, libbpf
from vgw.controller.policy_store import RuleLabel
from vgw.controller.state_file import read_state, write_state
from vgw.controller.typed import is_typed
from vgw.maps import EndpointMaps, RuleCount

_SCHEMA: Final = "vgw/rule-counts/v1"
NO_COUNT: Final = RuleCount(0, 0, 0)
#: How often counts are read at most until no change went on meanwhile.
_TRIES: Final = 5

_Found = TypeVar("_Found")

#: The rules of the policy that a VM had in a generation on a path; None when they are lost.
LabelsOf = Callable[[int, abi.Path], Sequence[RuleLabel] | None]


@dataclass(frozen=True, slots=True)
class RuleCounts:
    """What was counted in counters that are gone.

    `carried` holds the counts by rule key, `harvested` the last generation whose counters were
    added to them, by endpoint.
    """

    carried: Mapping[str, RuleCount] = field(default_factory=dict)
    harvested: Mapping[int, int] = field(default_factory=dict)

    def harvesting(self, maps: EndpointMaps, slot: int, labels_of: LabelsOf) -> RuleCounts:
        """Return these with the counts of a slot that no packet is judged by any more."""
        counts = list(counts_in(maps, slot, labels_of))
        if not counts:
            return self
        carried = dict(self.carried)
        add(carried, counts)
        config = maps.config(slot)
        harvested = {**self.harvested, config.endpoint: config.generation}
        return RuleCounts(carried, harvested)

    def with_all_of(self, maps: EndpointMaps, labels_of: LabelsOf) -> RuleCounts:
        """Return these with everything that an endpoint has counted that is not among them."""
        left = self.left_over(maps)
        counts = self if left is None else self.harvesting(maps, left, labels_of)
        if counts.has_all_of(maps):
            return counts
        return counts.harvesting(maps, maps.active_slot(), labels_of)

    def has_all_of(self, maps: EndpointMaps) -> bool:
        """Tell whether the counts of the policy in force are among these: no more will come."""
        config = maps.config()
        last = self.harvested.get(config.endpoint, 0)
        return last >= int(config.generation)

    def only(self, keys: Collection[str], endpoints: Collection[int]) -> RuleCounts:
        """Return what is known of some rules and endpoints."""
        return RuleCounts(
            {key: count for key, count in self.carried.items() if key in keys},
            {number: last for number, last in self.harvested.items() if number in endpoints},
        )

    def left_over(self, maps: EndpointMaps) -> int | None:
        """Return the spare slot if it has counts that are not among these, None otherwise.

        It has none when it counts in the map of the active slot, and none that matter when it was
        not in force before it.
        """
        active = maps.active_slot()
        spare = 1 - active
        counters = maps.counters_id(spare)
        if counters is None or counters == maps.counters_id(active):
            return None
        old, now = maps.config(spare), maps.config(active)
        is_new = self.harvested.get(old.endpoint, 0) < old.generation < now.generation
        return spare if is_new else None


def add(totals: dict[str, RuleCount], counts: Iterable[tuple[str, RuleCount]]) -> None:
    """Add counts to totals, both by rule key."""
    for key, count in counts:
        total = totals.get(key, NO_COUNT)
        totals[key] = RuleCount(
            total.packets + count.packets,
            total.bytes + count.bytes,
            max(total.last_hit_ns, count.last_hit_ns),
        )


def counts_in(
    maps: EndpointMaps, slot: int, labels_of: LabelsOf
) -> Iterator[tuple[str, RuleCount]]:
    """Yield key and counts of the rules that have counted in a slot, as far as they have names."""
    return named(maps.rule_counts(slot), maps.config(slot).generation, labels_of)


def named(
    counts: Iterable[tuple[abi.Path, int, RuleCount]], generation: int, labels_of: LabelsOf
) -> Iterator[tuple[str, RuleCount]]:
    """Yield counts by the key of a rule instead of path and number, as far as it has a name."""
    found: dict[abi.Path, Sequence[RuleLabel]] = {}
    for path, number, count in counts:
        if path not in found:
            found[path] = labels_of(generation, path) or ()
        if number < len(found[path]):
            yield found[path][number].key, count


def counted_now(
    maps: EndpointMaps, counts: RuleCounts, labels_of: LabelsOf
) -> Iterator[tuple[str, RuleCount]]:
    """Yield key and counts of the rules that have counted in an endpoint and are not in `counts`.

    A rule appears twice while what it counted under the policy before is in the spare slot. Of an
    endpoint whose interface is gone all may be in `counts` before it is removed.
    """
    if not counts.has_all_of(maps):
        yield from counts_in(maps, maps.active_slot(), labels_of)
    left = counts.left_over(maps)
    if left is not None:
        yield from counts_in(maps, left, labels_of)


def read_steadily(
    file: Path, opened: Sequence[EndpointMaps], read: Callable[[RuleCounts], _Found]
) -> _Found:
    """Return what `read` makes of a VM's counts; it reads again when a change went on meanwhile.

    Otherwise what a change moves from the maps to the file would be missed, or be seen twice.
    """

    def moment() -> tuple[RuleCounts, list[int]]:
        return load_counts(file), [maps.active_slot() for maps in opened]

    now = moment()
    for _ in range(_TRIES):
        before, found = now, read(now[0])
        now = moment()
        if now == before:
            break
    return found


def settle_spares(file: Path, opened: Iterable[EndpointMaps], labels_of: LabelsOf) -> None:
    """Add up and free what a change that was killed left in the spare slots of a VM's endpoints.

    `file` is that of the VM's counts. To be done before anything is staged. Raises VgwError.
    """
    left = [maps for maps in opened if maps.spare_is_used()]
    if not left:
        return
    libbpf.wait_for_programs()
    counts = old = load_counts(file)
    for maps in left:
        slot = counts.left_over(maps)
        if slot is not None:
            counts = counts.harvesting(maps, slot, labels_of)
    if counts != old:
        save_counts(file, counts)
    for maps in left:
        maps.release(1 - maps.active_slot())


def keep_counts(file: Path, opened: Iterable[EndpointMaps], labels_of: LabelsOf) -> None:
    """Add up what endpoints have counted that no packet meets any more and that are about to go.

    `file` is that of the VM's counts. What was added before is not added again. Raises VgwError.
    """
    counts = old = load_counts(file)
    for maps in opened:
        counts = counts.with_all_of(maps, labels_of)
    if counts != old:
        save_counts(file, counts)


def load_counts(path: Path) -> RuleCounts:
    """Return what is remembered in a file, nothing when there is none or it is damaged."""
    body = read_state(path, _SCHEMA)
    try:
        if body is not None:
            counts = RuleCounts(
                {key: RuleCount(*row) for key, row in body["carried"].items()},
                {int(number): last for number, last in body["harvested"].items()},
            )
            if is_typed(counts, RuleCounts):
                return counts
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return RuleCounts()


def save_counts(path: Path, counts: RuleCounts) -> None:
    """Write counts so that a crash leaves the old or the new ones. Raises VgwError."""
    write_state(path, _SCHEMA, {"carried": counts.carried, "harvested": counts.harvested})
