# SPDX-License-Identifier: Apache-2.0
"""Reading what DHCP servers say: only a whole lease to the guest's own MAC teaches anything."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.controller import dhcp
from tests.controller.dhcp import (
    LINK_LOCAL,
    MAC,
    address6,
    association,
    frame4,
    frame6,
    lease_options,
    message4,
    message6,
    option,
    option6,
    status,
)
from tests.frames import tagged
from vgw.controller.learning.lease import INFINITE, NotALeaseError, Offer
from vgw.controller.learning.read import read_lease

OTHER_MAC = bytes.fromhex("525400000012")
LEASE = Offer(ip_address("10.20.0.50"), 3600, ip_address("10.20.0.1"))
LEASE6 = Offer(ip_address("2001:db8:20::50"), 3600, ip_address("fe80::1"))


def read(frame: bytes) -> list[Offer]:
    return read_lease(frame, MAC)[0]


@pytest.mark.parametrize(
    "frame",
    [
        frame4(),
        tagged(frame4(), 100),
        frame4(to="10.20.0.50", mac=MAC),
        frame4(message4(options=b"\0\0" + lease_options() + option(12, b"host"))),
        frame4(message4(options=lease_options() + option(119, bytes(200)))),
        # The lease time in a field that the overload option names.
        frame4(
            message4(
                options=lease_options(seconds=None) + option(52, b"\x02"),
                name=option(51, (3600).to_bytes(4, "big")) + b"\xff",
            )
        ),
        # Behind what is cut off nothing counts, before it everything.
        frame4(message4(options=lease_options() + option(119, bytes(250))))[:500],
    ],
)
def test_an_acknowledgement_leases_an_address(frame: bytes) -> None:
    assert read(frame) == [LEASE]


def test_a_lease_may_have_no_end() -> None:
    (offer,) = read(frame4(message4(options=lease_options(seconds=INFINITE))))
    assert offer.seconds == INFINITE


def ack(**fields: Any) -> bytes:
    return frame4(message4(**fields))


KIND, TIME = lease_options(seconds=None), option(51, b"\0\0\x0e\x10")
NOBODYS = ("0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "240.0.0.1", "169.254.1.1")  # noqa: S104
NO_LEASES = {
    **{f"kind {kind}": ack(options=lease_options(kind)) for kind in (1, 2, 3, 4, 6, 7, 8)},
    **{f"the address {address}": ack(address=address) for address in NOBODYS},
    "the address of all": ack(address="255.255.255.255"),
    "another client": ack(client=OTHER_MAC),
    "a request": ack(operation=1),
    "no Ethernet": ack(hardware=b"\x06\x06"),
    "a MAC of 16 bytes": ack(hardware=b"\x01\x10"),
    "BOOTP": ack(cookie=bytes(4)),
    "no time": ack(options=KIND),
    "a time of zero": ack(options=lease_options(seconds=0)),
    "a time of 3 bytes": ack(options=KIND + option(51, b"\0\1\2")),
    "no kind": ack(options=TIME),
    "a kind of two bytes": ack(options=option(53, b"\x05\0") + TIME),
    "two kinds": ack(options=lease_options() + option(53, b"\x02")),
    "options behind the end": ack(options=b"\xff" + lease_options()),
    "an option too long": ack(options=b"\x0c\xff" + lease_options()),
    "other ports": frame4(ports=(67, 69)),
    "a client's ports": frame4(ports=(68, 67)),
    "ports of DHCPv6": frame4(ports=(547, 546)),
}


@pytest.mark.parametrize("what", NO_LEASES)
def test_what_else_comes_leases_nothing(what: str) -> None:
    with pytest.raises(NotALeaseError):
        read(NO_LEASES[what])


@pytest.mark.parametrize("field", ["file", "name"])
def test_fields_without_overload_are_no_options(field: str) -> None:
    with pytest.raises(NotALeaseError, match="no lease time"):
        read(ack(options=KIND, **{field: TIME}))


def test_every_part_of_an_acknowledgement_leases_the_same_or_nothing() -> None:
    whole = frame4(message4(options=lease_options() + option(15, b"example.org")))
    taught = 0
    for length in range(len(whole)):
        try:
            assert read(whole[:length]) == [LEASE]
            taught += 1
        except NotALeaseError:
            pass
    assert 0 < taught < 30


def test_a_reply_leases_its_addresses() -> None:
    two = association(address6() + address6("2001:db8:20::51", 60))
    assert read(frame6()) == [LEASE6]
    assert [str(offer.address) for offer in read(frame6(message6(two)))] == [
        "2001:db8:20::50",
        "2001:db8:20::51",
    ]
    both = association(address6(), code=3) + association(address6("2001:db8:20::9"), code=4)
    assert read(frame6(message6(both))) == [LEASE6]
    good = association(address6()) + association(status(2) + address6("2001:db8:20::9"))
    assert read(frame6(message6(good + status(0)))) == [LEASE6]
    assert read_lease(frame6(), MAC)[1] == ip_address(LINK_LOCAL)


PREFIX = option6(26, bytes(8) + b"\x40" + bytes(16))


@pytest.mark.parametrize(
    "frame",
    [
        *(frame6(message6(kind=kind)) for kind in (1, 2, 3, 5, 10, 13)),
        frame6(mac=OTHER_MAC),
        frame6(mac=dhcp.ALL_MAC),
        frame6(to="2001:db8:20::11"),
        frame6(to="ff02::1"),
        frame6(ports=(546, 547)),
        frame6(message6(association(PREFIX, code=25))),
        frame6(message6(association(address6(), code=4))),
        frame6(message6(address6())),
        frame6(message6(association(address6(seconds=0)))),
        frame6(message6(association(address6(options=status(1))))),
        frame6(message6(association(address6()) + status(1))),
        frame6(message6(association(b""))),
        *(
            frame6(message6(association(address6(address))))
            for address in ("::", "::1", "fe80::1", "ff02::1", "::ffff:10.20.0.50", "64:ff9b::1")
        ),
    ],
)
def test_other_dhcpv6_messages_lease_nothing(frame: bytes) -> None:
    with pytest.raises(NotALeaseError):
        read(frame)


def test_every_part_of_a_reply_leases_the_same_or_nothing() -> None:
    whole = frame6(message6(association(address6()) + option6(23, bytes(16))))
    outcomes = set()
    for length in range(len(whole)):
        try:
            outcomes.add(tuple(read(whole[:length])))
        except NotALeaseError:
            outcomes.add(())
    assert outcomes == {(), (LEASE6,)}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([frame4(), frame6(), tagged(frame4(), 1)]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    st.integers(0, 700),
)
def test_no_frame_raises_anything_else(
    frame: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(frame)
    for place, value in changes:
        if place < len(data):
            data[place] = value
    try:
        for offer in read(bytes(data[:length])):
            assert offer.seconds > 0
    except NotALeaseError:
        pass
