# SPDX-License-Identifier: Apache-2.0
"""Verdict table of the guards: MAC and address spoofing, ARP, RARP, neighbour discovery."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cases.fixtures import CLOSED, NAMELESS_OPEN, NO_MAC_OPEN, OPEN, UNGUARDED_OPEN
from tests.cases.table import DEFAULT, Case, Expected, Rows, accepted, dropped
from tests.frames import (
    ARP,
    BROADCAST4,
    BROADCAST_MAC,
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    ICMP,
    ICMPV6,
    IN,
    IPV4,
    IPV6,
    MULTICAST_MAC,
    OTHER_VM4,
    OTHER_VM6,
    OTHER_VM_MAC,
    OUT,
    PAIR4,
    PAIR_MAC,
    PEER4,
    PEER6,
    RARP,
    TCP,
    UDP,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    VM_MAC,
    Wire,
    advertisement,
    arp,
    echo,
    ethernet,
    ipv6,
    link_layer,
    router_advertisement,
    router_solicitation,
    solicitation,
    tcp,
    udp,
)
from vgw.abi import Path, Reason

ROWS, UNGUARDED, NAMELESS = Rows(OPEN), Rows(UNGUARDED_OPEN), Rows(NAMELESS_OPEN)
CLOSED_ROWS, NO_MAC = Rows(CLOSED), Rows(NO_MAC_OPEN)
PAIR = Wire(Path.FROM_VM, PAIR_MAC)
SPOOF_MAC, SPOOF_ADDRESS = dropped(Reason.SPOOF_MAC), dropped(Reason.SPOOF_ADDRESS)
SPOOF_ARP, SPOOF_ND = dropped(Reason.SPOOF_ARP), dropped(Reason.SPOOF_ND)
ND_INVALID, ND = dropped(Reason.ND_INVALID), accepted(Reason.ND)
RA_REFUSED = dropped(Reason.ROUTER_ADVERTISEMENT)
SOLICITED_NODE = "ff02::1:ff00:11"

FOREIGN_MACS = {
    "B9 another": bytes.fromhex("525400000099"),
    "B9 zero": bytes(6),
    "B9 broadcast": BROADCAST_MAC,
    "B9 multicast": bytes.fromhex("535400000011"),
    "B9 one bit off": bytes.fromhex("525400000010"),
    "B10 the gateway's": GATEWAY_MAC,
    "B10 another VM's": OTHER_VM_MAC,
}
FOREIGN_IPV4 = {
    "C12 unspecified": UNSPECIFIED4,
    "C12 loopback": "127.0.0.1",
    "C12 link-local": "169.254.0.1",
    "C12 multicast": "224.0.0.1",
    "C12 reserved": "240.0.0.1",
    "C12 broadcast": "255.255.255.255",
    "C12 land": "192.0.2.10",
    "F1 another VM": OTHER_VM4,
    "F1 the gateway": GATEWAY4,
    "F1 the next address": "10.20.0.10",
    "F1 below a pair's range": "10.20.0.199",
    "F1 above a pair's range": "10.20.0.204",
    "F23 a pair's address with the own MAC": PAIR4,
}
FOREIGN_IPV6 = {
    "E21 unspecified": "::",
    "E21 loopback": "::1",
    "E21 multicast": "ff02::1",
    "E21 documentation": "2001:db8::1",
    "E21 site-local": "fec0::1",
    "E21 IPv4-compatible own address": "::10.20.0.11",
    "F1 another VM over IPv6": OTHER_VM6,
    "F10 a foreign link-local": "fe80::1",
    "F10 link-local of another VM": "fe80::5054:ff:fe00:12",
    "F23 a pair's range with the own MAC": "2001:db8:20:8000::1",
}


def _sources() -> Iterator[Case]:
    for name, mac in FOREIGN_MACS.items():
        wire = Wire(Path.FROM_VM, mac)
        yield ROWS.out(f"{name} source MAC, TCP", wire.wrap4(tcp(), TCP), SPOOF_MAC)
        request = wire.frame(arp(1, VM4, GATEWAY4, sender_mac=mac), ARP)
        yield ROWS.out(f"{name} source MAC, ARP", request, SPOOF_MAC)
        option = link_layer(2)
        frame = wire.wrap6(advertisement(VM6, option), ICMPV6, hop_limit=255)
        yield ROWS.out(f"F8 {name[4:]} source MAC, NA with the right option", frame, SPOOF_MAC)
        if not mac[0] & 1:
            yield UNGUARDED.out(f"{name} source MAC, guards off", wire.wrap4(tcp(), 6), DEFAULT)
    for name, source in FOREIGN_IPV4.items():
        frame = OUT.wrap4(tcp(), TCP, local=source)
        yield ROWS.out(f"{name} as source", frame, SPOOF_ADDRESS)
        yield UNGUARDED.out(f"{name} as source, guards off", frame, DEFAULT)
    for name, source in FOREIGN_IPV6.items():
        frame = OUT.wrap6(tcp(), TCP, local=source)
        yield ROWS.out(f"{name} as source", frame, SPOOF_ADDRESS)
        yield UNGUARDED.out(f"{name} as source, guards off", frame, DEFAULT)
    for source in ("10.20.0.200", "10.20.0.201", "10.20.0.203", VM4):
        yield ROWS.out(f"F23 own source {source}", OUT.wrap4(tcp(), TCP, local=source), DEFAULT)
    for source in (VM6, VM_LINK_LOCAL):
        yield ROWS.out(f"F1 own source {source}", OUT.wrap6(tcp(), TCP, local=source), DEFAULT)
    yield ROWS.out("F23 a pair with its MAC", PAIR.wrap4(tcp(), TCP, local=PAIR4), DEFAULT)
    frame = PAIR.wrap6(tcp(), TCP, local="2001:db8:20:8000::1")
    yield ROWS.out("F23 a pair's IPv6 range with its MAC", frame, DEFAULT)
    yield ROWS.out("F23 own address with a pair's MAC", PAIR.wrap4(tcp(), TCP), SPOOF_ADDRESS)
    frame = PAIR.wrap4(tcp(), TCP, local="10.20.0.201")
    yield ROWS.out("F23 a pair without MAC with another's MAC", frame, SPOOF_ADDRESS)
    frame = OUT.wrap4(udp(68, 68), UDP, local=UNSPECIFIED4)
    yield ROWS.out("C12 unspecified, not to a DHCP server", frame, SPOOF_ADDRESS)


def _destinations() -> Iterator[Case]:
    for name, mac in {"the VM": VM_MAC, "a pair": PAIR_MAC}.items():
        frame = Wire(Path.TO_VM, mac).wrap4(tcp(), TCP)
        yield ROWS.into(f"B11 destination MAC {name}", frame, DEFAULT)
    for mac in (OTHER_VM_MAC, GATEWAY_MAC, bytes(6), bytes.fromhex("525400000013")):
        wire = Wire(Path.TO_VM, mac)
        flooded = wire.wrap4(tcp(), TCP)
        refused = dropped(Reason.NOT_FOR_VM)
        yield ROWS.into(f"B11 destination MAC {mac.hex()}", flooded, refused)
        yield UNGUARDED.into(f"B11 destination MAC {mac.hex()}, guards off", flooded, DEFAULT)
        answer = wire.frame(arp(2, GATEWAY4, OTHER_VM4, sender_mac=GATEWAY_MAC), ARP)
        yield ROWS.into(f"B11 ARP to {mac.hex()}", answer, refused)
    yield from _groups()
    yield from _smurfs()
    frame = IN.wrap4(tcp(), TCP, local=OTHER_VM4)
    yield ROWS.into("J4 another VM's address in our frame", frame, DEFAULT)


def _groups() -> Iterator[Case]:
    """A frame to a group has a packet to a group in it, and the other way round."""
    mismatch = dropped(Reason.GROUP_MISMATCH)
    for wire, row in ((OUT, ROWS.out), (IN, ROWS.into)):
        for group in ("239.1.2.3", BROADCAST4, "ff02::fb"):
            good = _to_group(wire, group)
            yield row(f"J4 to {group} in its own frame", good, DEFAULT)
            ethertype = IPV6 if ":" in group else IPV4
            yield row(
                f"J4 to {group} in a unicast frame", wire.frame(good[14:], ethertype), mismatch
            )
        for name, mac in {"broadcast": BROADCAST_MAC, "multicast": MULTICAST_MAC}.items():
            is_out = wire is OUT
            to_all = Wire(wire.path, VM_MAC if is_out else mac, mac if is_out else GATEWAY_MAC)
            yield row(f"J4 unicast packet in a {name} frame", to_all.wrap4(tcp(), TCP), mismatch)
            frame = to_all.wrap6(tcp(), TCP)
            yield row(f"J4 unicast packet in a {name} frame, IPv6", frame, mismatch)
            frame = to_all.frame(_to_group(wire, "10.20.255.255")[14:], IPV4)
            yield row(f"J1 directed broadcast in a {name} frame", frame, mismatch)
    spoofed = Wire(Path.FROM_VM, OTHER_VM_MAC, BROADCAST_MAC).wrap4(tcp(), TCP)
    yield ROWS.out("J4 mismatch comes before the source MAC", spoofed, mismatch)
    yield UNGUARDED.out("J4 mismatch without guards", spoofed, mismatch)


def _to_group(wire: Wire, group: str) -> bytes:
    """Return a UDP frame to a group, from the VM or from outside."""
    own, other = (VM4, PEER4) if "." in group else (VM6, PEER6)
    local, remote = (own, group) if wire is OUT else (group, other)
    return wire.wrap(udp(), UDP, local, remote)


def _smurfs() -> Iterator[Case]:
    """The VM asks all hosts of a group to answer somebody."""
    refused = dropped(Reason.ECHO_TO_GROUP)
    for group in ("224.0.0.1", BROADCAST4):
        yield ROWS.out(f"H14 echo to {group}", OUT.wrap4(echo(8), ICMP, remote=group), refused)
    for group in ("ff02::1", "ff05::2"):
        yield ROWS.out(f"H14 echo to {group}", OUT.wrap6(echo(128), ICMPV6, remote=group), refused)
    from_outside = IN.wrap4(echo(8), ICMP, local="224.0.0.1")
    yield ROWS.into("H14 echo for all from outside", from_outside, DEFAULT)
    reply = OUT.wrap4(echo(0), ICMP, remote="224.0.0.1")
    yield ROWS.out("H14 echo reply to a group", reply, dropped(Reason.NO_STATE))


def _arp_frames() -> Iterator[tuple[str, bytes, Expected]]:
    good = accepted(Reason.ARP)
    yield "F4 request", arp(1, VM4, GATEWAY4), good
    yield "F4 reply", arp(2, VM4, GATEWAY4, target_mac=GATEWAY_MAC), good
    yield "F4 gratuitous request", arp(1, VM4, VM4), good
    yield "F4 gratuitous reply", arp(2, VM4, VM4, target_mac=VM_MAC), good
    yield "F4 probe for the own address", arp(1, UNSPECIFIED4, VM4), good
    yield "F4 probe for an address of a pair", arp(1, UNSPECIFIED4, "10.20.0.202"), good
    yield "F4 probe for another's address", arp(1, UNSPECIFIED4, OTHER_VM4), SPOOF_ARP
    yield "F4 reply from 0.0.0.0", arp(2, UNSPECIFIED4, VM4), SPOOF_ARP
    yield "F4 request for another VM", arp(1, OTHER_VM4, GATEWAY4), SPOOF_ARP
    yield "F4 reply for the gateway", arp(2, GATEWAY4, OTHER_VM4), SPOOF_ARP
    yield "F4 gratuitous reply for the gateway", arp(2, GATEWAY4, GATEWAY4), SPOOF_ARP
    yield "F4 gratuitous request for the gateway", arp(1, GATEWAY4, GATEWAY4), SPOOF_ARP
    yield "F4 a pair's address with the own MAC", arp(1, PAIR4, GATEWAY4), SPOOF_ARP
    for name, mac in FOREIGN_MACS.items():
        yield f"F3 request, sender MAC {name[3:]}", arp(1, VM4, GATEWAY4, sender_mac=mac), SPOOF_ARP
        yield f"F3 reply, sender MAC {name[3:]}", arp(2, VM4, GATEWAY4, sender_mac=mac), SPOOF_ARP
        probe = arp(1, UNSPECIFIED4, VM4, sender_mac=mac)
        yield f"F3 probe, sender MAC {name[3:]}", probe, SPOOF_ARP


def _arp() -> Iterator[Case]:
    for name, message, expected in _arp_frames():
        for destination in (BROADCAST_MAC, GATEWAY_MAC):
            frame = ethernet(message, ARP, destination=destination)
            to = "broadcast" if destination == BROADCAST_MAC else "unicast"
            yield ROWS.out(f"{name}, {to}", frame, expected)
        frame = ethernet(message, ARP, destination=BROADCAST_MAC)
        yield UNGUARDED.out(f"{name}, guards off", frame, accepted(Reason.ARP))
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, expected)
    own = PAIR.frame(arp(1, PAIR4, GATEWAY4, sender_mac=PAIR_MAC), ARP)
    yield ROWS.out("F23 request of a pair with its MAC", own, accepted(Reason.ARP))
    foreign = PAIR.frame(arp(1, VM4, GATEWAY4, sender_mac=PAIR_MAC), ARP)
    yield ROWS.out("F23 own address with a pair's MAC in ARP", foreign, SPOOF_ARP)
    heads = {
        "hardware type 0": "000008000604",
        "hardware type 6": "000608000604",
        "protocol IPv6": "000186dd0604",
        "hardware length 8": "000108000804",
        "protocol length 16": "000108000610",
        "protocol length 0": "000108000600",
    }
    invalid = dropped(Reason.ARP_INVALID)
    for name, head in heads.items():
        frame = ethernet(arp(1, VM4, GATEWAY4, head=head) + bytes(20), ARP)
        yield ROWS.out(f"F5 {name}", frame, invalid)
        yield ROWS.into(f"F5 {name}", frame, invalid)
    for operation in (0, 3, 4, 8, 25, 256, 65535):
        frame = ethernet(arp(operation, VM4, GATEWAY4), ARP)
        yield ROWS.out(f"F5 operation {operation}", frame, invalid)
    answer = IN.frame(arp(2, GATEWAY4, VM4, sender_mac=GATEWAY_MAC, target_mac=VM_MAC), ARP)
    yield CLOSED_ROWS.into("F6 reply of the gateway", answer, accepted(Reason.ARP))
    question = Wire(Path.TO_VM, BROADCAST_MAC).frame(arp(1, GATEWAY4, VM4), ARP)
    yield CLOSED_ROWS.into("F6 request of the gateway", question, accepted(Reason.ARP))


def _rarp() -> Iterator[Case]:
    good = arp(3, UNSPECIFIED4, UNSPECIFIED4, target_mac=VM_MAC)
    rows = {
        "B12 announcement of QEMU": (good, accepted(Reason.RARP)),
        "B12 sender is another": (
            arp(3, VM4, VM4, sender_mac=OTHER_VM_MAC, target_mac=VM_MAC),
            SPOOF_ARP,
        ),
        "B12 target is another": (arp(3, VM4, VM4, target_mac=OTHER_VM_MAC), SPOOF_ARP),
        "B12 reply": (arp(4, VM4, VM4, target_mac=VM_MAC), dropped(Reason.ARP_INVALID)),
        "B12 request as ARP": (arp(1, VM4, VM4), dropped(Reason.ARP_INVALID)),
    }
    for name, (message, expected) in rows.items():
        frame = ethernet(message, RARP, destination=BROADCAST_MAC)
        yield ROWS.out(name, frame, expected)
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, expected)
    for pair in (PAIR_MAC, OTHER_VM_MAC):
        wire = Wire(Path.FROM_VM, pair)
        frame = wire.frame(arp(3, VM4, VM4, sender_mac=pair, target_mac=pair), RARP)
        expected = accepted(Reason.RARP) if pair == PAIR_MAC else SPOOF_MAC
        yield ROWS.out(f"B12 announcement of {pair.hex()}", frame, expected)


def _nd(message: bytes, source: str, wire: Wire = OUT, hop_limit: int = 255) -> bytes:
    return wire.wrap6(message, ICMPV6, local=source, remote="ff02::1", hop_limit=hop_limit)


def _neighbour_frames() -> Iterator[tuple[str, bytes, str, Expected]]:
    """Yield name, message, source and what it gets with every guard on."""
    own, wrong = link_layer(1), link_layer(1, OTHER_VM_MAC)
    for source in (VM6, VM_LINK_LOCAL):
        yield f"F9 NS from {source}", solicitation("fe80::1", own), source, ND
        yield f"F9 NS from {source} without option", solicitation("fe80::1"), source, ND
        yield f"F9 NS from {source}, foreign option", solicitation(VM6, wrong), source, SPOOF_ND
        for target in (VM6, VM_LINK_LOCAL):
            message = advertisement(target, link_layer(2))
            yield f"F7 NA for {target} from {source}", message, source, ND
        message = advertisement(OTHER_VM6, link_layer(2))
        yield f"F7 NA for another VM from {source}", message, source, SPOOF_ND
        message = advertisement(GATEWAY6, link_layer(2), 0xE0000000)
        yield f"F7 NA for the router from {source}", message, source, SPOOF_ND
        yield f"F9 RS from {source}", router_solicitation(own), source, ND
        yield f"F9 RS from {source}, foreign option", router_solicitation(wrong), source, SPOOF_ND
    foreign = link_layer(2, OTHER_VM_MAC)
    yield "F7 NA with a foreign option", advertisement(VM6, foreign), VM6, SPOOF_ND
    yield "F7 NA without option", advertisement(VM6), VM6, ND
    yield "F7 NA with the other option", advertisement(VM6, wrong), VM6, ND
    yield "F7 NA from ::", advertisement(VM6, link_layer(2)), "::", SPOOF_ND
    yield "F22 detection of the own address", solicitation(VM6), "::", ND
    yield "F22 detection of the own link-local", solicitation(VM_LINK_LOCAL), "::", ND
    yield "F22 detection of another VM's address", solicitation(OTHER_VM6), "::", SPOOF_ND
    yield "F22 detection with an option", solicitation(VM6, own), "::", SPOOF_ND
    yield "F9 RS from ::", router_solicitation(), "::", ND
    for source in (OTHER_VM6, "fe80::5054:ff:fe00:12", GATEWAY6):
        yield f"F9 NS from foreign {source}", solicitation(VM6, own), source, SPOOF_ND
        yield f"F10 NA from foreign {source}", advertisement(VM6), source, SPOOF_ND
        yield f"F10 RS from foreign {source}", router_solicitation(), source, SPOOF_ND


def _neighbours() -> Iterator[Case]:
    for name, message, source, expected in _neighbour_frames():
        frame = _nd(message, source)
        yield ROWS.out(name, frame, expected)
        yield CLOSED_ROWS.out(f"{name}, no rule accepts", frame, expected)
        yield UNGUARDED.out(f"{name}, guards off", frame, ND)
    advertised = router_advertisement(link_layer(1))
    for source in (VM6, VM_LINK_LOCAL, GATEWAY6, "::"):
        frame = _nd(advertised, source)
        yield ROWS.out(f"F13 RA from {source}", frame, RA_REFUSED)
        yield UNGUARDED.out(f"F13 RA from {source}, guards off", frame, ND)
    yield ROWS.out("F13 RA with broken options", _nd(router_advertisement(b"\1"), VM6), RA_REFUSED)
    messages = {
        "RA": advertised,
        "NS": solicitation(VM6, link_layer(1, GATEWAY_MAC)),
        "NA": advertisement(GATEWAY6, link_layer(2, GATEWAY_MAC)),
        "RS": router_solicitation(),
    }
    for name, message in messages.items():
        frame = IN.wrap6(message, ICMPV6, remote=GATEWAY6, hop_limit=255)
        yield CLOSED_ROWS.into(f"F13 {name} from the network", frame, ND)
        for hop_limit in (0, 1, 64, 254):
            sent = _nd(message, VM6, hop_limit=hop_limit)
            yield ROWS.out(f"F11 {name} with hop limit {hop_limit}", sent, ND_INVALID)
            got = _nd(message, VM6, IN, hop_limit)
            yield ROWS.into(f"F11 {name} with hop limit {hop_limit}", got, ND_INVALID)
        coded = message[:1] + b"\1" + message[2:]
        yield ROWS.out(f"F11 {name} with code 1", _nd(coded, VM6), ND_INVALID)
        yield UNGUARDED.out(f"F11 {name} with code 1, guards off", _nd(coded, VM6), ND_INVALID)


def _options() -> Iterator[Case]:
    other = bytes.fromhex("0e01000000000000")  # a nonce
    own = link_layer(1)
    invalid = {
        "length 0": b"\1\0" + VM_MAC,
        "length 0 of another option": b"\x0e\0" + bytes(6),
        "one byte": b"\1",
        "seven bytes": own[:7],
        "beyond the end": b"\x0e\2" + bytes(6),
        "link-layer of 16 bytes": b"\1\2" + VM_MAC + bytes(8),
        "link-layer twice": own + own,
        "link-layer twice, apart": own + other + own,
        "nine options": other * 9,
        "rest after eight options": other * 8 + b"\0",
    }
    valid = {
        "another option": other,
        "another option first": other + own,
        "eight options": other * 7 + own,
        "long option": b"\x0e\3" + bytes(22) + own,
    }
    for name, options in {**invalid, **valid}.items():
        expected = ND_INVALID if name in invalid else ND
        for kind, message in (
            ("NS", solicitation(VM6, options)),
            ("RS", router_solicitation(options)),
        ):
            yield ROWS.out(f"F11 {kind}, {name}", _nd(message, VM6), expected)
            yield ROWS.into(f"F11 {kind}, {name}", _nd(message, VM6, IN), expected)
    last = _nd(solicitation(VM6, other * 7 + link_layer(1, OTHER_VM_MAC)), VM6)
    yield ROWS.out("F9 foreign address in the eighth option", last, SPOOF_ND)
    padded = ethernet(ipv6(solicitation(VM6), ICMPV6, hop_limit=255) + own, IPV6)
    yield ROWS.out("A9 option behind the packet's end", padded, ND)


def _without_facts() -> Iterator[Case]:
    stranger = Wire(Path.FROM_VM, OTHER_VM_MAC)
    yield NAMELESS.out(
        "F1 nothing known, any source", stranger.wrap4(tcp(), 6, local=PAIR4), DEFAULT
    )
    request = stranger.frame(arp(1, OTHER_VM4, GATEWAY4), ARP)
    yield NAMELESS.out("F4 nothing known, ARP", request, accepted(Reason.ARP))
    yield NAMELESS.out("F9 nothing known, NS", _nd(solicitation(VM6), OTHER_VM6), ND)
    yield NAMELESS.out("F13 nothing known, RA", _nd(router_advertisement(), VM6), RA_REFUSED)
    other_mac = Wire(Path.TO_VM, OTHER_VM_MAC)
    yield NAMELESS.into("B11 nothing known, any destination", other_mac.wrap4(tcp(), 6), DEFAULT)
    yield NO_MAC.out("F1 MAC unknown, own address", stranger.wrap4(tcp(), TCP), DEFAULT)
    foreign = stranger.wrap4(tcp(), TCP, local=OTHER_VM4)
    yield NO_MAC.out("F1 MAC unknown, foreign address", foreign, SPOOF_ADDRESS)
    link_local = stranger.wrap6(tcp(), TCP, local="fe80::77")
    yield NO_MAC.out("F10 MAC unknown, any link-local", link_local, DEFAULT)
    lie = stranger.frame(arp(1, VM4, GATEWAY4), ARP)
    yield NO_MAC.out("F3 MAC unknown, sender MAC differs", lie, SPOOF_ARP)
    claim = stranger.frame(arp(1, OTHER_VM4, GATEWAY4, sender_mac=OTHER_VM_MAC), ARP)
    yield NO_MAC.out("F4 MAC unknown, foreign sender", claim, SPOOF_ARP)


CASES: tuple[Case, ...] = (
    *_sources(),
    *_destinations(),
    *_arp(),
    *_rarp(),
    *_neighbours(),
    *_options(),
    *_without_facts(),
)
