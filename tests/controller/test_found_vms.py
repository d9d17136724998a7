# SPDX-License-Identifier: Apache-2.0
"""The controller and the VMs that are found: which it protects, how, and at what cost."""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.controller.process import Controller, eventually
from tests.controller.test_finding_sources import MAC, OTHER_MAC, holder
from tests.patience import PATIENCE
from vgw.controller.alarms import Alarms
from vgw.controller.changes import Changes
from vgw.controller.events import LogWriter, read_log
from vgw.controller.facts import DIFFERS, Facts
from vgw.controller.finding import search as searches
from vgw.controller.finding.found import FoundInterface, FoundVm, SourceError
from vgw.controller.finding.proxmox import Proxmox
from vgw.controller.finding.search import Look, Search
from vgw.controller.learning.lease import Offer
from vgw.controller.metrics import ApplyTimes
from vgw.controller.operations import Operations
from vgw.controller.overlay import concerned
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.verbs import Verbs
from vgw.errors import VgwError
from vgw.policy.model import Finder

POLICY = "schema: vgw/v1\nvms: {web01: {interfaces: [{name: tap0}]}}\n"
PROTECT_ALL = "schema: vgw/v1\nprotect: all\nfind: [proxmox]\n"
FLOOD = 1000


class Canned:
    """A source that finds what a test says, and counts how often it is asked."""

    finder = Finder.LIBVIRT

    def __init__(self, *vms: FoundVm) -> None:
        self.vms: Sequence[FoundVm] = vms
        self.error: Exception | None = None
        self.scans = 0
        self.hold = threading.Event()
        self.hold.set()
        self.changed: Callable[[], None] = lambda: None

    def scan(self) -> Sequence[FoundVm]:
        self.scans += 1
        assert self.hold.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.vms

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def close(self) -> None:
        pass


def vm(name: str, *interfaces: tuple[str, str | None]) -> FoundVm:
    return FoundVm(name, "libvirt", True, tuple(FoundInterface(*each) for each in interfaces))


# --- following sources ----------------------------------------------------------------------------


@pytest.fixture
def followed() -> Iterator[tuple[Canned, Search, queue.SimpleQueue[str]]]:
    """A source that is followed, after its first scan."""
    source, changes = Canned(vm("a", ("tap1", None))), queue.SimpleQueue[str]()
    search = Search(lambda _: source)
    search.follow((Finder.LIBVIRT,), lambda: changes.put("changed"))
    changes.get(timeout=PATIENCE)
    yield source, search, changes
    source.hold.set()
    search.close()


Followed = tuple[Canned, Search, "queue.SimpleQueue[str]"]
BOTH = (Finder.LIBVIRT, Finder.QEMU)


def test_what_a_source_says_is_heard(followed: Followed) -> None:
    source, search, changes = followed
    assert search.found(BOTH) == (vm("a", ("tap1", None)),)
    source.vms = (vm("b"),)
    source.changed()
    changes.get(timeout=PATIENCE)
    assert search.found(BOTH) == (vm("b"),)
    search.follow((), lambda: None)
    assert search.found(BOTH) == ()


def test_what_was_found_holds_while_a_source_fails(followed: Followed) -> None:
    source, search, changes = followed
    for error in (SourceError("gone"), RuntimeError("a bug")):
        source.error = error
        search.look()
        changes.get(timeout=PATIENCE)
        assert str(error) in search.problems[Finder.LIBVIRT]
        assert search.found(BOTH) == (vm("a", ("tap1", None)),)
    source.error = None
    search.look()
    changes.get(timeout=PATIENCE)
    assert search.problems == {}


def test_a_source_that_hangs_keeps_nobody_waiting(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, search, _ = followed
    monkeypatch.setattr(searches, "_END_SECONDS", 0.05)
    scans = source.scans
    source.hold.clear()
    search.look()
    eventually("it hangs", lambda: source.scans > scans)
    for _ in range(FLOOD):
        search.look()
    assert search.found(BOTH) == (vm("a", ("tap1", None)),)
    search.close()


def test_a_thousand_reasons_to_look_are_few_looks(followed: Followed) -> None:
    source, search, _ = followed
    eventually("the first scans are over", lambda: source.scans)
    before = source.scans
    for _ in range(FLOOD):
        source.changed()
        search.look()
    eventually("it looked", lambda: source.scans > before)
    assert source.scans - before <= 5


def test_what_is_told_holds_until_its_interface_goes(followed: Followed) -> None:
    _, search, _ = followed
    search.tell(vm("new", ("tap9", MAC)))
    assert search.found(BOTH)[0] == vm("new", ("tap9", MAC))
    search.forget(["tap8"])
    assert len(search.found(BOTH)) == 2
    search.forget(["tap9"])
    assert len(search.found(BOTH)) == 1


def test_a_process_that_does_not_stay_looks_once() -> None:
    source = Canned(vm("a"))
    look = Look(lambda _: source)
    look.tell(vm("b"))
    assert look.found((Finder.LIBVIRT,)) == look.found((Finder.LIBVIRT,)) == (vm("b"), vm("a"))
    assert source.scans == 1
    source.error = SourceError("gone")
    failing = Look(lambda _: source)
    assert failing.found((Finder.LIBVIRT,)) == ()
    assert failing.problems == {Finder.LIBVIRT: "gone"}


# --- protecting them ------------------------------------------------------------------------------


class Node:
    """A controller's operations in this process, and what it looks at."""

    def __init__(self, paths: Paths, make: Callable[[Finder], Any]) -> None:
        self.paths = paths
        self.log = LogWriter(paths.log_file)
        self.alarms = Alarms(self.log)
        self.facts = Facts(paths, self.log, self.alarms, make)
        self.host = Host(paths, overlay=self.facts.overlay)
        self.changes = Changes(self.host, self.log, ApplyTimes(), self.alarms, facts=self.facts)
        self.operations = Operations(self.changes)
        self.found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def take_change(self) -> None:
        """Wait until a source finds something else, and act on it."""
        self.found.get(timeout=PATIENCE)
        self.operations.facts_changed()

    def vms(self) -> dict[str, Any]:
        answer = Verbs(self.changes).by_name()["vms"](None)  # type: ignore[arg-type]
        assert isinstance(answer, dict)
        return {row["vm"]: row for row in answer["vms"]}

    def mac_guard(self, name: str) -> tuple[str, bool]:
        """Return the MAC of a VM's only endpoint in the kernel, and whether it is guarded."""
        (endpoint,) = self.host.open_endpoints(name)
        with endpoint:
            config = endpoint.maps.config()
        return bytes(config.mac)[:6].hex(":"), bool(config.guards & 1)


@pytest.fixture
def start(paths: Paths) -> Iterator[Callable[..., Node]]:
    """Start operations with sources of a test's own; everything is detached at the end."""
    with contextlib.ExitStack() as stack:

        def make(
            make_source: Callable[[Finder], Any], inventory: str, policy: str = POLICY
        ) -> Node:
            paths.policy.write_text(policy)
            paths.inventory.write_text(inventory)
            node = Node(paths, make_source)
            stack.callback(node.log.close)
            stack.enter_context(node.facts.followed(lambda: node.found.put("changed")))
            stack.callback(node.host.detach_all)
            node.operations.reload()
            return node

        yield make


Start = Callable[..., Node]


def make_taps(names: Sequence[str]) -> None:
    """Make persistent TAPs; they go with their namespace."""
    batch = "".join(f"tuntap add dev {name} mode tap\n" for name in names)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


@pytest.mark.bpf
def test_catalogue_N18_a_flood_of_interfaces_named_like_vms(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "pve"
    (config / "qemu-server").mkdir(parents=True)
    (config / "qemu-server/500.conf").write_text(f"name: real\nnet0: virtio={MAC},bridge=b\n")
    scans = itertools.count()

    class Counting(Proxmox):
        def scan(self) -> Sequence[FoundVm]:
            next(scans)
            return super().scan()

    make_taps(["tap500i0"])
    node = start(lambda _: Counting(config), PROTECT_ALL)
    node.take_change()
    assert node.host.attached() == ["real"]

    fakes = [f"tap{number}i0" for number in range(1000, 1000 + FLOOD)]
    make_taps(fakes)
    before = next(scans)
    for name in fakes:  # the worst case: each one comes by itself
        node.operations.links_changed({name: socket.if_nametoindex(name)}, ())
    node.operations.facts_changed()
    eventually("it looked again", lambda: next(scans) > before + 1)

    assert node.host.attached() == ["real"], "only what its configuration names is touched"
    assert set(node.vms()) == {"real", "web01"}
    pinned = [path for path in (node.paths.pins).iterdir() if path.is_dir()]
    assert len(pinned) == 2, "the pins of one VM, and the policies that VMs share"


@pytest.mark.bpf
def test_a_found_vm_gets_the_defaults_and_its_mac_is_guarded(start: Start) -> None:
    source = Canned(vm("app", ("tap7", MAC)), vm("off"))
    make_taps(["tap7"])
    node = start(lambda _: source, PROTECT_ALL.replace("proxmox", "libvirt"))
    node.take_change()

    assert node.host.attached() == ["app"]
    (status,) = node.host.status()["vms"]
    assert (status["mode"], status["named"]) == ("enforce", False)
    assert node.mac_guard("app") == (MAC, True)
    rows = node.vms()
    assert (rows["app"]["matches"], rows["app"]["source"]) == ("defaults", "libvirt")
    assert rows["app"]["interfaces"][0]["protected"]
    assert rows["off"]["running"] is True
    assert rows["web01"]["interfaces"][0]["reason"] == "it does not exist"


@pytest.mark.bpf
def test_without_protect_all_a_found_vm_is_left_alone(start: Start) -> None:
    make_taps(["tap7"])
    node = start(lambda _: Canned(vm("app", ("tap7", MAC))), "schema: vgw/v1\nfind: [libvirt]\n")
    node.take_change()
    assert node.host.attached() == []
    row = node.vms()["app"]
    assert row["matches"] is None
    assert "does not say `protect: all`" in row["reason"]
    assert not row["interfaces"][0]["protected"]


@pytest.mark.bpf
def test_a_written_vm_is_protected_where_it_is_found(start: Start) -> None:
    source = Canned()
    policy = f"schema: vgw/v1\nvms: {{web01: {{interfaces: [{{mac: '{MAC}', vlans: [7]}}]}}}}\n"
    node = start(lambda _: source, "schema: vgw/v1\nfind: [libvirt]\n", policy)
    make_taps(["vnet3"])
    node.operations.links_changed({"vnet3": socket.if_nametoindex("vnet3")}, ())
    assert node.host.attached() == []

    source.vms = (vm("web01", ("vnet3", MAC)),)
    source.changed()
    node.take_change()
    assert node.host.attached() == ["web01"]
    assert node.mac_guard("web01") == (MAC, True)
    (endpoint,) = node.host.open_endpoints("web01")
    with endpoint:
        assert endpoint.maps.config().vlans[0] == 7


@pytest.mark.bpf
@pytest.mark.parametrize("interfaces", [f"[{{mac: '{MAC}', vlans: [7]}}]", "[]"])
def test_what_was_found_stays_protected_before_it_is_found_again(
    start: Start, interfaces: str
) -> None:
    policy = f"schema: vgw/v1\nvms: {{web01: {{interfaces: {interfaces}}}}}\n"
    inventory = "schema: vgw/v1\nfind: [libvirt]\n"
    source = Canned(vm("web01", ("vnet3", MAC)))
    make_taps(["vnet3"])
    start(lambda _: source, inventory, policy).take_change()

    away = Canned()
    away.hold.clear()
    node = start(lambda _: away, inventory, policy + "defaults: {ingress: accept}\n")
    assert node.host.attached() == ["web01"]
    assert node.mac_guard("web01") == (MAC, True)
    rows = node.vms()["web01"]["interfaces"]
    assert [row["name"] for row in rows if row["protected"]] == ["vnet3"]
    away.hold.set()


@pytest.mark.bpf
def test_a_vm_that_is_only_found_any_more_keeps_its_last_policy(start: Start) -> None:
    inventory = PROTECT_ALL.replace("proxmox", "libvirt")
    source = Canned(vm("web01", ("tap0", MAC)))
    make_taps(["tap0"])
    node = start(lambda _: source, inventory)
    node.take_change()
    node.paths.policy.write_text("schema: vgw/v1\ndefaults: {ingress: accept}\n")
    node.operations.reload()

    assert [each.alarm for each in node.alarms.current()] == ["vm_not_in_policy"]
    assert node.mac_guard("web01") == (MAC, True)
    node.host.detach("web01")
    node.operations.reload()
    assert [each["named"] for each in node.host.status()["vms"]] == [False], "by the defaults"
    assert node.alarms.current() == []


@pytest.mark.bpf
def test_what_is_found_otherwise_raises_an_alarm_and_changes_nothing(start: Start) -> None:
    source = Canned(vm("web01", ("tap0", OTHER_MAC)))
    policy = POLICY.replace("name: tap0", f"name: tap0, mac: '{MAC}'")
    make_taps(["tap0"])
    node = start(lambda _: source, "schema: vgw/v1\nfind: [libvirt]\n", policy)
    node.take_change()

    assert node.mac_guard("web01") == (MAC, True)
    (alarm,) = node.alarms.current()
    assert (alarm.alarm, alarm.vm, alarm.interface) == (DIFFERS, "web01", "tap0")
    source.vms = (vm("web01", ("tap0", MAC)),)
    source.changed()
    node.take_change()
    assert node.alarms.current() == []
    source.error = SourceError("libvirt is away")
    source.changed()
    node.take_change()
    assert [each.alarm for each in node.alarms.current()] == ["find_libvirt"]
    assert node.host.attached() == ["web01"]
    events = [each["event"] for each in read_log(node.paths.log_file)]
    assert events.count("alarm") == 2


GROUPS = """
schema: vgw/v1
vms:
  web01: {interfaces: [{name: tap0, mac: '52:54:00:00:00:11', addresses: learn}], labels: {g: x}}
  peer: {interfaces: [{name: tap1}]}
  other: {interfaces: [{name: tap2}]}
groups: {g: {labels: {g: x}}}
policies:
  - name: p
    tier: vm
    applies_to: {vms: [peer]}
    ingress: [{name: r, action: accept, from: [g], services: [tcp/80]}]
  - name: q
    tier: vm
    applies_to: {all: true}
    ingress: [{name: r, action: accept, services: [tcp/22]}]
"""


@pytest.mark.bpf
def test_a_lease_changes_those_vms_only_that_it_concerns(start: Start) -> None:
    make_taps(["tap0", "tap1", "tap2"])
    node = start(Canned, "schema: vgw/v1\n", GROUPS)
    before = {row["vm"]: row["generation"] for row in node.host.status()["vms"]}
    assert set(before) == {"web01", "peer", "other"}

    node.facts.overlay.book.take(
        "web01", MAC, Offer(ip_address("10.20.0.50"), 2, ip_address("10.20.0.1"))
    )
    node.operations.facts_changed()
    after = {row["vm"]: row["generation"] for row in node.host.status()["vms"]}
    assert {name for name in after if after[name] != before[name]} == {"web01", "peer"}

    node.found.get(timeout=PATIENCE)  # the lease is over
    eventually("it is", lambda: not node.facts.overlay.book.addresses("web01", MAC))
    node.operations.facts_changed()
    last = {row["vm"]: row["generation"] for row in node.host.status()["vms"]}
    assert {name for name in last if last[name] != after[name]} == {"web01", "peer"}


def test_the_same_document_concerns_nobody() -> None:
    from vgw.policy.parse import parse_sources  # noqa: PLC0415

    document = parse_sources([("p", GROUPS)])
    assert concerned(document, document, ["stranger"]) == set()


@pytest.mark.bpf
def test_a_qemu_that_starts_under_a_controller_is_protected(paths: Paths) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    paths.policy.write_text("schema: vgw/v1\nvms: {}\n")
    paths.inventory.write_text("schema: vgw/v1\nprotect: all\nfind: [qemu]\n")
    controller = Controller(paths, 9477)
    try:
        device = f"virtio-net-pci,netdev=n,mac={MAC}"
        words = ("-name", "guest=web01", "-netdev", "tap,id=n,ifname=tap0", "-device", device)
        with holder("/usr/bin/qemu-system-x86_64", "tap0", *words):
            eventually("it is protected", lambda: "web01" in controller.attached(), 60)
            (row,) = controller.client.vms()["vms"]
            assert (row["vm"], row["source"], row["matches"]) == ("web01", "qemu", "defaults")
            assert row["interfaces"][0]["mac"] == MAC
        eventually("it is gone", lambda: not controller.attached())
    finally:
        controller.end(signal.SIGTERM)
        with contextlib.suppress(VgwError):
            Host(paths).detach_all()


@pytest.mark.bpf
@pytest.mark.parametrize("name", ["x" * 65536, "a\n\x1b[31m", "../../etc"])
def test_catalogue_N6_a_hostile_name_spoils_no_report(start: Start, name: str) -> None:
    make_taps(["tap7"])
    node = start(
        lambda _: Canned(vm(name, ("tap7", MAC))), PROTECT_ALL.replace("proxmox", "libvirt")
    )
    node.take_change()
    assert node.host.attached() == []
    (row,) = (each for each in node.vms().values() if each["source"])
    assert row["vm"].isprintable()
    assert len(row["vm"]) <= 66
    assert row["reason"] == "its name is none that vgw can use"
    assert [each.vm for each in node.alarms.current()] == [None]
