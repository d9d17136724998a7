# SPDX-License-Identifier: Apache-2.0
"""Verdict table of an interface that learns its addresses: before, during and after a lease."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

from tests.cases.fixtures import ALL_ACCEPTED
from tests.cases.table import (
    DEFAULT,
    Case,
    Fixture,
    Reconfigure,
    Wait,
    accepted,
    dropped,
    into,
    out,
)
from tests.frames import (
    ARP,
    BROADCAST4,
    BROADCAST_MAC,
    ICMPV6,
    IN,
    OTHER_VM4,
    OUT,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    Wire,
    arp,
    bootp,
    ethernet,
    router_solicitation,
    tcp,
    udp,
)
from vgw.abi import Path, Reason
from vgw.policy.model import Interface

LEARNING = Interface("tap-web01", mac="52:54:00:00:00:11", learns=True)
LEASED = replace(LEARNING, addresses=(ip_address(VM4), ip_address(VM6)))
NEW = Fixture("learning", LEARNING, ALL_ACCEPTED)
KNOWN = Fixture("listed", replace(LEASED, learns=False), ALL_ACCEPTED)

SPOOFED, SPOOF_ARP = dropped(Reason.SPOOF_ADDRESS), dropped(Reason.SPOOF_ARP)
ALL = Wire(Path.FROM_VM, remote_mac=BROADCAST_MAC)
ASK = ALL.wrap4(udp(68, 67, bootp()), UDP, local=UNSPECIFIED4, remote=BROADCAST4)
OFFER = IN.wrap4(udp(67, 68, bootp(2)), UDP, remote="10.20.0.1")
CALL, CALL6 = OUT.wrap4(tcp(), TCP), OUT.wrap6(tcp(), TCP)
DHCP = accepted(Reason.DHCP)


def _probe(address: str) -> bytes:
    return ethernet(arp(1, sender=UNSPECIFIED4, target=address), ARP)


def _cases() -> Iterator[Case]:
    yield Case(
        "F1 a VM without a lease has no address", NEW, (out(CALL, SPOOFED), out(CALL6, SPOOFED))
    )
    yield Case("F21 it may ask for one", NEW, (out(ASK, DHCP), into(OFFER, DHCP)))
    announced = ethernet(arp(1, sender=VM4, target=VM4), ARP)
    yield Case("F5 it may not announce one", NEW, (out(announced, SPOOF_ARP),))
    yield Case(
        "F5 it probes what it is offered, while it is",
        NEW,
        (
            out(_probe(VM4), SPOOF_ARP),
            out(ASK, DHCP),
            out(_probe(VM4), accepted(Reason.ARP)),
            out(announced, SPOOF_ARP),
            Wait(62),
            out(_probe(VM4), SPOOF_ARP),
        ),
    )
    yield Case(
        "F5 one that lists its addresses probes those only",
        KNOWN,
        (out(ASK, DHCP), out(_probe(OTHER_VM4), SPOOF_ARP), out(_probe(VM4), accepted(Reason.ARP))),
    )
    ask6 = OUT.wrap6(udp(546, 547), UDP, local=VM_LINK_LOCAL, remote="ff02::1:2")
    routers = OUT.wrap6(
        router_solicitation(), ICMPV6, local=VM_LINK_LOCAL, remote="ff02::2", hop_limit=255
    )
    yield Case(
        "F21 its link-local address is its own",
        NEW,
        (out(ask6, DHCP), out(routers, accepted(Reason.ND))),
    )
    yield Case(
        "F1 a lease gives it the leased addresses and no others",
        NEW,
        (
            out(CALL, SPOOFED),
            Reconfigure(LEASED),
            out(CALL, DEFAULT),
            out(CALL6, DEFAULT),
            out(OUT.wrap4(tcp(), TCP, local=OTHER_VM4), SPOOFED),
            Reconfigure(LEARNING),
            out(CALL, SPOOFED),
        ),
    )


CASES: tuple[Case, ...] = tuple(_cases())
