# SPDX-License-Identifier: Apache-2.0
"""What a DHCP server told a VM about one address, as the readers of both protocols give it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Final

from vgw.policy.model import Address

#: Lease times of this many seconds never end (RFC 2131, 3.3; RFC 8415, 7.7).
INFINITE: Final = 0xFFFFFFFF

_THIS_NETWORK: Final = IPv4Network("0.0.0.0/8")
#: What IPv6 hosts have: global unicast and unique local addresses. Addresses that stand for IPv4
#: ones are not among them.
_IPV6_HOSTS: Final = (IPv6Network("2000::/3"), IPv6Network("fc00::/7"))


@dataclass(frozen=True, slots=True)
class Offer:
    """An address that a server leases for some seconds; `server` is whom it came from."""

    address: Address
    seconds: int
    server: Address


class NotALeaseError(Exception):
    """A frame that leases nothing: no DHCP message, one of another kind, or a wrong one."""


def usable(address: Address) -> bool:
    """Tell whether an address can be one host's own, seen from other hosts."""
    if not isinstance(address, IPv4Address):
        return any(address in network for network in _IPV6_HOSTS)
    return address not in _THIS_NETWORK and not (
        address.is_multicast or address.is_loopback or address.is_link_local or address.is_reserved
    )
