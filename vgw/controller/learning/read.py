# SPDX-License-Identifier: Apache-2.0
"""A frame that a packet program took for a lease, to the addresses that it leases."""

from __future__ import annotations

from vgw.controller.learning import dhcp4, dhcp6
from vgw.controller.learning.lease import NotALeaseError, Offer
from vgw.controller.learning.wire import read_datagram
from vgw.policy.model import Address


def read_lease(frame: bytes, mac: bytes) -> tuple[list[Offer], Address]:
    """Return what a frame leases to the guest that has a MAC, and the address that it went to.

    `frame` may lack its end. Raises NotALeaseError where it leases nothing to that guest, and
    nothing else, whatever the bytes.
    """
    datagram = read_datagram(frame)
    if datagram.ports == dhcp4.PORTS and datagram.source.version == 4:
        return [dhcp4.read_ack(datagram, mac)], datagram.destination
    if datagram.ports == dhcp6.PORTS and datagram.source.version == 6:
        return dhcp6.read_reply(datagram, mac), datagram.destination
    raise NotALeaseError(f"UDP ports {datagram.ports[0]} and {datagram.ports[1]}")
