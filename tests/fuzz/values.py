# SPDX-License-Identifier: Apache-2.0
"""Values that mean something to the fixtures: the VM's own, its allowed pairs', strangers'."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from tests.frames import (
    ALL_HOSTS4,
    ALL_NODES6,
    BROADCAST_MAC,
    GATEWAY4,
    GATEWAY6,
    GATEWAY_MAC,
    IGMP_ROUTERS4,
    MLD_ROUTERS6,
    MULTICAST_MAC,
    OTHER_VM4,
    OTHER_VM6,
    OTHER_VM_MAC,
    PAIR4,
    PAIR_MAC,
    PEER4,
    PEER6,
    STRANGER4,
    STRANGER6,
    UNSPECIFIED4,
    VM4,
    VM6,
    VM_LINK_LOCAL,
    VM_MAC,
)

PAIR6: Final = "2001:db8:20:8000::5"
MACS: Final = (
    VM_MAC,
    GATEWAY_MAC,
    PAIR_MAC,
    OTHER_VM_MAC,
    BROADCAST_MAC,
    MULTICAST_MAC,
    bytes.fromhex("01005e000016"),
    bytes.fromhex("333300000016"),
    bytes.fromhex("0180c2000000"),
    bytes(6),
)
#: The first are likelier than the rest.
ADDRESSES4: Final = tuple(
    IPv4Address(text).packed
    for text in (
        VM4,
        PEER4,
        PAIR4,
        "10.20.0.201",
        STRANGER4,
        GATEWAY4,
        OTHER_VM4,
        UNSPECIFIED4,
        "255.255.255.255",
        ALL_HOSTS4,
        IGMP_ROUTERS4,
        "239.1.2.3",
        "10.20.0.255",
        "127.0.0.1",
        "169.254.169.254",
        "240.0.0.1",
    )
)
ADDRESSES6: Final = tuple(
    IPv6Address(text).packed
    for text in (
        VM6,
        PEER6,
        VM_LINK_LOCAL,
        PAIR6,
        STRANGER6,
        GATEWAY6,
        OTHER_VM6,
        "::",
        "::1",
        ALL_NODES6,
        "ff02::2",
        MLD_ROUTERS6,
        "ff02::1:2",
        "ff02::1:ff00:11",
        "::ffff:10.20.0.11",
        "::ffff:192.0.2.10",
        "fe80::5",
    )
)
ETHERTYPES: Final = (
    0x0800,
    0x86DD,
    0x0806,
    0x8035,
    0x8100,
    0x88A8,
    0x9100,
    0x8847,
    0x8863,
    0x88CC,
    0x0842,
    0x0600,
    0x05FF,
    0x0040,
    0x0000,
    0xFFFF,
)
PROTOCOLS: Final = (
    1, 2, 6, 17, 58, 132, 0, 4, 41, 43, 44, 47, 50, 51, 59, 60, 103, 112, 115, 135, 139, 140, 253,
    255,
)  # fmt: skip
PORTS: Final = (
    443, 40000, 80, 22, 53, 3306, 3868, 8000, 8099, 8100, 23, 67, 68, 546, 547, 4789, 0, 1, 65535,
)  # fmt: skip
VLANS: Final = (100, 4094, 0, 1, 99, 4095)
TCP_FLAGS: Final = (
    0x02, 0x12, 0x10, 0x11, 0x04, 0x14, 0x18, 0x19, 0x00, 0x01, 0x03, 0x06, 0x29, 0xC2, 0x13, 0x3F,
)  # fmt: skip
ICMP_TYPES: Final = (8, 0, 3, 11, 12, 5, 4, 9, 10, 13, 14, 17, 42)
ICMPV6_TYPES: Final = (
    128, 129, 1, 2, 3, 4, 135, 136, 133, 134, 137, 130, 131, 132, 143, 139, 144, 151,
)  # fmt: skip
#: Steps away from a TCP number that is known: nearly right, at window ends, and of the far past.
STEPS: Final = (
    0, 1, -1, 2, -2, 100, -100, 1460, 65535, 65536, -65536, 1 << 20, 1 << 30, -(1 << 30), 1 << 31,
    (1 << 31) - 1,
)  # fmt: skip
#: The field of flags and offset of an IPv4 fragment.
FRAGMENTS4: Final = (
    0x2000, 0x0001, 0x2001, 0x0002, 0x2002, 0x0003, 0x00B9, 0x20B9, 0x1FFF, 0x3FFF, 0x1FFE, 0x4000,
    0x6000, 0x8000, 0x0000, 0x4001,
)  # fmt: skip
#: The same of IPv6, as offset and flag stand in its header.
FRAGMENTS6: Final = (
    0x0001, 0x0008, 0x0009, 0x0010, 0x0011, 0x05A8, 0x05A9, 0xFFF8, 0xFFF9, 0x0000, 0x0006, 0x0007,
)  # fmt: skip
#: Seconds that pass: around every timeout there is. With what is put on top of each, the sum of
#: some is never just below or at a timeout, where a moment of real time decides for the programs.
WAITS: Final = (1, 9, 11, 29, 31, 59, 61, 119, 121, 599, 601, 7439, 7441)
OVER_SECOND: Final = 0.04
BYTES: Final = (0, 1, 0xFF, 0x7F, 0x80, 0x45, 0x60, 6, 17, 58)
