# SPDX-License-Identifier: Apache-2.0
"""DHCPv6 (RFC 8415): what a server's reply leases to a client."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv6Address
from typing import Final

from vgw.controller.learning.lease import NotALeaseError, Offer, usable
from vgw.controller.learning.wire import Datagram, Reader
from vgw.policy.model import Address

PORTS: Final = (547, 546)

_REPLY: Final = 7
_IA_NA, _IA_ADDRESS, _STATUS = 3, 5, 13
_SUCCESS: Final = 0


def read_reply(datagram: Datagram, mac: bytes) -> list[Offer]:
    """Return the addresses that a reply leases to the client that has a MAC.

    The message names its client by a DUID that nobody else can check, so it has to go to the
    client's MAC and to a link-local address; whether that is the client's own is the caller's to
    say. Only addresses of identity associations count (IA_NA); prefixes and temporary addresses do
    not, nor one of which the server says that something is wrong. Raises NotALeaseError for every
    other message.
    """
    if datagram.destination_mac != mac or not datagram.destination.is_link_local:
        raise NotALeaseError(f"it goes to {datagram.destination}")
    reader = Reader(datagram.message)
    if reader.number(1) != _REPLY:
        raise NotALeaseError("no reply")
    reader.take(3)  # transaction
    top = list(_options(reader))
    if _failed(top):
        raise NotALeaseError("the server says that it failed")
    offers = [
        offer
        for code, value in top
        if code == _IA_NA
        for offer in _association(value, datagram.source)
    ]
    if not offers:
        raise NotALeaseError("no address")
    return offers


def _association(value: bytes, server: Address) -> Iterator[Offer]:
    reader = Reader(value)
    if reader.left < 12:
        return
    reader.take(12)  # its identity, and when to ask again
    options = list(_options(reader))
    if _failed(options):
        return
    for code, inner in options:
        if code == _IA_ADDRESS and len(inner) >= 24:
            fields = Reader(inner)
            address = IPv6Address(fields.take(16))
            fields.take(4)  # how long it is preferred
            seconds = fields.number(4)
            if seconds and usable(address) and not _failed(list(_options(fields))):
                yield Offer(address, seconds, server)


def _failed(options: list[tuple[int, bytes]]) -> bool:
    return any(
        code == _STATUS and int.from_bytes(value[:2], "big") != _SUCCESS for code, value in options
    )


def _options(reader: Reader) -> Iterator[tuple[int, bytes]]:
    """Yield code and value of each whole option; the last may be cut off with its frame."""
    while reader.left >= 4:
        code, length = reader.number(2), reader.number(2)
        if length > reader.left:
            return
        yield code, reader.take(length)
