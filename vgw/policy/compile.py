# SPDX-License-Identifier: Apache-2.0
"""Compilation of an effective policy to the image that bpf/policy.h reads.

An image is an array of 64-bit words in native byte order, in blocks of
`abi.IMAGE_BLOCK_WORDS`. Each field of a packet (remote address, local address, service, source
port) has a table of sorted ranges; a range names a bit vector with one bit for each rule that
admits its values. bpf/policy.h ANDs the four vectors and takes the first bit. Here a vector is a
Python integer, so that building one is set algebra.

Only this module and bpf/policy.h know the layout; the rest of vgw moves images as bytes.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vgw import abi
from vgw.errors import ExitCode, VgwError
from vgw.policy.model import (
    DIRECTION_OF_PATH,
    ECHO_REQUEST,
    ICMP_PROTOCOLS,
    PORT_PROTOCOLS,
    TIERS,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Network,
    Service,
    Tier,
)

_FORMAT: Final = 1
_BLOCK_RULES: Final = abi.IMAGE_BLOCK_WORDS * 64
_BLOCK_BYTES: Final = abi.IMAGE_BLOCK_WORDS * 8
_FIELD_BLOCKS: Final = 3
_MAX_BLOCKS: Final = 7
#: Ranges that a program finds in its steps of binary search, by field.
_MAX_RANGES: Final = {"peer": 1 << 13, "local": 1 << 8, "service": 1 << 12, "source port": 1 << 8}
#: Set in the service of ICMP over IPv6 and of ICMPv6 over IPv4, which are numbers like any other.
_FOREIGN_ICMP: Final = 0x01000000
_ADDRESS_SPACE: Final = (0, (1 << 128) - 1)
_VALUE_SPACE: Final = (0, (1 << 32) - 1)
_MAPPED_IPV4: Final = 0xFFFF << 32

#: Inclusive range of values of a field.
Range = tuple[int, int]


class PolicyTooLargeError(VgwError):
    """A policy has more rules or ranges than a program looks at."""

    exit_code = ExitCode.POLICY_INVALID


def compile_policy(effective: EffectivePolicy, rule_ids: Mapping[str, int]) -> bytes:
    """Return the image of a policy, whole blocks of words in native byte order.

    `rule_ids` gives each rule of the policy, by its `key`, the number under which programs count
    and log it. Raises PolicyTooLargeError, which names the VM, the direction and the limit.
    """
    image = _Image()
    for path in abi.Path:
        _compile_direction(image, effective, DIRECTION_OF_PATH[path], rule_ids)
    return image.to_bytes()


class _Image:
    """The image under construction: fixed blocks in front, tables behind."""

    def __init__(self) -> None:
        self.words = array.array("Q", bytes(_BLOCK_BYTES * (1 + _FIELD_BLOCKS * len(abi.Path))))
        self.words[0] = _FORMAT

    def append(self, words: Iterable[int]) -> int:
        """Append words at the next block and return the index of the first."""
        self.words.extend([0] * (-len(self.words) % abi.IMAGE_BLOCK_WORDS))
        index = len(self.words)
        self.words.extend(words)
        return index

    def set_fields(self, path: abi.Path, fields: Sequence[int]) -> None:
        """Write the fields of one path, in the order of bpf/policy.h's structures of them."""
        first = (1 + _FIELD_BLOCKS * path) * abi.IMAGE_BLOCK_WORDS
        self.words[first : first + len(fields)] = array.array("Q", fields)

    def to_bytes(self) -> bytes:
        """Return the image, filled up to a whole block."""
        self.append(())
        return self.words.tobytes()


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The rules of one direction with the bits they have in the vectors."""

    rules: tuple[EffectiveRule, ...]
    bits: tuple[int, ...]
    blocks: int
    tier_end: Mapping[Tier, int]


def _number_rules(rules: tuple[EffectiveRule, ...]) -> _Numbered:
    """Give rules their bits; each tier starts a block, so that `pass` can skip whole blocks."""
    bits: list[int] = []
    ends: dict[Tier, int] = {}
    block = 0
    for tier in TIERS:
        count = sum(rule.tier is tier for rule in rules)
        bits.extend(range(block * _BLOCK_RULES, block * _BLOCK_RULES + count))
        block += -(-count // _BLOCK_RULES)
        ends[tier] = block
    return _Numbered(rules, tuple(bits), block, ends)


def _compile_direction(
    image: _Image, effective: EffectivePolicy, direction: Direction, rule_ids: Mapping[str, int]
) -> None:
    where = f"VM {effective.vm}, {direction}"
    numbered = _number_rules(effective.rules(direction))
    if numbered.blocks > _MAX_BLOCKS:
        raise PolicyTooLargeError(
            f"{where}: {len(numbered.rules)} rules need {numbered.blocks} blocks of "
            f"{_BLOCK_RULES}, the limit is {_MAX_BLOCKS}; use groups and services to say the same "
            "in fewer rules"
        )
    tables = _Tables(image, numbered.blocks, where)
    pairs = list(zip(numbered.rules, numbered.bits, strict=True))
    remote = tables.add_addresses("peer", [(_addresses(r.peers), bit) for r, bit in pairs])
    local = tables.add_addresses("local", [(_addresses(r.local), bit) for r, bit in pairs])
    service = tables.add_values("service", [(_services(r.services), bit) for r, bit in pairs])
    source = tables.add_values("source port", [(_source_ports(r), bit) for r, bit in pairs])
    rule_words = [0] * (numbered.blocks * _BLOCK_RULES)
    for rule, bit in pairs:
        rule_words[bit] = _rule_word(
            rule.action, rule_ids[rule.key], rule.log, numbered.tier_end[rule.tier]
        )
    default = _rule_word(
        effective.defaults.action(direction), abi.NO_RULE, effective.defaults.log, 0
    )
    rules_index = image.append(rule_words)
    path = next(path for path, name in DIRECTION_OF_PATH.items() if name is direction)
    image.set_fields(
        path,
        [*remote, *local, *service, *source, numbered.blocks, rules_index, default],
    )


def _rule_word(action: abi.Action, rule_id: int, log: bool, next_tier: int) -> int:
    return rule_id << 32 | next_tier << 16 | (abi.RULE_LOG if log else 0) << 8 | action


class _Tables:
    """Writes the range tables of one direction; equal vectors are stored once."""

    def __init__(self, image: _Image, blocks: int, where: str) -> None:
        self._image = image
        self._blocks = max(blocks, 1)
        self._where = where
        self._vectors: dict[int, int] = {}

    def add_addresses(self, field: str, sets: Sequence[tuple[tuple[Range, ...], int]]) -> Range:
        """Add a table of addresses; return the index of its first word and its length."""
        ranges = self._ranges(field, sets, _ADDRESS_SPACE)
        words = [half for start, _ in ranges for half in (start >> 64, start & (1 << 64) - 1)]
        words += [vector for _, vector in ranges]
        return self._image.append(words), len(ranges)

    def add_values(self, field: str, sets: Sequence[tuple[tuple[Range, ...], int]]) -> Range:
        """Add a table of 32-bit values; return the index of its first word and its length."""
        ranges = self._ranges(field, sets, _VALUE_SPACE)
        return self._image.append(start << 32 | vector for start, vector in ranges), len(ranges)

    def _ranges(
        self, field: str, sets: Sequence[tuple[tuple[Range, ...], int]], space: Range
    ) -> list[tuple[int, int]]:
        limit = _MAX_RANGES[field]
        ranges = [(start, self._vector(bits)) for start, bits in _split(sets, space)]
        if len(ranges) > limit:
            raise PolicyTooLargeError(
                f"{self._where}: the rules tell {len(ranges)} ranges of {field} apart, the limit "
                f"is {limit}; use larger networks or fewer groups"
            )
        return ranges

    def _vector(self, bits: int) -> int:
        """Return the word index of a vector, which is written at its first use."""
        if bits not in self._vectors:
            data = bits.to_bytes(self._blocks * _BLOCK_BYTES, "little")
            words = (int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8))
            self._vectors[bits] = self._image.append(words)
        return self._vectors[bits]


def _split(
    sets: Sequence[tuple[tuple[Range, ...], int]], space: Range
) -> Iterator[tuple[int, int]]:
    """Split a space where sets begin or end: yield each range's first value and its rules' bits.

    Many rules share a set (a group, a service), so the sets are merged before the sweep.
    """
    rules_of: dict[tuple[Range, ...], int] = {}
    for ranges, bit in sets:
        rules_of[ranges] = rules_of.get(ranges, 0) | 1 << bit
    # A rule's ranges are disjoint, so a toggle at both ends of each is enough.
    toggles: dict[int, int] = {space[0]: 0}
    for ranges, bits in rules_of.items():
        for first, last in ranges:
            toggles[first] = toggles.get(first, 0) ^ bits
            toggles[last + 1] = toggles.get(last + 1, 0) ^ bits
    current, previous = 0, None
    for start in sorted(toggles):
        if start > space[1]:
            break
        current ^= toggles[start]
        if current != previous:
            yield start, current
            previous = current


def _merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the ranges sorted and disjoint, neighbours joined."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _addresses(networks: tuple[Network, ...]) -> tuple[Range, ...]:
    """Return networks as ranges of 128-bit numbers, IPv4 mapped into ::ffff:0:0/96.

    An IPv6 network never admits IPv4: ranges that cover the mapped block leave it out.
    """
    ranges: list[Range] = []
    mapped = (_MAPPED_IPV4, _MAPPED_IPV4 | 0xFFFFFFFF)
    for network in networks:
        first, last = int(network.network_address), int(network.broadcast_address)
        if network.version == 4:
            ranges.append((_MAPPED_IPV4 | first, _MAPPED_IPV4 | last))
        elif first <= mapped[0] and last >= mapped[1]:
            ranges += [(first, mapped[0] - 1), (mapped[1] + 1, last)]
        else:
            ranges.append((first, last))
    return _merge(ranges)


def _services(services: tuple[Service, ...]) -> tuple[Range, ...]:
    return _merge(part for service in services for part in _service(service))


def _service(service: Service) -> list[Range]:
    protocol = service.protocol
    if protocol is None:
        ports = [(number << 16, number << 16 | 0xFFFF) for number in PORT_PROTOCOLS]
        echo = [
            (number << 16 | request << 8, number << 16 | request << 8 | 0xFF)
            for number, request in ECHO_REQUEST.items()
        ]
        return ports + echo
    base = protocol << 16
    if service.ports is not None:
        return [(base | service.ports[0], base | service.ports[1])]
    if service.icmp_type is not None:
        first = base | service.icmp_type << 8
        if service.icmp_code is None:
            return [(first, first | 0xFF)]
        return [(first | service.icmp_code, first | service.icmp_code)]
    whole = [(base, base | 0xFFFF)]
    if protocol in ICMP_PROTOCOLS:
        whole.append((_FOREIGN_ICMP | base, _FOREIGN_ICMP | base | 0xFFFF))
    return whole


def _source_ports(rule: EffectiveRule) -> tuple[Range, ...]:
    """Return the source fields a rule admits; only TCP, UDP and SCTP are restricted by them."""
    if not rule.source_ports:
        return (_VALUE_SPACE,)
    ranges: list[Range] = []
    free = 0
    for protocol in sorted(PORT_PROTOCOLS):
        base = protocol << 16
        ranges.append((free, base - 1))
        ranges += [(base | first, base | last) for first, last in rule.source_ports]
        free = base + 0x10000
    return _merge([*ranges, (free, _VALUE_SPACE[1])])
