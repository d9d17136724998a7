# SPDX-License-Identifier: Apache-2.0
"""Verdict table of layer 2: Ethernet, tags, LLC, EtherTypes, and headers cut right behind it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import OPEN, TRUNK
from tests.cases.table import DEFAULT, Case, Rows, accepted, dropped
from tests.frames import (
    ALL_NODES6,
    ARP,
    ICMPV6,
    IN,
    IPV4,
    IPV6,
    OUT,
    RARP,
    TCP,
    UDP,
    UNSPECIFIED4,
    VLAN,
    VM4,
    VM_LINK_LOCAL,
    VM_MAC,
    arp,
    ethernet,
    router_advertisement,
    tagged,
    tcp,
    udp,
)
from vgw.abi import Reason

ROWS, ON_TRUNK = Rows(OPEN), Rows(TRUNK)
SYN_OUT = OUT.wrap4(tcp(), TCP)
SYN_IN = IN.wrap4(tcp(), TCP)
OTHER_ETHERTYPES = {
    "B7 experimental": 0x88B5,
    "B7 unassigned": 0xABCD,
    "B7 last": 0xFFFF,
    "B7 first": 0x0600,
    "B7 PPPoE discovery": 0x8863,
    "B7 PPPoE session": 0x8864,
    "B7 MPLS": 0x8847,
    "B7 MACsec": 0x88E5,
    "B7 EAPOL": 0x888E,
    "B7 LLDP": 0x88CC,
    "B7 LACP": 0x8809,
    "B7 PTP": 0x88F7,
    "B7 RSN": 0x893F,
    "B7 TRILL": 0x22F3,
    "B13 wake on LAN": 0x0842,
    "B13 AoE": 0x88A2,
    "B13 FCoE": 0x8906,
    "B13 FIP": 0x8914,
    "B13 RoCE": 0x8915,
}
SNAP = bytes.fromhex("aaaa03000000")


def _short() -> Iterator[Case]:
    for size in (0, 1, 6, 12, 13):
        yield ROWS.out(f"A1 frame of {size} bytes", SYN_OUT[:size], dropped(Reason.TRUNCATED))
        yield ROWS.into(f"A1 frame of {size} bytes", SYN_IN[:size], dropped(Reason.TRUNCATED))
    for name, ethertype in (("IPv4", IPV4), ("IPv6", IPV6), ("ARP", ARP), ("RARP", RARP)):
        yield from ROWS.both(
            f"A2 Ethernet header only, {name}",
            lambda wire, ethertype=ethertype: wire.frame(b"", ethertype),  # type: ignore[misc]
            dropped(Reason.TRUNCATED),
        )
    request = ethernet(arp(1, VM4, "10.20.0.1"), ARP)
    for size in range(1, 28):
        frame = request[: 14 + size]
        yield ROWS.out(f"A5 ARP cut at {size}", frame, dropped(Reason.TRUNCATED))
    yield ROWS.out("A5 ARP with padding", request + bytes(18), accepted(Reason.ARP))
    reverse = ethernet(arp(3, UNSPECIFIED4, UNSPECIFIED4, target_mac=VM_MAC), RARP)
    yield ROWS.out("A5 RARP cut at 27", reverse[:-1], dropped(Reason.TRUNCATED))


def _llc() -> Iterator[Case]:
    for length in (0, 3, 46, 1500, 0x05FF):
        frame = ethernet(bytes.fromhex("424203") + bytes(46), length)
        yield ROWS.out(f"B5 802.3 length {length}", frame, dropped(Reason.LLC))
    for name, ethertype in (("IPv4", IPV4), ("ARP", ARP), ("IPv6", IPV6)):
        content = SNAP + ethertype.to_bytes(2, "big") + SYN_OUT[14:]
        frame = ethernet(content, len(content))
        yield ROWS.out(f"B5 SNAP with {name}", frame, dropped(Reason.LLC))
        yield ROWS.into(f"B5 SNAP with {name}", frame, dropped(Reason.LLC))
        yield ON_TRUNK.out(
            f"B6 tag, then SNAP with {name}", tagged(frame, 100), dropped(Reason.LLC)
        )
    yield from _hidden_advertisements()
    bridge = bytes.fromhex("0180c2000000")
    frame = ethernet(bytes.fromhex("4242030000000000"), 8, destination=bridge)
    yield ROWS.out("B8 BPDU", frame, dropped(Reason.LLC))
    lldp = ethernet(bytes(46), 0x88CC, destination=bytes.fromhex("0180c200000e"))
    yield ROWS.out("B8 LLDP", lldp, dropped(Reason.ETHERTYPE))


def _hidden_advertisements() -> Iterator[Case]:
    """Router advertisements where a guard that reads only the EtherType does not look."""
    plain = OUT.wrap6(
        router_advertisement(), ICMPV6, local=VM_LINK_LOCAL, remote=ALL_NODES6, hop_limit=255
    )
    packet = SNAP + IPV6.to_bytes(2, "big") + plain[14:]
    snap = ethernet(packet, len(packet), destination=plain[:6])
    long_snap = ethernet(packet, 0x05FF, destination=plain[:6])
    for rows, port in ((ROWS, "untagged port"), (ON_TRUNK, "trunk")):
        tag, llc = dropped(Reason.VLAN), dropped(Reason.LLC)
        yield rows.out(f"F15 RA in a priority tag, {port}", tagged(plain, 0), tag)
        yield rows.out(f"F15 RA in two priority tags, {port}", tagged(tagged(plain, 0), 0), tag)
        twice = tagged(tagged(plain, 0), 0, 0x88A8)
        yield rows.out(f"F15 RA in 802.1ad around a priority tag, {port}", twice, tag)
        yield rows.out(f"F15 RA in SNAP, {port}", snap, llc)
        yield rows.out(f"F15 RA in SNAP with a wrong length, {port}", long_snap, llc)
        yield rows.out(f"F15 RA in SNAP in a priority tag, {port}", tagged(snap, 0), tag)
    refused = dropped(Reason.ROUTER_ADVERTISEMENT)
    yield ON_TRUNK.out("F15 RA in a tag of its own", tagged(plain, 100), refused)
    yield ON_TRUNK.out("F15 RA in SNAP in such a tag", tagged(snap, 100), dropped(Reason.LLC))


def _tags() -> Iterator[Case]:
    invalid = dropped(Reason.VLAN)
    for vlan in (1, 5, 100, 4095):
        yield ROWS.out(f"B1 tag {vlan} on an untagged port", tagged(SYN_OUT, vlan), invalid)
        yield ROWS.into(f"B1 tag {vlan} on an untagged port", tagged(SYN_IN, vlan), invalid)
    for rows, port in ((ROWS, "untagged port"), (ON_TRUNK, "trunk")):
        once = tagged(SYN_OUT, 0xE000)
        yield rows.out(f"B2 priority tag, {port}", once, invalid)
        yield rows.out(f"B2 two priority tags, {port}", tagged(once, 0), invalid)
        yield rows.out(f"B2 three priority tags, {port}", tagged(tagged(once, 0), 0), invalid)
        request = tagged(ethernet(arp(1, VM4, "10.20.0.1"), ARP), 0)
        yield rows.out(f"B2 priority tag with ARP, {port}", request, invalid)
        for tpid in (0x88A8, 0x9100):
            yield rows.out(f"B3 tag {tpid:04x}, {port}", tagged(SYN_OUT, 100, tpid), invalid)
            twice = tagged(tagged(SYN_OUT, 100), 100, tpid)
            yield rows.out(f"B3 tag {tpid:04x} around 8100, {port}", twice, invalid)
            inside = tagged(tagged(SYN_OUT, 100, tpid), 100)
            yield rows.out(f"B3 tag {tpid:04x} inside 8100, {port}", inside, invalid)
        four = SYN_OUT
        for _ in range(4):
            four = tagged(four, 100)
        yield rows.out(f"B3 four tags, {port}", four, invalid)
        yield rows.into(f"B3 two tags, {port}", tagged(tagged(SYN_IN, 100), 100), invalid)
    for size in range(4):
        cut = bytes.fromhex("00640800")[:size]
        yield ON_TRUNK.out(f"B1 tag cut at {size}", ethernet(cut, VLAN), dropped(Reason.TRUNCATED))
        for tpid in (0x88A8, 0x9100):  # which tag it is says enough, whatever is missing of it
            for rows, port in ((ROWS, "untagged port"), (ON_TRUNK, "trunk")):
                yield from rows.both(
                    f"B3 tag {tpid:04x} cut at {size}, {port}",
                    lambda wire, c=cut, t=tpid: wire.frame(c, t),  # type: ignore[misc]
                    invalid,
                )


def _trunk() -> Iterator[Case]:
    invalid = dropped(Reason.VLAN)
    yield ON_TRUNK.out("B1 no tag on a trunk", SYN_OUT, DEFAULT)
    for vlan in (100, 4094):
        yield ON_TRUNK.out(f"B1 tag {vlan} on a trunk", tagged(SYN_OUT, vlan), DEFAULT)
        yield ON_TRUNK.into(f"B1 tag {vlan} on a trunk", tagged(SYN_IN, vlan), DEFAULT)
    yield ON_TRUNK.out("B1 tag with priority bits", tagged(SYN_OUT, 0xF000 | 100), DEFAULT)
    yield ON_TRUNK.out("B1 tag 101 on a trunk", tagged(SYN_OUT, 101), invalid)
    request = tagged(ethernet(arp(1, VM4, "10.20.0.1"), ARP), 100)
    yield ON_TRUNK.out("B1 ARP in a tag", request, accepted(Reason.ARP))
    yield ON_TRUNK.out("B1 ARP in a foreign tag", tagged(request[:12] + request[16:], 7), invalid)
    beyond = tagged(ethernet(bytes(46), 0x88B5), 100)
    yield ON_TRUNK.out("B7 EtherType in a tag", beyond, dropped(Reason.ETHERTYPE))
    unreadable = tagged(ethernet(b"\x45", IPV4), 7)
    yield ON_TRUNK.out("B1 unreadable in a foreign tag", unreadable, dropped(Reason.TRUNCATED))
    yield ON_TRUNK.into("B4 tag beside the bytes", SYN_IN, DEFAULT, vlan_tag=100)
    yield ON_TRUNK.into("B4 foreign tag beside the bytes", SYN_IN, invalid, vlan_tag=7)
    yield ON_TRUNK.into("B4 priority tag beside the bytes", SYN_IN, invalid, vlan_tag=0)
    yield ON_TRUNK.into("B4 tag beside and within", tagged(SYN_IN, 100), invalid, vlan_tag=100)
    yield ROWS.into("B4 tag beside, untagged port", SYN_IN, invalid, vlan_tag=100)


def _ethertypes() -> Iterator[Case]:
    for name, ethertype in OTHER_ETHERTYPES.items():
        yield from ROWS.both(
            f"{name} ({ethertype:04x})",
            lambda wire, ethertype=ethertype: wire.frame(bytes(46), ethertype),  # type: ignore[misc]
            dropped(Reason.ETHERTYPE),
        )
    reverse = arp(3, UNSPECIFIED4, UNSPECIFIED4, target_mac=VM_MAC)
    yield ROWS.into("B12 RARP", IN.frame(reverse, RARP), dropped(Reason.ETHERTYPE))
    yield ROWS.out("A6 UDP without payload", OUT.wrap4(udp(), UDP), DEFAULT)


CASES: tuple[Case, ...] = (*_short(), *_llc(), *_tags(), *_trunk(), *_ethertypes())
