# SPDX-License-Identifier: Apache-2.0
"""Rule sets as nftables rules that protect a VM behind a bridge, one by one or as maps.

Both forms are stateful and stand in the inet family's forward hook, which br_netfilter gives
bridged packets to: the bridge family's own connection tracking is missing from many kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.layers import Box, Span, layers
from bench.prefixes import WIDTH
from bench.rulesets import ALL_PORTS
from vgw.abi import Action
from vgw.policy.model import (
    ANYWHERE,
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    EffectiveRule,
    Network,
)

TABLE: Final = "vgw_bench"
_PROTOCOLS: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "ipv6-icmp"}
_VERDICTS: Final = {Action.ACCEPT: "accept", Action.DROP: "drop"}
_FAMILIES: Final = {4: ("ip", "ipv4_addr"), 6: ("ip6", "ipv6_addr")}
#: Of the packets' fields, including what stands there when a protocol has no ports.
_EVERY_PORT: Final[Span] = (0, 65535)
_EVERY_PROTOCOL: Final[Span] = (0, 255)
_MOST_FIELDS: Final = 5


@dataclass(frozen=True, slots=True)
class Ruleset:
    """A text for `nft -f`; `maps` are asked one after the other, 0 in the linear form."""

    text: str
    maps: int = 0


#: Makes the rule set of one IP version (4 or 6) that protects the VM with this MAC address.
Form = Callable[[Sequence[EffectiveRule], int, str], Ruleset]


def linear(rules: Sequence[EffectiveRule], version: int, mac: str) -> Ruleset:
    """Return rules of one IP version as a chain, in their order; `mac` is the VM's."""
    return Ruleset(_table((), (_rule(rule, version) for rule in rules), mac))


def ordered_maps(rules: Sequence[EffectiveRule], version: int, mac: str) -> Ruleset:
    """Return rules of one IP version as interval maps that give the same verdicts.

    The last rule has a map of its own and is asked last, as in a chain.
    """
    boxes = _boxes(rules, version)
    last = len(rules) - 1
    chosen = layers(boxes[:last], [rule.action for rule in rules[:last]])
    return _mapped(rules, boxes, [*chosen, [last]], version, mac)


def unordered_maps(rules: Sequence[EffectiveRule], version: int, mac: str) -> Ruleset:
    """Return rules of one IP version as few interval maps, which is the fastest form there is.

    Where rules overlap, it is open which of them decides. Only the last one is asked last.
    """
    boxes = _boxes(rules, version)
    last = len(rules) - 1
    # The kernel takes a large element after a small one inside it, but not the other way round.
    order = sorted(range(last), key=lambda index: _volume(boxes[index]))
    chosen = layers([boxes[index] for index in order], [None] * last)
    maps = [*([order[place] for place in members] for members in chosen), [last]]
    return _mapped(rules, boxes, maps, version, mac)


def _mapped(
    rules: Sequence[EffectiveRule],
    boxes: Sequence[Box],
    chosen: Sequence[Sequence[int]],
    version: int,
    mac: str,
) -> Ruleset:
    family, kind = _FAMILIES[version]
    has_source_port = len(boxes[0]) == _MOST_FIELDS
    sport_type, sport = (" . inet_service", " . th sport") if has_source_port else ("", "")
    declarations: list[str] = []
    lookups = []
    for number, members in enumerate(chosen):
        elements = (_element(boxes[index], rules[index], version) for index in members)
        declarations += [
            f"\tmap m{number} {{",
            f"\t\ttype {kind} . {kind} . inet_proto{sport_type} . inet_service : verdict",
            "\t\tflags interval",
            "\t\telements = { " + ",\n\t\t\t".join(elements) + " }",
            "\t}",
        ]
        lookups.append(
            f"{family} saddr . {family} daddr . meta l4proto{sport} . th dport vmap @m{number}"
        )
    return Ruleset(_table(declarations, lookups, mac), len(chosen))


def _table(declarations: Iterable[str], rules: Iterable[str], mac: str) -> str:
    lines = [
        f"table inet {TABLE} {{",
        *declarations,
        "\tchain to_vm {",
        *(f"\t\t{rule}" for rule in rules),
        "\t\tdrop",
        "\t}",
        "\tchain forward {",
        "\t\ttype filter hook forward priority filter; policy accept;",
        "\t\tct state established,related accept",
        "\t\tct state invalid drop",
        # Bridged packets come and go through the bridge itself, so the VM is known by its MAC.
        f"\t\tether daddr {mac} goto to_vm",
        "\t}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _rule(rule: EffectiveRule, version: int) -> str:
    return " ".join([*_matches(rule, version), _VERDICTS[rule.action]])


def _matches(rule: EffectiveRule, version: int) -> Iterator[str]:
    family, _ = _FAMILIES[version]
    for word, networks in (("saddr", rule.peers), ("daddr", rule.local)):
        if networks != ANYWHERE:
            yield f"{family} {word} {networks[0]}"
    (service,) = rule.services
    if service.protocol is None:
        return
    protocol = _PROTOCOLS[service.protocol]
    ports = [
        f"{protocol} {word} {_range(span)}"
        for word, span in (("sport", next(iter(rule.source_ports), None)), ("dport", service.ports))
        if span is not None and span != ALL_PORTS
    ]
    yield from ports or [f"meta l4proto {protocol}"]


def _boxes(rules: Sequence[EffectiveRule], version: int) -> list[Box]:
    """Return rules as ranges of the fields of a map, the source port only if a rule has one."""
    source_port = any(rule.source_ports for rule in rules)
    return [_box(rule, version, source_port=source_port) for rule in rules]


def _volume(box: Box) -> int:
    return math.prod(last - first + 1 for first, last in box)


def _box(rule: EffectiveRule, version: int, *, source_port: bool) -> Box:
    (service,) = rule.services
    protocol = _EVERY_PROTOCOL if service.protocol is None else (service.protocol,) * 2
    box = [
        _addresses(rule.peers, version),
        _addresses(rule.local, version),
        (protocol[0], protocol[1]),
        _ports(service.ports),
    ]
    if source_port:
        box.insert(3, _ports(next(iter(rule.source_ports), None)))
    return box


def _addresses(networks: tuple[Network, ...], version: int) -> Span:
    if networks == ANYWHERE:
        return 0, (1 << WIDTH[version]) - 1
    (network,) = networks
    return int(network.network_address), int(network.broadcast_address)


def _ports(span: Span | None) -> Span:
    return _EVERY_PORT if span is None or span == ALL_PORTS else span


def _element(box: Box, rule: EffectiveRule, version: int) -> str:
    everywhere = "0.0.0.0/0" if version == 4 else "::/0"
    addresses = [
        everywhere if networks == ANYWHERE else str(networks[0])
        for networks in (rule.peers, rule.local)
    ]
    key = " . ".join([*addresses, *map(_range, box[2:])])
    return f"{key} : {_VERDICTS[rule.action]}"


def _range(span: Span) -> str:
    first, last = span
    return str(first) if first == last else f"{first}-{last}"
