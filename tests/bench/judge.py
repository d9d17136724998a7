# SPDX-License-Identifier: Apache-2.0
"""Verdicts on headers: by vgw's reference evaluator, and by the text of nftables rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Literal

from bench.headers import Header
from vgw.abi import Action, Path
from vgw.policy.evaluate import Opening, _first_match
from vgw.policy.model import ICMP_PROTOCOLS, Address, EffectiveRule

NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}
#: A packet as nftables sees it: field -> value.
Fields = dict[str, Address | int]


def opening(header: Header) -> Opening:
    icmp = None
    ports = header.sport, header.dport
    if header.protocol in ICMP_PROTOCOLS:
        icmp, ports = (header.dport >> 8, header.dport & 255), (0, 0)
    return Opening(
        Path.TO_VM,
        address(header, header.local),
        address(header, header.remote),
        header.protocol,
        *ports,
        icmp,
    )


def address(header: Header, value: int) -> Address:
    return IPv4Address(value) if header.version == 4 else IPv6Address(value)


def verdict_of_rules(rules: tuple[EffectiveRule, ...], header: Header) -> bool:
    """Tell whether vgw's reference accepts a header by rules, without any default."""
    rule = _first_match(rules, opening(header))
    return rule is not None and rule.action is Action.ACCEPT


def matches(rule: EffectiveRule, header: Header, field: Literal["peers", "local"]) -> bool:
    networks, value = (
        (rule.peers, header.remote) if field == "peers" else (rule.local, header.local)
    )
    where = address(header, value)
    return any(where.version == n.version and where in n for n in networks)


def verdict_of_nft(text: str, header: Header) -> bool:
    """Tell whether the chain `to_vm` of an nftables text accepts a header."""
    maps = dict(re.findall(r"map (\w+) \{.*?elements = \{(.*?)\}", text, re.DOTALL))
    (chain,) = re.findall(r"chain to_vm \{\n(.*?)\n\t\}", text, re.DOTALL)
    packet = fields(header)
    for line in chain.splitlines():
        verdict = _verdict(line.split(), packet, maps)
        if verdict is not None:
            return verdict == "accept"
    raise AssertionError("the chain does not end with a verdict")


def fields(header: Header) -> Fields:
    return {
        "saddr": address(header, header.remote),
        "daddr": address(header, header.local),
        "l4proto": header.protocol,
        "sport": header.sport,
        "dport": header.dport,
    }


def _verdict(words: list[str], packet: Fields, maps: dict[str, str]) -> str | None:
    if "vmap" in words:
        names = [word for word in words[: words.index("vmap")] if word in packet]
        return _in_map(maps[words[-1].removeprefix("@")], [packet[name] for name in names])
    *pairs, verdict = words
    for family, field, value in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        if family in NUMBERS and packet["l4proto"] != NUMBERS[family]:
            return None
        if not _fits(packet[field], value):
            return None
    return verdict


def _in_map(elements: str, key: Iterable[Address | int]) -> str | None:
    wanted = list(key)
    for element in elements.split(","):
        text, _, verdict = element.rpartition(" : ")
        values = text.split(" . ")
        if all(_fits(one, value) for one, value in zip(wanted, values, strict=True)):
            return verdict.strip()
    return None


def _fits(value: Address | int, text: str) -> bool:
    text = text.strip()
    if not isinstance(value, int):
        return value in ip_network(text)
    if text in NUMBERS:
        return value == NUMBERS[text]
    first, _, last = text.partition("-")
    return int(first) <= value <= int(last or first)
