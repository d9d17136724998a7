# SPDX-License-Identifier: Apache-2.0
"""Rules that can never match, because one rule before them matches everything that they would.

A rule is a box in four dimensions: peers, local addresses, services and source ports. The distinct
sets of each dimension get numbers; once it is known which of them lie within which, the rules whose
boxes contain a given box are found by looking up combinations of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Final, TypeVar

from vgw.abi import Action
from vgw.errors import Problem
from vgw.policy.intervals import IntervalSet, supersets, union
from vgw.policy.model import (
    ECHO_REQUEST,
    ICMP_PROTOCOLS,
    PORT_PROTOCOLS,
    Direction,
    EffectiveRule,
    Network,
    PolicyDocument,
    Rule,
    Service,
    Tier,
)
from vgw.policy.report import MAX_PROBLEMS
from vgw.policy.resolve import effective_policy
from vgw.policy.yaml_nodes import show

_T = TypeVar("_T")
#: Number of a combination of local addresses, services and source ports; number of the peers.
_Box = tuple[int, int]
#: Shape -> peers -> position of the first rule of that box.
_Seen = dict[int, dict[int, int]]

#: Combinations of wider sets that are tried for one shape, and boxes that are looked up in all.
#: With more, which takes rules nested in each other by the thousand, the search ends early and may
#: miss that a rule is shadowed; it never reports one that is not.
MAX_SHAPES: Final = 256
MAX_BOXES: Final = 10_000_000

#: Numbers of IPv6 addresses begin here, with a gap, lest intervals of both versions merge.
_IPV6: Final = 1 << 33
#: Each protocol has its own numbers: ports, or type and code of ICMP, and one more for ICMP packets
#: that are none of their IP version and thus without type and code.
_PROTOCOL_BITS: Final = 17
_LAST_NUMBER: Final = 0xFFFF
_EVERY_PORT: Final = ((0, _LAST_NUMBER),)


def shadowed_rules(document: PolicyDocument) -> tuple[Problem, ...]:
    """Return a warning for each rule that one earlier rule covers for every VM it applies to.

    VMs that the document does not name are considered as well: they get the policies for all. The
    warnings are in the order of the files; those beyond MAX_PROBLEMS are counted.
    """
    covers = {
        rule.key: covering
        for direction in Direction
        for rule, covering in _covered(_lists(document, direction))
    }
    return tuple(_problems(document, covers)) if covers else ()


def _lists(document: PolicyDocument, direction: Direction) -> list[tuple[EffectiveRule, ...]]:
    """Return the different lists of rules that VMs have, in the order of the VMs."""
    lists = (effective_policy(document, vm).rules(direction) for vm in (*document.vms, None))
    # VMs with the same policies share one tuple.
    return list({id(rules): rules for rules in lists}.values())


def _covered(
    lists: Sequence[Sequence[EffectiveRule]],
) -> Iterator[tuple[EffectiveRule, list[EffectiveRule]]]:
    """Iterate over the rules that are covered in every list, with the rules that cover them."""
    space = _Space(rule for rules in lists for rule in rules)
    found: dict[int, tuple[EffectiveRule, list[EffectiveRule]]] = {}
    matching: set[int] = set()
    for rules in lists:
        for rule, covering in _first_covering(rules, space, matching):
            if covering is None:
                matching.add(id(rule))
                found.pop(id(rule), None)
            else:
                _, known = found.setdefault(id(rule), (rule, []))
                if not any(each is covering for each in known):
                    known.append(covering)
    yield from found.values()


def _first_covering(
    rules: Sequence[EffectiveRule], space: _Space, matching: set[int]
) -> Iterator[tuple[EffectiveRule, EffectiveRule | None]]:
    """Iterate over a list of rules with the first rule, or None, that covers each.

    Rules in `matching` need no answer. A rule that can be reached only through a tier with a `pass`
    rule before it says nothing about later tiers, since packets may have left its tier by then.
    """
    tier: Tier | None = None
    is_passed = False
    in_tier: _Seen = {}
    in_earlier_tiers: _Seen = {}
    of_this_tier: list[tuple[_Box, int]] = []
    for position, rule in enumerate(rules):
        if rule.tier is not tier:
            for (shape, peers), earlier in of_this_tier:
                in_earlier_tiers.setdefault(shape, {}).setdefault(peers, earlier)
            tier, is_passed, in_tier, of_this_tier = rule.tier, False, {}, []
        box = space.box(rule)
        if box is None:
            continue
        if id(rule) not in matching:
            first = space.first_around(box, in_tier, in_earlier_tiers)
            yield rule, None if first is None else rules[first]
        shape, peers = box
        in_tier.setdefault(shape, {}).setdefault(peers, position)
        is_passed |= rule.action is Action.PASS
        if not is_passed:
            of_this_tier.append((box, position))


class _Numbers:
    """Numbers different sets in the order in which they come."""

    def __init__(self) -> None:
        self.sets: dict[IntervalSet, int] = {}

    def number(self, intervals: IntervalSet) -> int:
        """Return the number of a set."""
        return self.sets.setdefault(intervals, len(self.sets))


class _Space:
    """The boxes of many rules, and which of them lie within which."""

    def __init__(self, rules: Iterable[EffectiveRule]) -> None:
        self._boxes: dict[int, _Box | None] = {}
        self._shapes: dict[tuple[int, int, int], int] = {}
        self._converted: dict[int, IntervalSet] = {}
        numbers = [_Numbers() for _ in range(4)]
        # The rules are kept, so the identities by which they and their parts are known stay theirs.
        self._rules = {id(rule): rule for rule in rules}
        for identity, rule in self._rules.items():
            self._boxes[identity] = self._numbered(rule, *numbers)
        self._around_peers, *self._around_parts = (supersets(tuple(each.sets)) for each in numbers)
        self._parts = tuple(self._shapes)
        self._around_shapes: dict[int, tuple[int, ...]] = {}
        self._left = MAX_BOXES

    def box(self, rule: EffectiveRule) -> _Box | None:
        """Return the box of a rule, None of one that matches nothing."""
        return self._boxes[id(rule)]

    def first_around(self, box: _Box, *seen: _Seen) -> int | None:
        """Return the lowest position of a seen box that a box is within."""
        shape, peers = box
        around = self._around_peers[peers]
        best: int | None = None
        for wider in self._shapes_around(shape):
            for boxes in seen:
                there = boxes.get(wider)
                if not there:
                    continue
                self._left -= min(len(around), len(there))
                if self._left < 0:
                    return best
                # Whichever are fewer are looked up among the others.
                fewer, others = (around, there) if len(around) < len(there) else (there, around)
                positions = [there[each] for each in fewer if each in others]
                best = min(positions if best is None else (best, *positions), default=best)
        return best

    def _shapes_around(self, shape: int) -> tuple[int, ...]:
        if shape not in self._around_shapes:
            parts = zip(self._around_parts, self._parts[shape], strict=True)
            local, services, source_ports = (sorted(around[part]) for around, part in parts)
            wider = product(local, services, source_ports)
            found = (self._shapes.get(each) for each in islice(wider, MAX_SHAPES))
            self._around_shapes[shape] = tuple(each for each in found if each is not None)
        return self._around_shapes[shape]

    def _numbered(
        self,
        rule: EffectiveRule,
        peers: _Numbers,
        local: _Numbers,
        services: _Numbers,
        source_ports: _Numbers,
    ) -> _Box | None:
        addresses = _of_common_versions(
            self._as_set(rule.peers, _address_set), self._as_set(rule.local, _address_set)
        )
        if addresses is None:
            return None
        numbers = self._as_set(rule.services, _service_set)
        shape = (
            local.number(addresses[1]),
            services.number(numbers),
            source_ports.number(_source_port_set(rule.source_ports, numbers)),
        )
        return self._shapes.setdefault(shape, len(self._shapes)), peers.number(addresses[0])

    def _as_set(
        self, values: tuple[_T, ...], convert: Callable[[tuple[_T, ...]], IntervalSet]
    ) -> IntervalSet:
        """Convert values, which many rules share, once."""
        found = self._converted.get(id(values))
        if found is None:
            found = self._converted[id(values)] = convert(values)
        return found


def _address_set(networks: tuple[Network, ...]) -> IntervalSet:
    intervals = []
    for network in networks:
        base = _IPV6 if network.version == 6 else 0
        first = base + int(network.network_address)
        size = 1 << (network.max_prefixlen - network.prefixlen)
        intervals.append((first, first + size - 1))
    return union(intervals)


def _of_common_versions(
    peers: IntervalSet, local: IntervalSet
) -> tuple[IntervalSet, IntervalSet] | None:
    """Return both sides without addresses whose version the other one lacks, None without any.

    No packet has addresses of two versions.
    """
    if not peers or not local:
        return None
    versions = [(side[0][0] < _IPV6, side[-1][0] >= _IPV6) for side in (peers, local)]
    if versions[0] == versions[1]:
        return peers, local
    has_ipv4, has_ipv6 = (all(both) for both in zip(*versions, strict=True))
    peers, local = (
        tuple(each for each in side if (has_ipv6 if each[0] >= _IPV6 else has_ipv4))
        for side in (peers, local)
    )
    return (peers, local) if peers and local else None


def _service_set(services: tuple[Service, ...]) -> IntervalSet:
    return union(interval for service in services for interval in _service_intervals(service))


def _service_intervals(service: Service) -> Iterator[tuple[int, int]]:
    if service.protocol is None:
        for protocol in PORT_PROTOCOLS:
            yield from _service_intervals(Service(protocol))
        for protocol, icmp_type in ECHO_REQUEST.items():
            yield from _service_intervals(Service(protocol, icmp_type=icmp_type))
        return
    if service.ports is not None:
        first, last = service.ports
    elif service.icmp_type is not None:
        first, last = service.icmp_type << 8, service.icmp_type << 8 | 0xFF
        if service.icmp_code is not None:
            first = last = first + service.icmp_code
    else:
        first, last = 0, _LAST_NUMBER + (service.protocol in ICMP_PROTOCOLS)
    base = service.protocol << _PROTOCOL_BITS
    yield base + first, base + last


def _source_port_set(ranges: tuple[tuple[int, int], ...], services: IntervalSet) -> IntervalSet:
    """Return the source ports of rules with these services; nothing where none has any."""
    if not any(first >> _PROTOCOL_BITS in PORT_PROTOCOLS for first, _ in services):
        return ()
    return union(ranges) if ranges else _EVERY_PORT


def _problems(
    document: PolicyDocument, covers: dict[str, list[EffectiveRule]]
) -> Iterator[Problem]:
    found = []
    files: dict[str, int] = {}
    for policy in document.policies:
        for direction in Direction:
            for index, rule in enumerate(policy.rules(direction)):
                order = files.setdefault(rule.file, len(files))
                covering = covers.get(f"{direction}/{policy.tier}/{policy.name}/{rule.name}")
                if covering is not None and rule.enabled:
                    path = f"{policy.path}.{direction}[{index}]"
                    message = _message(rule, policy.name, direction, covering)
                    problem = Problem(rule.file, rule.line, rule.column, path, message)
                    found.append((order, rule.line, rule.column, problem))
    found.sort(key=lambda each: each[:3])
    yield from (problem for *_, problem in found[:MAX_PROBLEMS])
    if len(found) > MAX_PROBLEMS:
        message = f"{len(found) - MAX_PROBLEMS} more rule(s) that never match are not listed"
        yield Problem(found[MAX_PROBLEMS][-1].file, 0, 0, "document", message)


def _message(
    rule: Rule, policy: str, direction: Direction, covering: Sequence[EffectiveRule]
) -> str:
    first, *others = covering
    text = (
        f"rule {show(rule.name)} of policy {show(policy)} ({direction}) never matches: "
        f"{show(first.name)} of policy {show(first.policy)} at {first.file}:{first.line} covers it"
    )
    return f"{text}; for some VMs another rule does" if others else text
