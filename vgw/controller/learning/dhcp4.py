# SPDX-License-Identifier: Apache-2.0
"""DHCPv4 (RFC 2131, 2132): what a server's acknowledgement leases to a client."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from vgw.controller.learning.lease import NotALeaseError, Offer, usable
from vgw.controller.learning.wire import Datagram, Reader

PORTS: Final = (67, 68)

_REPLY: Final = 2
_ETHERNET: Final = 1
_MAC_LENGTH: Final = 6
_COOKIE: Final = bytes.fromhex("63825363")
_ACK: Final = 5
_PAD, _LEASE_TIME, _OVERLOAD, _MESSAGE_TYPE, _SERVER, _END = 0, 51, 52, 53, 54, 255
#: Bits of the overload option: which fields hold options as well (RFC 2132, 9.3).
_IN_FILE, _IN_NAME = 1, 2


def read_ack(datagram: Datagram, mac: bytes) -> Offer:
    """Return what an acknowledgement leases to the client that has a MAC.

    The client hardware address in the message has to be that MAC; whom the frame goes to does not
    count, for servers also broadcast. Raises NotALeaseError for every other message.
    """
    reader = Reader(datagram.message)
    operation, hardware, length = reader.number(1), reader.number(1), reader.number(1)
    reader.take(1 + 4 + 2 + 2 + 4)  # hops, transaction, seconds, flags, the client's own address
    address = IPv4Address(reader.take(4))
    reader.take(4 + 4)  # next server, relay
    client = reader.take(16)
    name, file = reader.take(64), reader.take(128)
    if operation != _REPLY or (hardware, length) != (_ETHERNET, _MAC_LENGTH):
        raise NotALeaseError("no reply to an Ethernet client")
    if client[:_MAC_LENGTH] != mac:
        raise NotALeaseError(f"it is for {client[:_MAC_LENGTH].hex(':')}")
    if reader.take(len(_COOKIE)) != _COOKIE:
        raise NotALeaseError("BOOTP without DHCP options")
    options = _all_options(reader.rest(reader.left), name, file)
    if options.get(_MESSAGE_TYPE) != bytes([_ACK]):
        raise NotALeaseError("no acknowledgement")
    seconds = options.get(_LEASE_TIME, b"")
    if len(seconds) != 4 or not any(seconds):
        raise NotALeaseError("no lease time")
    if not usable(address):
        raise NotALeaseError(f"{address} is no host's address")
    server = options.get(_SERVER, b"")
    named = IPv4Address(server) if len(server) == 4 else datagram.source
    return Offer(address, int.from_bytes(seconds, "big"), named)


def _all_options(field: bytes, name: bytes, file: bytes) -> dict[int, bytes]:
    """Return the options of a message; one that comes again goes on (RFC 3396)."""
    options: dict[int, bytes] = {}
    _join(options, field)
    overload = options.get(_OVERLOAD, b"\0")[0] if options.get(_OVERLOAD) else 0
    if overload & _IN_FILE:
        _join(options, file)
    if overload & _IN_NAME:
        _join(options, name)
    return options


def _join(options: dict[int, bytes], field: bytes) -> None:
    for code, value in _options(field):
        options[code] = options.get(code, b"") + value


def _options(field: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield code and value of each whole option; the last may be cut off with its frame."""
    reader = Reader(field)
    while reader.left:
        code = reader.number(1)
        if code == _END:
            return
        if code == _PAD:
            continue
        if not reader.left:
            return
        length = reader.number(1)
        if length > reader.left:
            return
        yield code, reader.take(length)
