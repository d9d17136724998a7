# SPDX-License-Identifier: Apache-2.0
"""Judging leases in a flood: each endpoint has its own room, and the log does not fill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.controller import dhcp
from vgw import abi
from vgw.controller.alarms import Alarms
from vgw.controller.events import LogWriter, read_log
from vgw.controller.learning.book import LeaseBook
from vgw.controller.learning.learner import MAX_LEARNED, Learner, learned_max
from vgw.controller.manifest import EndpointEntry, Manifest, save_manifest
from vgw.controller.overlay import Overlay
from vgw.controller.paths import Paths
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

MAC, OTHER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:12"
TEXT = f"""
schema: vgw/v1
vms:
  web01: {{interfaces: [{{name: tap0, mac: '{MAC}', addresses: learn}}]}}
  web02: {{interfaces: [{{name: tap1, mac: '{OTHER_MAC}', addresses: learn}}]}}
"""


class Judge:
    """A learner of two VMs, whose endpoints have the numbers 1 and 2."""

    def __init__(self, directory: Path) -> None:
        self.paths = Paths.from_environment(
            {"VGW_STATE_DIR": str(directory)}, log_file=directory / "log"
        )
        self.log = LogWriter(self.paths.log_file)
        self.alarms = Alarms(self.log)
        self.document = parse_sources([("p", TEXT)])
        self.overlay = Overlay(self.paths)
        self.book: LeaseBook = self.overlay.book
        self.learner = Learner(self.paths, self.book, self.log, self.alarms)
        for number, (name, vm) in enumerate(self.document.vms.items(), start=1):
            (interface,) = vm.interfaces
            entry = {interface.name: EndpointEntry(number, interface)}
            save_manifest(self.paths.manifest(name), Manifest(name, endpoints=entry))

    def hear(self, endpoint: int, address: str, mac: str, reason: abi.Reason) -> None:
        event = abi.Event(endpoint=endpoint, reason=reason, kind=abi.EventKind.LEASE)
        message = dhcp.message4(address, client=abi.pack_mac(mac))
        self.learner.heard(event, dhcp.frame4(message))

    def judge(self) -> PolicyDocument:
        self.learner.judge(lambda: self.overlay.laid(self.document))
        return self.overlay.laid(self.document)

    def held(self, vm: str, mac: str) -> list[str]:
        return [str(each) for each in self.book.addresses(vm, mac)]

    def events(self) -> list[str]:
        self.log.flush()
        return [each["event"] for each in read_log(self.paths.log_file)]


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    made = Judge(tmp_path)
    yield made
    made.log.close()


def test_a_lease_is_laid_over_the_document(judge: Judge) -> None:
    before = judge.judge()
    judge.hear(1, "10.20.0.50", MAC, abi.Reason.DHCP)
    after = judge.judge()
    assert [str(each) for each in after.vms["web01"].interfaces[0].addresses] == ["10.20.0.50"]
    assert after.vms["web02"] == before.vms["web02"]
    assert judge.overlay.laid(judge.document) is after, "nothing changed since"


def test_two_vms_cannot_have_one_address(judge: Judge) -> None:
    judge.hear(1, "10.20.0.50", MAC, abi.Reason.DHCP)
    judge.hear(2, "10.20.0.50", OTHER_MAC, abi.Reason.DHCP)
    judge.judge()
    assert judge.held("web01", MAC) == ["10.20.0.50"]
    assert judge.held("web02", OTHER_MAC) == []
    (alarm,) = judge.alarms.current()
    assert (alarm.alarm, alarm.vm) == ("lease_conflict", "web02")


@pytest.mark.parametrize("reason", [r for r in abi.Reason if r is not abi.Reason.DHCP])
def test_only_an_answer_that_was_asked_of_all_teaches(judge: Judge, reason: abi.Reason) -> None:
    judge.hear(1, "10.20.0.50", MAC, reason)
    judge.judge()
    assert judge.held("web01", MAC) == []
    assert judge.learner.refused["web01", "tap0"] == 1


def test_a_flood_at_one_vm_takes_nothing_from_another(judge: Judge) -> None:
    for number in range(1000):
        judge.hear(1, f"10.30.{number >> 8}.{number & 255 or 1}", MAC, abi.Reason.DHCP)
    judge.hear(2, "10.20.0.50", OTHER_MAC, abi.Reason.DHCP)
    judge.hear(77, "10.20.0.51", MAC, abi.Reason.DHCP)  # an endpoint that nobody knows
    judge.judge()

    assert len(judge.held("web01", MAC)) == MAX_LEARNED
    assert judge.held("web02", OTHER_MAC) == ["10.20.0.50"]
    assert judge.learner.refused["web01", "tap0"] == 1000 - MAX_LEARNED - 1  # one came twice
    assert judge.events().count("alarm") == 1
    assert judge.events().count("lease") == MAX_LEARNED + 1


def test_there_is_room_for_what_may_be_learned() -> None:
    pairs = ", ".join(f"{{address: 10.9.0.{n}}}" for n in range(20))
    text = TEXT.replace("addresses: learn", f"addresses: learn, allowed_pairs: [{pairs}]", 1)
    (crowded,) = parse_sources([("p", text)]).vms["web01"].interfaces
    (free,) = parse_sources([("p", TEXT)]).vms["web01"].interfaces
    assert learned_max(free) == MAX_LEARNED
    assert learned_max(crowded) == abi.MAX_ADDRESSES - 1 - 20
