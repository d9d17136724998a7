# SPDX-License-Identifier: Apache-2.0
"""Leases on disk: they end by their time, whatever happens to the clock, the host or the file."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from vgw.controller.learning.book import LeaseBook
from vgw.controller.learning.lease import INFINITE, Offer
from vgw.controller.learning.lease_time import Moment, now
from vgw.controller.paths import Paths

MAC, OTHER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:12"
A, B = "10.20.0.50", "10.20.0.51"


class Clocks:
    """Both clocks of a host, as a test sets them."""

    def __init__(self) -> None:
        self.moment = Moment("boot-1", 1000.0, 1_700_000_000.0)

    def __call__(self) -> Moment:
        return self.moment

    def passes(self, seconds: float) -> None:
        boot_id, boot, wall = self.moment
        self.moment = Moment(boot_id, boot + seconds, wall + seconds)

    def jumps(self, seconds: float) -> None:
        self.moment = self.moment._replace(wall=self.moment.wall + seconds)

    def reboots(self, after: float = 0) -> None:
        self.moment = Moment("boot-2", 5.0, self.moment.wall + after)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def places(tmp_path: Path) -> Paths:
    return Paths.from_environment({"VGW_STATE_DIR": str(tmp_path / "state")})


@pytest.fixture
def book(places: Paths, clocks: Clocks) -> LeaseBook:
    return LeaseBook(places, clocks)


def offer(address: str = A, seconds: int = 600) -> Offer:
    return Offer(ip_address(address), seconds, ip_address("10.20.0.1"))


def held(book: LeaseBook, vm: str = "web01", mac: str = MAC) -> list[str]:
    return [str(address) for address in book.addresses(vm, mac)]


def test_a_lease_holds_for_its_time(book: LeaseBook, clocks: Clocks) -> None:
    assert book.take("web01", MAC, offer())
    clocks.passes(599)
    assert held(book) == [A]
    assert book.next_end() == pytest.approx(1)
    clocks.passes(1)
    assert held(book) == []
    assert [(vm, str(lease.address)) for vm, lease in book.expire()] == [("web01", A)]
    assert book.expire() == []
    assert book.vms() == []


def test_a_renewal_moves_the_end_both_ways(book: LeaseBook, clocks: Clocks) -> None:
    book.take("web01", MAC, offer(seconds=600))
    assert not book.take("web01", MAC, offer(seconds=3600))
    clocks.passes(700)
    assert held(book) == [A]
    assert not book.take("web01", MAC, offer(seconds=10))
    clocks.passes(11)
    assert held(book) == []
    assert book.take("web01", MAC, offer()), "one that ended is new again"


def test_a_lease_is_of_one_mac(book: LeaseBook) -> None:
    book.take("web01", MAC, offer())
    assert held(book, mac=OTHER_MAC) == []
    assert held(book, vm="db01") == []


def test_leases_survive_the_process(book: LeaseBook, places: Paths, clocks: Clocks) -> None:
    book.take("web01", MAC, offer(B))
    book.take("web01", MAC, offer(A))
    book.take("web01", MAC, offer("2001:db8::5", INFINITE))
    again = LeaseBook(places, clocks)
    assert held(again) == [A, B, "2001:db8::5"]
    clocks.passes(10**9)
    assert held(again) == ["2001:db8::5"]


@pytest.mark.parametrize("jump", [86400, -86400, 10**8])
def test_catalogue_M33_a_jump_of_the_time_of_day_ends_no_lease(
    book: LeaseBook, clocks: Clocks, jump: int
) -> None:
    book.take("web01", MAC, offer())
    clocks.jumps(jump)
    clocks.passes(599)
    assert held(book) == [A]
    clocks.passes(2)
    assert held(book) == []


def test_after_a_reboot_the_time_of_day_decides(book: LeaseBook, clocks: Clocks) -> None:
    book.take("web01", MAC, offer())
    clocks.passes(100)
    clocks.reboots(after=100)
    assert book.next_end() == pytest.approx(400)
    clocks.jumps(-86400)
    assert book.next_end() == pytest.approx(600), "never longer than it was given"
    clocks.jumps(2 * 86400)
    assert held(book) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 64, None])
def test_catalogue_M32_a_damaged_file_counts_as_none(
    book: LeaseBook, places: Paths, damage: bytes | None
) -> None:
    book.take("web01", MAC, offer())
    file = places.lease_file("web01")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"10.20.0.50", b"10.20.0.99") if damage is None else damage)
    assert held(book) == []
    file.write_bytes(whole)
    assert held(book) == [A]
    assert book.take("web01", MAC, offer(B))
    assert held(book) == [A, B]


def test_what_is_forgotten_is_gone(book: LeaseBook, places: Paths) -> None:
    book.take("web01", MAC, offer())
    book.forget("web01")
    assert held(book) == []
    assert not places.leases.exists()


def test_the_clock_of_the_host() -> None:
    first, second = now(), now()
    assert first.boot_id == second.boot_id
    assert 0 <= second.boot - first.boot < 60
