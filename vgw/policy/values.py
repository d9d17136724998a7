# SPDX-License-Identifier: Apache-2.0
"""The single values of a policy file: text in, value out, ValueError with an explanation.

Every converter takes a scalar's text as written, so a value does not depend on how YAML would have
read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeVar

from vgw.policy.model import Address, Network
from vgw.policy.yaml_nodes import show

T = TypeVar("T")

#: The word for "whatever": a peer or a service, so no name of a group or service.
ANY: Final = "any"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_DOTTED_DIGITS: Final = re.compile(r"[0-9]+(?:\.[0-9]*)+")
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}[smhd])+")
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_INTERFACE: Final = re.compile(r"[!-.0-9;-~]{1,15}")
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_BROADCAST: Final = IPv4Address("255.255.255.255")
_MAX_COMMENT: Final = 256


def name(text: str) -> str:
    """Check a name of a VM, group, service, policy or rule."""
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{show(text)} is not a name; names are 1 to 63 of A-Z a-z 0-9 . _ - "
            "and begin with a letter or digit"
        )
    return text


def group_name(text: str) -> str:
    """Check a name of a group: a name that cannot be taken for an address or for `any`."""
    if text == ANY or looks_like_network(text):
        raise ValueError(
            f"{show(text)} cannot name a group: in `from` and `to` it is an address or `any`"
        )
    return name(text)


def label(text: str) -> str:
    """Check the key or the value of a label."""
    if not _LABEL.fullmatch(text):
        raise ValueError(
            f"{show(text)} is not a label; keys and values are 1 to 63 of A-Z a-z 0-9 . _ - / "
            "and begin with a letter or digit"
        )
    return text


def comment(text: str) -> str:
    """Check a comment: one printable line, because it goes into logs and tables."""
    if len(text) > _MAX_COMMENT or not text.isprintable():
        raise ValueError(f"a comment is one line of at most {_MAX_COMMENT} printable characters")
    return text


def boolean(text: str) -> bool:
    """Convert `true` or `false`."""
    if text not in ("true", "false"):
        raise ValueError(f"{show(text)} is not a boolean; write true or false")
    return text == "true"


def duration(text: str, *, lowest: int, highest: int) -> int:
    """Read a time such as 30s, 5m or 2h4m and return its seconds; the limits are in seconds."""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{show(text)} is not a time; write it as 30s, 5m, 2h or 2h4m")
    parts = re.findall(r"([0-9]+)([smhd])", text)
    seconds = sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    if not lowest <= seconds <= highest:
        raise ValueError(f"{show(text)} is out of range; it must be from {lowest}s to {highest}s")
    return seconds


def integer(text: str, lowest: int, highest: int, what: str = "a number") -> int:
    """Convert a decimal number within limits."""
    if not _NUMBER.fullmatch(text) or not lowest <= int(text) <= highest:
        raise ValueError(f"{show(text)} is not {what} from {lowest} to {highest} in decimal")
    return int(text)


def choice(choices: Mapping[str, T]) -> Callable[[str], T]:
    """Return a converter that looks a word up."""

    def convert(text: str) -> T:
        if text not in choices:
            raise ValueError(f"{show(text)} is not possible; write {words(choices)}")
        return choices[text]

    return convert


def words(names: Mapping[str, object] | tuple[str, ...]) -> str:
    """Return `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def interface_name(text: str) -> str:
    """Check a network interface's name by the kernel's rules, printable ASCII only."""
    if text in (".", "..") or not _INTERFACE.fullmatch(text):
        raise ValueError(
            f"{show(text)} is not an interface name; these are 1 to 15 printable ASCII "
            "characters without spaces, '/' and ':'"
        )
    return text


def mac(text: str) -> str:
    """Convert a unicast MAC address to lower case."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"{show(text)} is not a MAC address such as 52:54:00:00:00:11")
    if int(text[:2], 16) & 1:
        raise ValueError(f"{show(text)} is a multicast MAC address; a VM needs a unicast one")
    if not text.strip("0:"):
        raise ValueError("the MAC address is zero; a VM needs a real one")
    return text.lower()


def address(text: str) -> Address:
    """Convert an address that an interface can have."""
    if "/" in text:
        raise ValueError(f"{show(text)} is a CIDR; write one address, without the prefix length")
    value = _parse_address(text)
    _check_usable(value, text)
    return value


def pair_network(text: str) -> Network:
    """Convert the address or CIDR of an allowed pair."""
    value = network(text)
    if value.prefixlen == 0:
        raise ValueError(
            f"{show(text)} allows every address; say `guards: {{address: false}}` instead"
        )
    _check_usable(value.network_address, text)
    _check_usable(value.broadcast_address, text)
    return value


@lru_cache(maxsize=4096)
def network(text: str) -> Network:
    """Convert a CIDR, or an address to the network of this host alone."""
    head, slash, length = text.partition("/")
    base = _parse_address(head, text)
    # From numbers, because ipaddress would write the address down and parse it again.
    number, highest = int(base), base.max_prefixlen
    make = IPv4Network if isinstance(base, IPv4Address) else IPv6Network
    if not slash:
        return make(number)
    if not _NUMBER.fullmatch(length) or int(length) > highest:
        raise ValueError(
            f"{show(text)} has no valid prefix length; IPv{base.version} has /0 to /{highest}"
        )
    value = make((number, int(length)), strict=False)
    if value.network_address != base:
        raise ValueError(
            f"{show(text)} has host bits set; the network is {value}, the address {base}/{highest}"
        )
    return value


def looks_like_network(text: str) -> bool:
    """Tell whether a peer is meant as an address or CIDR, right or wrong, rather than a name."""
    return ":" in text or "/" in text or _DOTTED_DIGITS.fullmatch(text) is not None


def peer(text: str) -> str | Network:
    """Convert an entry of `from` or `to`: `any` or a group's name stay text."""
    return network(text) if looks_like_network(text) else name(text)


def _parse_address(text: str, whole: str = "") -> Address:
    value: Address
    try:
        value = IPv6Address(text) if ":" in text else IPv4Address(text)
    except ValueError:
        raise ValueError(
            f"{show(whole or text)} is not an address or CIDR such as 10.0.0.1, 10.0.0.0/8 or "
            "2001:db8::/32"
        ) from None
    if isinstance(value, IPv6Address):
        if value.scope_id is not None:
            raise ValueError(f"{show(whole or text)} has a zone; leave out the part from '%' on")
        if value in _MAPPED:
            raise ValueError(f"{show(whole or text)} is IPv4 written as IPv6; write it as IPv4")
    return value


def _check_usable(value: Address, text: str) -> None:
    """Refuse addresses that no VM can have as its own."""
    if value.is_multicast:
        kind = "multicast"
    elif value.is_unspecified:
        kind = "the unspecified address"
    elif value.is_loopback:
        kind = "loopback"
    elif value == _BROADCAST:
        kind = "broadcast"
    else:
        return
    raise ValueError(f"{show(text)} is {kind}; a VM's own addresses are unicast")
