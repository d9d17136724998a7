# SPDX-License-Identifier: Apache-2.0
"""Bytes of a frame taken off from the front, each length checked before it is believed."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from vgw.controller.learning.lease import NotALeaseError
from vgw.policy.model import UDP, Address

_VLAN: Final = 0x8100
_IPV4, _IPV6 = 0x0800, 0x86DD
_UDP_HEADER: Final = 8


class Datagram(NamedTuple):
    """A UDP datagram: whom its frame and its packet go to, its ports, and what of it is there.

    `message` is as long as the datagram, or shorter where the frame was captured in part.
    """

    destination_mac: bytes
    source: Address
    destination: Address
    ports: tuple[int, int]
    message: bytes


class Reader:
    """Takes bytes off; raises NotALeaseError where there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.left:
            raise NotALeaseError(f"{count} bytes are wanted where {self.left} are left")
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def number(self, count: int) -> int:
        """Return the number in the next bytes, in wire order."""
        return int.from_bytes(self.take(count), "big")

    def rest(self, count: int) -> bytes:
        """Return the next bytes, fewer where there are fewer."""
        return self.take(min(count, self.left))


def read_datagram(frame: bytes) -> Datagram:
    """Return the UDP datagram of an Ethernet frame, of which the end may be missing.

    The packet programs let no other form through to a VM that learns: no options, no extension
    headers, no fragments, one tag. Raises NotALeaseError.
    """
    reader = Reader(frame)
    destination_mac = reader.take(6)
    reader.take(6)
    ethertype = reader.number(2)
    if ethertype == _VLAN:
        reader.take(2)
        ethertype = reader.number(2)
    if ethertype == _IPV4:
        source, destination, length = _read_ipv4(reader)
    elif ethertype == _IPV6:
        source, destination, length = _read_ipv6(reader)
    else:
        raise NotALeaseError(f"EtherType 0x{ethertype:04x}")
    ports = reader.number(2), reader.number(2)
    udp_length = reader.number(2)
    reader.take(2)  # the checksum: the kernel may not have filled it in yet
    if not _UDP_HEADER <= udp_length <= length:
        raise NotALeaseError(f"a UDP length of {udp_length} in {length} bytes")
    return Datagram(
        destination_mac, source, destination, ports, reader.rest(udp_length - _UDP_HEADER)
    )


def _read_ipv4(reader: Reader) -> tuple[Address, Address, int]:
    """Return source, destination and length of the payload."""
    version_and_length = reader.number(1)
    reader.take(1)
    total = reader.number(2)
    reader.take(2)
    fragment = reader.number(2)
    reader.take(1)
    protocol = reader.number(1)
    reader.take(2)
    source, destination = IPv4Address(reader.take(4)), IPv4Address(reader.take(4))
    if version_and_length != 0x45 or protocol != UDP or fragment & 0x3FFF or total < 20:
        raise NotALeaseError("no whole UDP datagram over IPv4 without options")
    return source, destination, total - 20


def _read_ipv6(reader: Reader) -> tuple[Address, Address, int]:
    """Return source, destination and length of the payload."""
    version = reader.number(4) >> 28
    length, protocol = reader.number(2), reader.number(1)
    reader.take(1)
    source, destination = IPv6Address(reader.take(16)), IPv6Address(reader.take(16))
    if version != 6 or protocol != UDP:
        raise NotALeaseError("no UDP datagram over IPv6 without extension headers")
    return source, destination, length
