# SPDX-License-Identifier: Apache-2.0
"""Frames made from packet descriptions: what they hold, their checksums, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP

from tests.frames import GATEWAY_MAC, VM_MAC
from vgw.abi import Reason
from vgw.errors import VgwError
from vgw.policy.frame import build_frame, crc32c
from vgw.policy.packet import Packet, parse_frame
from vgw.policy.packet_fields import ACK, PSH, SYN

SOME4 = {"src": "192.0.2.10", "dst": "10.20.0.11"}
SOME6 = {"src": "2001:db8:1::10", "dst": "2001:db8:20::11"}


def build(description: Mapping[str, object]) -> bytes:
    return build_frame(description, source_mac=GATEWAY_MAC, destination_mac=VM_MAC)


def parsed(**description: object) -> Packet:
    packet = parse_frame(build(description))
    assert packet.reason is Reason.NONE
    return packet


def test_tcp_of_the_documentation() -> None:
    packet = parsed(**SOME4, proto="tcp", sport=40000, dport=443, flags="S")
    assert (str(packet.source), str(packet.destination)) == ("192.0.2.10", "10.20.0.11")
    assert (packet.source_mac, packet.destination_mac) == (GATEWAY_MAC, VM_MAC)
    assert (packet.protocol, packet.source_port, packet.destination_port) == (6, 40000, 443)
    assert packet.tcp is not None
    assert packet.tcp.flags == SYN


def test_flags_may_come_in_any_order_and_case() -> None:
    packet = parsed(**SOME4, proto=6, dport=443, flags="pSa")
    assert packet.tcp is not None
    assert packet.tcp.flags == SYN | PSH | ACK
    assert (packet.tcp.sequence, packet.tcp.acknowledgement) == (1000, 1001)


@pytest.mark.parametrize("addresses", [SOME4, SOME6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("length", [0, 1, 18, 1400])
@pytest.mark.parametrize(("proto", "layer"), [("tcp", TCP), ("udp", UDP), ("sctp", SCTP)])
def test_lengths_and_checksums_are_right(
    addresses: dict[str, str], length: int, proto: str, layer: Any
) -> None:
    frame = build({**addresses, "proto": proto, "dport": 53, "length": length})
    decoded = Ether(frame)
    # Scapy fills in what is missing, so taking these out and building again recomputes them.
    for part, names in ((layer, ("chksum", "len")), (IP, ("chksum", "len")), (IPv6, ("plen",))):
        if part in decoded:
            for name in names:
                if name in decoded[part].fields:
                    delattr(decoded[part], name)
    if proto != "sctp":
        assert bytes(decoded) == frame
    assert len(frame) == len(Ether(frame))
    assert parse_frame(frame).reason is Reason.NONE


def test_crc32c_of_the_known_text() -> None:
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    ("proto", "addresses", "request_type"), [("icmp", SOME4, 8), ("icmpv6", SOME6, 128)]
)
def test_echo_is_the_default_icmp(proto: str, addresses: dict[str, str], request_type: int) -> None:
    packet = parsed(**addresses, proto=proto, icmp_id=77)
    assert packet.icmp is not None
    assert (packet.icmp.type, packet.icmp.code, packet.icmp.identifier) == (request_type, 0, 77)
    named = parsed(**addresses, proto=proto, icmp_type="echo-reply", icmp_code=1)
    assert named.icmp is not None
    assert (named.icmp.echo, named.icmp.code) == (False, 1)


@pytest.mark.parametrize("addresses", [SOME4, SOME6], ids=["IPv4", "IPv6"])
def test_a_protocol_by_number(addresses: dict[str, str]) -> None:
    assert parsed(**addresses, proto=47).protocol == 47
    assert parsed(**addresses, proto="47", length=3).protocol == 47


def test_a_tag() -> None:
    assert parsed(**SOME4, proto="udp", dport=53, vlan=100).vlan == 100


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"src": None}, "src"),
        ({"src": "10.0.0.300"}, "src"),
        ({"src": 5}, "src"),
        ({"dst": "2001:db8::1"}, "dst"),
        ({"proto": None}, "proto"),
        ({"proto": "gopher"}, "proto"),
        ({"proto": 256}, "proto"),
        ({"proto": True}, "proto"),
        ({"proto": "icmpv6", "dport": None}, "dport"),
        ({"dport": None}, "dport"),
        ({"dport": "http"}, "dport"),
        ({"dport": 65536}, "dport"),
        ({"sport": -1}, "sport"),
        ({"flags": "SX"}, "flags"),
        ({"flags": 2}, "flags"),
        ({"icmp_type": 8}, "icmp_type"),
        ({"vlan": 0}, "vlan"),
        ({"vlan": 4095}, "vlan"),
        ({"length": 100000}, "length"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], field: str) -> None:
    description: dict[str, object] = {**SOME4, "proto": "tcp", "dport": 443, **change}
    with pytest.raises(VgwError, match=rf"^packet description, field {field}: ") as caught:
        build(description)
    assert "\n" not in str(caught.value)


def test_icmp_of_the_other_family_is_refused() -> None:
    with pytest.raises(VgwError, match="field proto: "):
        build({**SOME4, "proto": "icmpv6"})
