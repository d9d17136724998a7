# SPDX-License-Identifier: Apache-2.0
"""Changes of a single frame: of its headers, knowing where they are, and of any bits.

Checksums are left wrong: the programs do not verify them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tests.frames import ARP, ICMP, ICMPV6, SCTP, TCP, UDP
from tests.fuzz import values
from tests.fuzz.layout import ERRORS, FRAGMENT, TAGS, Layout, layout_of, quoted_layout

LONGEST: Final = 1600
PORTED: Final = frozenset({TCP, UDP, SCTP})
#: Bodies of IPv6 extension headers that may come between.
_EXTENSIONS6: Final = (
    (0, bytes.fromhex("050200000100")),
    (0, bytes.fromhex("010400000000")),
    (0, bytes.fromhex("c20400010000")),
    (60, bytes.fromhex("010400000000")),
    (60, bytes(6)),
    (43, bytes.fromhex("000000000000")),
    (43, bytes.fromhex("020100000000")),
    (44, bytes.fromhex("000000000007")),
    (44, bytes.fromhex("000100000007")),
    (51, bytes(6)),
    (135, bytes(6)),
)
_OPTIONS4: Final = tuple(
    bytes.fromhex(text)
    for text in ("94040000", "01010101", "00000000", "83070400", "44080500", "07030000", "94050000")
)
_Value = TypeVar("_Value")
_Change = Callable[["Mutator", bytearray, Layout], None]


class Mutator:
    """Changes frames as its random generator says; `donors` are frames to splice with."""

    def __init__(self, generator: random.Random, donors: Sequence[bytes]) -> None:
        self._random = generator
        self._donors = donors
        #: TCP numbers of the packets around, which others are made to come near.
        self.numbers: list[int] = []

    def change(self, frame: bytes) -> bytes:
        """Return a frame with one change or a few."""
        data = bytearray(frame)
        for _ in range(self._pick((1, 1, 1, 1, 2, 2, 3, 6))):
            if len(data) < 14:
                break
            self._random.choice(_CHANGES)(self, data, layout_of(data))
        del data[LONGEST:]
        return bytes(data)

    def near_number(self, number: int) -> int:
        """Return a TCP number near one that is known, or near the given one."""
        known = self._pick(self.numbers) if self.numbers else number
        return (known + self._pick(values.STEPS)) & 0xFFFFFFFF

    def _pick(self, choices: Sequence[_Value]) -> _Value:
        return choices[int(self._random.random() * len(choices))]

    def _likely_first(self, choices: Sequence[_Value]) -> _Value:
        """Pick one of the choices, those in front more often."""
        place = self._random.random()
        return choices[int(place * place * len(choices))]

    # Bytes anywhere

    def _flip_bit(self, data: bytearray, _: Layout) -> None:
        place = int(self._random.random() * len(data))
        data[place] ^= 1 << self._random.getrandbits(3)

    def _set_byte(self, data: bytearray, _: Layout) -> None:
        place = int(self._random.random() * len(data))
        data[place] = self._pick(values.BYTES) if self._random.random() < 0.7 else self._byte()

    def _set_header_byte(self, data: bytearray, layout: Layout) -> None:
        end = min(len(data), (layout.upper or layout.network) + 24)
        data[12 + int(self._random.random() * (end - 12))] = self._byte()

    def _byte(self) -> int:
        return self._random.getrandbits(8)

    def _truncate(self, data: bytearray, layout: Layout) -> None:
        if self._random.random() < 0.5:
            start = self._pick((layout.network, layout.upper or layout.network))
            del data[start + int(self._random.random() * 25) :]
        else:
            del data[14 + int(self._random.random() * (len(data) - 13)) :]

    def _pad(self, data: bytearray, _: Layout) -> None:
        size = self._pick((1, 2, 4, 8, 8, 20, 60, 300))
        data += bytes(size) if self._random.random() < 0.5 else self._random.randbytes(size)

    def _truncate_rightly(self, data: bytearray, layout: Layout) -> None:
        self._truncate(data, layout)
        fix_lengths(data)

    def _pad_rightly(self, data: bytearray, layout: Layout) -> None:
        self._pad(data, layout)
        fix_lengths(data)

    def _splice(self, data: bytearray, layout: Layout) -> None:
        """Put the upper layer of another frame behind the network header of this one."""
        donor = self._pick(self._donors)
        other = layout_of(donor)
        if layout.upper and other.upper and self._random.random() < 0.7:
            data[layout.upper :] = donor[other.upper :]
            put(data, layout.protocol_at, bytes([max(other.protocol, 0)]))
            fix_lengths(data)
        else:
            place = 14 + int(self._random.random() * 60)
            data[place:] = donor[place:]

    # Link layer

    def _mac(self, data: bytearray, _: Layout) -> None:
        place = self._pick((0, 6))
        data[place : place + 6] = self._likely_first(values.MACS)

    def _ethertype(self, data: bytearray, layout: Layout) -> None:
        put(data, layout.kind_at, self._pick(values.ETHERTYPES).to_bytes(2, "big"))

    def _tag(self, data: bytearray, _: Layout) -> None:
        tpid = self._pick((0x8100, 0x8100, 0x8100, 0x88A8, 0x9100))
        control = self._likely_first(values.VLANS) | self._pick((0, 0, 0x2000, 0x1000)) & 0xF000
        data[12:12] = tpid.to_bytes(2, "big") + control.to_bytes(2, "big")

    def _untag(self, data: bytearray, _: Layout) -> None:
        if (data[12] << 8 | data[13]) in TAGS and len(data) >= 18:
            del data[12:16]

    def _snap(self, data: bytearray, layout: Layout) -> None:
        size = len(data) - layout.network + 8
        data[layout.kind_at : layout.kind_at] = size.to_bytes(2, "big") + b"\xaa\xaa\x03\0\0\0"

    def _arp_field(self, data: bytearray, layout: Layout) -> None:
        if layout.kind not in {ARP, 0x8035}:
            self._mac(data, layout)
            return
        place = self._pick((0, 2, 4, 5, 6, 7, 8, 14, 18, 24))
        if place in {8, 18}:
            put(data, layout.network + place, self._likely_first(values.MACS))
        elif place in {14, 24}:
            put(data, layout.network + place, self._likely_first(values.ADDRESSES4))
        else:
            put(data, layout.network + place, bytes([self._pick((0, 1, 2, 3, 4, 6, 8))]))

    # Network layer

    def _address(self, data: bytearray, layout: Layout) -> None:
        layout = self._inner(data, layout)
        if layout.version == 4:
            put(data, layout.network + self._pick((12, 16)), self._likely_first(values.ADDRESSES4))
        elif layout.version == 6:
            put(data, layout.network + self._pick((8, 24)), self._likely_first(values.ADDRESSES6))

    def _protocol(self, data: bytearray, layout: Layout) -> None:
        layout = self._inner(data, layout)
        if layout.protocol_at:
            put(data, layout.protocol_at, bytes([self._pick(values.PROTOCOLS)]))

    def _length(self, data: bytearray, layout: Layout) -> None:
        """Let a length field lie, or make all of them right."""
        places = []
        if layout.version:
            places.append(layout.network + (2 if layout.version == 4 else 4))
        if layout.protocol == UDP:
            places.append(layout.upper + 4)
        if not places or self._random.random() < 0.2:
            fix_lengths(data)
            return
        place = self._pick(places)
        now = int.from_bytes(data[place : place + 2], "big")
        step = self._pick((1, -1, 2, -8, 8, -20, 20, -now, 500, 65535 - now))
        put(data, place, ((now + step) & 0xFFFF).to_bytes(2, "big"))

    def _first_byte(self, data: bytearray, layout: Layout) -> None:
        layout = self._inner(data, layout)
        if layout.version:
            choices = (0x45, 0x46, 0x44, 0x40, 0x4F, 0x60, 0x65, 0x50, 0x00, 0xF5)
            put(data, layout.network, bytes([self._pick(choices)]))

    def _hop_limit(self, data: bytearray, layout: Layout) -> None:
        place = {4: 8, 6: 7}.get(layout.version)
        if place is not None:
            put(data, layout.network + place, bytes([self._pick((0, 1, 64, 254, 255))]))

    def _fragment(self, data: bytearray, layout: Layout) -> None:
        """Make a fragment of the packet, or another one of a fragment."""
        layout = self._inner(data, layout)
        if layout.version == 4:
            place = layout.network + 6
            put(data, place, self._likely_first(values.FRAGMENTS4).to_bytes(2, "big"))
            if self._random.random() < 0.3:
                put(data, layout.network + 4, self._pick((1, 2)).to_bytes(2, "big"))
        elif layout.version == 6 and layout.network + 40 <= len(data):
            field = self._likely_first(values.FRAGMENTS6).to_bytes(2, "big")
            if data[layout.network + 6] != FRAGMENT:
                self._put_extension(
                    data, layout.network, FRAGMENT, field + bytes.fromhex("00000007")
                )
            else:
                put(data, layout.network + 42, field)
                if self._random.random() < 0.3:
                    put(data, layout.network + 47, bytes([self._pick((7, 8))]))

    def _options(self, data: bytearray, layout: Layout) -> None:
        """Put IPv4 options or an IPv6 extension header behind the fixed header."""
        if layout.version == 6 and layout.network + 40 <= len(data):
            number, body = self._pick(_EXTENSIONS6)
            self._put_extension(data, layout.network, number, body)
        elif layout.version == 4 and layout.network + 20 <= len(data):
            options = self._likely_first(_OPTIONS4)
            data[layout.network + 20 : layout.network + 20] = options
            words = (data[layout.network] & 15) + len(options) // 4
            data[layout.network] = 0x40 | min(words, 15)
        if self._random.random() < 0.8:
            fix_lengths(data)

    @staticmethod
    def _put_extension(data: bytearray, network: int, number: int, body: bytes) -> None:
        following = data[network + 6]
        data[network + 6] = number
        data[network + 40 : network + 40] = bytes([following, 0]) + body
        length = int.from_bytes(data[network + 4 : network + 6], "big") + 2 + len(body)
        put(data, network + 4, (length & 0xFFFF).to_bytes(2, "big"))

    # Upper layers

    def _inner(self, data: bytearray, layout: Layout) -> Layout:
        """Return the headers of the quoted packet, now and then, if there is one."""
        if layout.protocol not in ERRORS or self._random.random() < 0.4:
            return layout
        return quoted_layout(data, layout) or layout

    def _port(self, data: bytearray, layout: Layout) -> None:
        layout = self._inner(data, layout)
        if layout.protocol in PORTED:
            place = layout.upper + self._pick((0, 2))
            put(data, place, self._likely_first(values.PORTS).to_bytes(2, "big"))
        elif layout.protocol in {ICMP, ICMPV6}:
            put(data, layout.upper + 4, self._pick((7, 8, 1, 0)).to_bytes(2, "big"))

    def _tcp_number(self, data: bytearray, layout: Layout) -> None:
        layout = self._inner(data, layout)
        if layout.protocol == TCP:
            place = layout.upper + self._pick((4, 8))
            now = int.from_bytes(data[place : place + 4], "big")
            put(data, place, self.near_number(now).to_bytes(4, "big"))

    def _upper_header(self, data: bytearray, layout: Layout) -> None:
        """Change what tells packets of a protocol apart: flags, types, codes."""
        if layout.protocol == TCP:
            if self._random.random() < 0.7:
                put(data, layout.upper + 13, bytes([self._likely_first(values.TCP_FLAGS)]))
            else:
                put(data, layout.upper + 12, bytes([self._pick((0, 4, 5, 6, 15)) << 4]))
        elif layout.protocol in {ICMP, ICMPV6}:
            self._icmp_header(data, layout)
        elif layout.protocol == UDP and layout.upper + 8 < len(data):
            put(data, layout.upper + 8 + self._pick((0, 1, 2, 24, 28, 33)), bytes([self._byte()]))
        elif layout.upper:
            put(data, layout.upper, bytes([self._pick((0x11, 0x12, 0x16, 0x17, 0x22, 0, 1))]))

    def _icmp_header(self, data: bytearray, layout: Layout) -> None:
        choice = self._random.random()
        types = values.ICMP_TYPES if layout.protocol == ICMP else values.ICMPV6_TYPES
        if choice < 0.4:
            put(data, layout.upper, bytes([self._likely_first(types)]))
        elif choice < 0.6:
            put(data, layout.upper + 1, bytes([self._pick((0, 1, 3, 4, 13))]))
        elif choice < 0.8:
            mtu = self._pick((0, 1, 67, 68, 576, 1279, 1280, 1500, 65536))
            put(data, layout.upper + 4, mtu.to_bytes(4, "big"))
        else:  # what follows the fixed part: targets and options of neighbour discovery
            place = self._pick((8, 24, 25, 26, 32, 33))
            put(data, layout.upper + place, bytes([self._pick((0, 1, 2, 3, 5, 0xFE, 0xFF))]))


#: Every change as often as it stands here.
_CHANGES: Final[tuple[_Change, ...]] = (
    *(Mutator._flip_bit,) * 3,
    *(Mutator._set_byte,) * 2,
    *(Mutator._set_header_byte,) * 2,
    *(Mutator._truncate,) * 2,
    Mutator._truncate_rightly,
    Mutator._pad,
    Mutator._pad_rightly,
    *(Mutator._splice,) * 2,
    *(Mutator._mac,) * 2,
    Mutator._ethertype,
    Mutator._tag,
    Mutator._untag,
    Mutator._snap,
    Mutator._arp_field,
    *(Mutator._address,) * 4,
    *(Mutator._protocol,) * 2,
    *(Mutator._length,) * 3,
    Mutator._first_byte,
    Mutator._hop_limit,
    *(Mutator._fragment,) * 3,
    *(Mutator._options,) * 2,
    *(Mutator._port,) * 4,
    *(Mutator._tcp_number,) * 4,
    *(Mutator._upper_header,) * 5,
)


def put(data: bytearray, place: int, value: bytes) -> None:
    """Overwrite bytes, if the frame has them."""
    if place + len(value) <= len(data):
        data[place : place + len(value)] = value


def fix_lengths(data: bytearray) -> None:
    """Make the length fields of IP and UDP agree with the length of the frame."""
    if len(data) < 14:
        return
    layout = layout_of(data)
    fix_ip_length(data, layout)
    if layout.protocol == UDP and layout.upper + 8 <= len(data):
        put(data, layout.upper + 4, (len(data) - layout.upper).to_bytes(2, "big"))


def fix_ip_length(data: bytearray, layout: Layout) -> None:
    """Make the length field of IP agree with the length of the frame."""
    size = len(data) - layout.network
    if layout.version == 4:
        put(data, layout.network + 2, size.to_bytes(2, "big"))
    elif layout.version == 6 and size >= 40:
        put(data, layout.network + 4, (size - 40).to_bytes(2, "big"))
