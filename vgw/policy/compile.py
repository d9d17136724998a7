# SPDX-License-Identifier: Apache-2.0
"""Compilation of an effective policy to the images that bpf/policy.h reads, one for each path.

An image has the rules of one direction, numbered in the order of evaluation. Few rules make a
narrow image (narrow.py), many a wide one (wide.py, which needs numpy and is loaded only then).
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vgw import abi
from vgw.policy import image
from vgw.policy.model import (
    ANYWHERE,
    DIRECTION_OF_PATH,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Network,
)
from vgw.policy.narrow import narrow_image
from vgw.policy.quotas import PolicyTooLargeError
from vgw.policy.ranges import Search, searches_of
from vgw.policy.search_tree import SearchTooDeepError

#: Rules that one direction of a VM may have.
MAX_RULES: Final = 50_000
#: Bytes of the tables of one direction.
MAX_BYTES: Final = 80 << 20
#: Rules from which on a build takes long enough to say what it is at.
_SLOW_RULES: Final = 5_000
#: Images that are remembered, for many VMs have the same rules; fewer where they are large, but
#: those of both directions of the latest policy always.
_REMEMBERED: Final = 256
_REMEMBERED_BYTES: Final = 16 << 20

_Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PolicyImage:
    """One direction of a compiled policy: what packets are judged by, and what its numbers mean.

    `data` is whole lines of abi.ImageLine. `rules[n]` is the rule that programs count and log as
    number n. Images with equal `digest` are equal in both. `staged`: programs need their stages.
    """

    digest: str
    data: bytes
    rules: tuple[EffectiveRule, ...]
    staged: bool = False


def compile_policy(
    effective: EffectivePolicy,
    *,
    sources: tuple[Network, ...] | None = None,
    progress: _Progress | None = None,
) -> dict[abi.Path, PolicyImage]:
    """Return the image of each path of a policy.

    `sources` are all addresses that the guards let the VM send from, None when they let any:
    rules that therefore accept nothing are left out. `progress` is told what takes long. Raises
    PolicyTooLargeError, which names the VM, the direction, the limit and the rule at fault.
    """
    return {
        path: _compile(effective, direction, sources, progress)
        for path, direction in ((path, DIRECTION_OF_PATH[path]) for path in abi.Path)
    }


@dataclass(slots=True)
class _Remembered:
    """An image with what it was made of; what is compared by identity is kept alive by this."""

    rules: tuple[EffectiveRule, ...]
    sources: tuple[Network, ...] | None
    by_default: int
    image: PolicyImage


_memory: list[_Remembered] = []
_memory_lock = threading.Lock()


def _compile(
    effective: EffectivePolicy,
    direction: Direction,
    sources: tuple[Network, ...] | None,
    progress: _Progress | None,
) -> PolicyImage:
    """Return an image, the one remembered if the same rules were compiled lately."""
    rules = effective.rules(direction)
    if direction is Direction.INGRESS or not _names_own_side(rules):
        sources = None
    defaults = effective.defaults
    by_default = image.rule_word(abi.NO_RULE, defaults.action(direction), defaults.log, 0)
    with _memory_lock:
        for known in _memory:
            if known.rules is rules and known.by_default == by_default and known.sources == sources:
                return known.image
        made = _build(f"VM {effective.vm}, {direction}", rules, sources, by_default, progress)
        _memory.insert(0, _Remembered(rules, sources, by_default, made))
        del _memory[_REMEMBERED:]
        while (
            len(_memory) > 2 and sum(len(each.image.data) for each in _memory) > _REMEMBERED_BYTES
        ):
            _memory.pop()
        return made


def _names_own_side(rules: Sequence[EffectiveRule]) -> bool:
    return any(rule.local is not ANYWHERE and rule.local != ANYWHERE for rule in rules)


def _build(
    where: str,
    all_rules: Sequence[EffectiveRule],
    sources: tuple[Network, ...] | None,
    by_default: int,
    progress: _Progress | None,
) -> PolicyImage:
    rules = tuple(rule for rule in all_rules if _may_match(rule, sources))
    if len(rules) > MAX_RULES:
        beyond = rules[MAX_RULES]
        raise PolicyTooLargeError(
            f"{where}: {len(rules)} rules, the limit is {MAX_RULES}: {_named(beyond)} is the first "
            "too many; use groups and services to say the same in fewer rules"
        )
    searches = searches_of(rules)
    try:
        data, staged = narrow_image(rules, searches, by_default), False
        if data is None:
            data, staged = _build_wide(where, rules, searches, by_default, progress)
    except SearchTooDeepError:
        raise PolicyTooLargeError(
            f"{where}: its addresses or ports lie so unevenly that a program would have to search "
            f"too long; {_largest(rules, searches)} has most of them, use larger networks there"
        ) from None
    # One byte more would lie in the chunks of the other path, or of the policy in force.
    if len(data) > MAX_BYTES:
        raise _too_large(where, rules, searches)
    digest = hashlib.sha256(data)
    digest.update("\0".join(f"{rule.key}\0{rule.log}" for rule in rules).encode())
    return PolicyImage(digest.hexdigest(), data, rules, staged)


def _build_wide(
    where: str,
    rules: Sequence[EffectiveRule],
    searches: Sequence[Search],
    by_default: int,
    progress: _Progress | None,
) -> tuple[bytes, bool]:
    """Return the image of many rules, and whether a lookup needs the stages: a large one does."""
    from vgw.policy import wide  # noqa: PLC0415 - numpy takes time and memory that few VMs need

    def tell(part: str) -> None:
        if progress is not None and len(rules) >= _SLOW_RULES:
            progress(f"{where}: building tables of {len(rules)} rules: {part}")

    try:
        return wide.wide_image(rules, searches, by_default, MAX_BYTES, tell)
    except wide.ImageTooLargeError as error:
        heaviest = searches[error.search : error.search + 1]
        raise _too_large(where, rules, heaviest) from None


def _too_large(
    where: str, rules: Sequence[EffectiveRule], searches: Sequence[Search]
) -> PolicyTooLargeError:
    return PolicyTooLargeError(
        f"{where}: its tables would take more than {MAX_BYTES >> 20} MiB; "
        f"{_largest(rules, searches)} has most addresses or ports, use larger networks there"
    )


def _may_match(rule: EffectiveRule, sources: tuple[Network, ...] | None) -> bool:
    """Tell whether there is a packet for a rule: an empty group has none.

    Rules that do not accept stay whatever their addresses are: a flow of an address that the VM
    had before is judged by them once more, and must not fall to the default.
    """
    if not rule.peers or not rule.local:
        return False
    if sources is None or rule.local is ANYWHERE or rule.action is not abi.Action.ACCEPT:
        return True
    return any(_overlap(own, network) for network in rule.local for own in sources)


@functools.lru_cache(maxsize=4096)
def _overlap(own: Network, network: Network) -> bool:
    return own.version == network.version and own.overlaps(network)


def _named(rule: EffectiveRule) -> str:
    place = f" at {rule.file}:{rule.line}" if rule.file else ""
    return f"rule {rule.name!r} of policy {rule.policy!r}{place}"


def _largest(rules: Sequence[EffectiveRule], searches: Sequence[Search]) -> str:
    """Return the name of the rule with most ranges in the searches given."""
    sizes = [
        sum(len(search.sets[search.of_rule[n]]) for search in searches) for n in range(len(rules))
    ]
    return _named(rules[max(range(len(rules)), key=sizes.__getitem__)])
