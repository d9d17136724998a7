# SPDX-License-Identifier: Apache-2.0
"""What somebody takes off, adds or unpins while the controller runs is noticed and put right."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.observe import program_ids, received, row, send_to_vm
from tests.controller.policies import document, from_vm, to_vm
from tests.controller.process import eventually
from tests.controller.test_foreign import foreign_program
from tests.controller.test_interface_names import bring_back, rename
from tests.controller.test_links import returning
from vgw import libbpf
from vgw.controller import links, links_netlink, watch
from vgw.controller.alarms import Alarms
from vgw.controller.changes import Changes
from vgw.controller.events import LogWriter, read_log
from vgw.controller.inspection import Outcome
from vgw.controller.metrics import ApplyTimes
from vgw.controller.operations import Operations
from vgw.controller.paths import Paths
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.controller.restore import Suspect
from vgw.controller.watch import RESTORE_SECONDS, AttachmentWatch
from vgw.errors import KernelError, VgwError
from vgw.libbpf import AttachType
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
Veth = Callable[[str], str]
TEXT = """
schema: vgw/v1
vms:
  web01: {interfaces: [{name: tap0, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]}
policies:
  - name: base
    tier: vm
    applies_to: {all: true}
    ingress: [{name: http, action: accept, services: [tcp/80]}]
defaults: {ingress: drop, egress: accept}
"""


class Watched:
    """A host whose attachments are watched as the controller does."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.log = LogWriter(host.paths.log_file)
        self.alarms = Alarms(self.log)
        self.changes = Changes(host, self.log, ApplyTimes(), self.alarms)
        self.operations = Operations(self.changes)
        self.watch = AttachmentWatch(host.paths, self.operations.inspect)
        self.directory = host.paths.endpoint_dir("web01", "tap0")

    def start(self, hook: Hook | None = None) -> None:
        """Protect web01 on tap0, watch, and wait until the watch has seen it."""
        self.host.paths.policy.write_text(TEXT)
        if hook is not None:
            self.host.attach(document(), "web01", hook=hook)
        self.operations.reload()
        self.watch.start()
        eventually("it is watched", self.is_known)

    def is_known(self) -> bool:
        known = self.watch._watched.get(("web01", "tap0"))
        return known is not None and known.seen is not None

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """Break something in the block; it is shown as broken, and put back with all it had."""
        before = program_ids(self.host)
        with self.changes.one():  # for so long nothing is put back
            yield
            assert not self.attached()
            shown = [reading.attached for reading in read_endpoints(self.host)]
            assert shown in ([], [False])
        eventually("put back", self.attached)
        assert program_ids(self.host) == before, "other programs, with other maps"
        assert row(self.host)["conntrack"]["entries"] == 1
        eventually("recorded", lambda: self.records("restored"))
        (text,) = self.texts()
        assert "somebody took away and vgw put back" in text
        assert self.records("alarm")[0]["text"].startswith("not protected")

    def attached(self) -> bool:
        # While an endpoint is made anew there is none for a moment.
        with contextlib.suppress(VgwError, IndexError):
            return bool(row(self.host)["attached"])
        return False

    def texts(self, alarm: str = "detached") -> list[str]:
        return [each.text for each in self.alarms.current() if each.alarm == alarm]

    def records(self, event: str) -> list[dict[str, Any]]:
        return [found for found in read_log(self.host.paths.log_file) if found["event"] == event]

    def stop(self) -> None:
        self.changes.finish()
        self.watch.stop()
        self.log.close()


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than the controller does, but where the time itself is tested."""
    if "stated_time" not in request.node.name:
        monkeypatch.setattr(watch, "WATCH_SECONDS", 0.3)
        monkeypatch.setattr(watch, "_XDP_SECONDS", 0.3)


@pytest.fixture(params=["link", "netlink"])
def watched(paths: Paths, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A host on a kernel with links, and on one without."""
    made = Watched(Host(paths, prefer_link=request.param == "link"))
    yield made
    made.stop()


@pytest.fixture
def with_links(paths: Paths) -> Iterator[Watched]:
    made = Watched(Host(paths))
    yield made
    made.stop()


@pytest.fixture
def without_links(paths: Paths) -> Iterator[Watched]:
    made = Watched(Host(paths, prefer_link=False))
    yield made
    made.stop()


def detach_link(watched: Watched, path: str) -> None:
    """Do what `bpftool link detach` does."""
    with links.opened(watched.directory / f"link_{path}") as fd:
        libbpf.link_detach(fd)


def command(text: str) -> str:
    """Run a command and return what it printed."""
    return run(*text.split())


def filters(vm: int) -> bool:
    """Tell whether packets to the VM are judged."""
    passed = []
    for dport in (80, 22):
        frame = to_vm(dport=dport, sport=41000)
        send_to_vm("tap0", frame)
        passed.append(received(vm, frame))
    return passed == [True, False]


def test_catalogue_M23_what_is_detached_is_back_in_the_stated_time(
    with_links: Watched, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is back by the first look after it was taken off, and that comes soon enough."""
    assert watch.WATCH_SECONDS + watch._STOP_SECONDS + watch._PAUSE_SECONDS < RESTORE_SECONDS
    scan = with_links.watch._scan
    attached: list[bool] = []

    def noted() -> object:
        attached.append(with_links.attached())
        return scan()

    monkeypatch.setattr(with_links.watch, "_scan", noted)
    tap("tap0")
    with_links.start()
    send_to_vm("tap0", to_vm())
    attached.clear()
    with with_links.breaking():
        detach_link(with_links, "to_vm")
    assert attached.count(False) <= 1


@pytest.mark.parametrize(
    ("hook", "path"), [(Hook.XDP, "from_vm"), (Hook.XDP, "both"), (Hook.TC, "to_vm")]
)
def test_catalogue_M23_a_link_that_is_detached_is_put_back(
    with_links: Watched, tap: Tap, hook: Hook, path: str
) -> None:
    vm = tap("tap0")
    with_links.start(hook)
    send_to_vm("tap0", to_vm())

    with with_links.breaking():
        for each in ("from_vm", "to_vm") if path == "both" else (path,):
            detach_link(with_links, each)

    assert filters(vm)


@pytest.mark.parametrize(
    "commands",
    [
        "tc filter del dev tap0 ingress",
        "tc filter del dev tap0 egress",
        "tc qdisc del dev tap0 clsact",
        "tc qdisc del dev tap0 clsact; tc qdisc add dev tap0 ingress",
    ],
)
def test_catalogue_M21_M22_filters_and_qdiscs_that_are_removed_are_put_back(
    without_links: Watched, tap: Tap, commands: str
) -> None:
    vm = tap("tap0")
    without_links.start()
    send_to_vm("tap0", to_vm())

    with without_links.breaking():
        for each in commands.split("; "):
            command(each)

    assert filters(vm)


def test_catalogue_M23_xdp_that_is_switched_off_is_put_back(
    without_links: Watched, tap: Tap
) -> None:
    tap("tap0")
    without_links.start(Hook.XDP)
    send_to_vm("tap0", to_vm())
    with without_links.breaking():
        command("ip link set dev tap0 xdp off")


def test_catalogue_M20_M23_where_xdp_is_replaced_packets_are_judged_at_tc(
    without_links: Watched, tap: Tap
) -> None:
    vm = tap("tap0")
    without_links.start(Hook.XDP)
    ifindex = socket.if_nametoindex("tap0")
    foreign = returning(libbpf.ProgType.XDP, 2)
    with without_links.changes.one():
        command("ip link set dev tap0 xdp off")
        links_netlink.set_xdp(ifindex, foreign, libbpf.XDP_NATIVE)

    eventually("judged at tc", without_links.attached)
    there = row(without_links.host)
    theirs = libbpf.prog_info(foreign).id
    os.close(foreign)
    assert there["from_vm"]["hook"] == "tc"
    assert libbpf.xdp_program(ifindex) == (theirs, "native"), "theirs stays"
    assert there["drops"] == 0
    os.write(vm, from_vm(src="10.20.0.99"))
    assert row(without_links.host)["drops"] == 1
    eventually("said", lambda: without_links.texts("foreign"))
    assert f"from_vm xdp {theirs}" in without_links.texts("foreign")[0]


def test_catalogue_M21_what_cannot_be_put_back_is_said_until_it_can(
    without_links: Watched, tap: Tap
) -> None:
    tap("tap0")
    without_links.start()
    with without_links.changes.one():
        command("tc filter del dev tap0 egress")
        command("tc filter add dev tap0 egress prio 1 protocol all u32 match u32 0 0 classid 1:1")

    def said() -> bool:
        texts = without_links.texts()
        return bool(texts) and texts[0].startswith("not protected") and "no room" in texts[0]

    eventually("said", said)
    assert not without_links.attached()
    assert "u32" in command("tc filter show dev tap0 egress"), "theirs stays"
    command("tc filter del dev tap0 egress prio 1")
    eventually("put back", without_links.attached)


def test_catalogue_M20_M21_what_others_add_is_said_and_stays(watched: Watched, tap: Tap) -> None:
    tap("tap0")
    watched.start()
    assert watched.texts("foreign") == []
    if row(watched.host)["from_vm"]["mode"] != "clsact":
        command("tc qdisc add dev tap0 clsact")
    command("tc filter add dev tap0 egress prio 7 protocol all u32 match u32 0 0 classid 1:1")
    eventually("the filter", lambda: "to_vm u32 7" in str(watched.texts("foreign")))
    command("tc filter del dev tap0 egress prio 7")
    eventually("its end", lambda: not watched.texts("foreign"))

    for kind, at in (
        (libbpf.ProgType.SCHED_CLS, AttachType.TCX_EGRESS),
        (libbpf.ProgType.XDP, AttachType.XDP),
    ):
        with foreign_program(kind, at) as theirs:
            said = eventually(f"{at.name}", lambda: watched.texts("foreign"))
            assert f" {theirs};" in said[0]
        eventually(f"end of {at.name}", lambda: not watched.texts("foreign"))
    assert watched.attached()
    assert watched.texts() == []


def test_what_changes_while_an_endpoint_is_inspected_is_noticed(
    with_links: Watched, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")
    with_links.start()
    inspect = with_links.operations.inspect
    with contextlib.ExitStack() as theirs:

        def inspect_and_end(suspects: Sequence[Suspect]) -> Collection[Suspect]:
            found = inspect(suspects)
            if with_links.texts("foreign"):
                theirs.close()
            return found

        monkeypatch.setattr(with_links.watch, "_inspect", inspect_and_end)
        theirs.enter_context(
            foreign_program(libbpf.ProgType.SCHED_CLS, AttachType.TCX_EGRESS),
        )
        eventually("said", lambda: with_links.records("alarm"))
        eventually("its end", lambda: not with_links.texts("foreign"))


@pytest.mark.parametrize(
    "removed", ["link_to_vm", "prog_from_vm", "conntrack", "the endpoint", "everything"]
)
def test_catalogue_M21_pins_that_are_removed_are_made_again(
    with_links: Watched, tap: Tap, removed: str
) -> None:
    vm = tap("tap0")
    with_links.start()
    send_to_vm("tap0", to_vm())
    ifindex = socket.if_nametoindex("tap0")
    before = program_ids(with_links.host)

    with with_links.changes.one():
        if removed == "the endpoint":
            shutil.rmtree(with_links.directory)
        elif removed == "everything":
            shutil.rmtree(with_links.host.paths.pins)
        else:
            (with_links.directory / removed).unlink()
        assert libbpf.tcx_programs(ifindex, AttachType.TCX_EGRESS) == before[1:], "still on"
        assert filters(vm)

    def whole() -> bool:
        there = with_links.host.attached() and row(with_links.host)
        return bool(there and there["attached"] and there["to_vm"]["link"])

    eventually("pinned again", whole)
    assert program_ids(with_links.host) == before
    assert row(with_links.host)["conntrack"]["entries"] == 2
    eventually("recorded", lambda: with_links.records("restored"))
    assert filters(vm)


def test_a_damaged_endpoint_is_made_anew(without_links: Watched, tap: Tap) -> None:
    vm = tap("tap0")
    without_links.start()
    (without_links.directory / "conntrack").unlink()
    eventually("made anew", lambda: without_links.records("restored"))
    assert without_links.attached()
    assert filters(vm)


def test_catalogue_M15_nothing_is_put_back_on_another_interface(
    watched: Watched, tmp_path: Any
) -> None:
    command("ip link add tap0 index 777 type veth peer name tap0-p")
    run("ip", "link", "set", "tap0", "up")
    run("ip", "link", "set", "tap0-p", "up")
    watched.start()
    send_to_vm("tap0", to_vm())
    before = program_ids(watched.host)
    batch = tmp_path / "batch"
    batch.write_text("link del tap0\nlink add tap0 index 777 type veth peer name tap0-p\n")
    with watched.changes.one():
        run("ip", "-batch", str(batch))

    eventually("protected", watched.attached)
    assert set(program_ids(watched.host)).isdisjoint(before)
    assert row(watched.host)["conntrack"]["entries"] == 0


def test_the_watch_lets_go_of_what_is_detached(watched: Watched, tap: Tap) -> None:
    tap("tap0")
    watched.start()
    before = program_ids(watched.host)
    watched.host.detach("web01")
    eventually("let go", lambda: not watched.watch._watched)
    for program in before:
        with pytest.raises(KernelError):
            os.close(libbpf.prog_fd_by_id(program))
    assert watched.texts() == []
    assert watched.records("alarm") == []


def test_catalogue_M17_an_interface_that_is_moved_away_is_an_alarm_until_it_is_back(
    with_links: Watched, veth: Veth, elsewhere: str
) -> None:
    veth("tap0")
    with_links.start()
    run("ip", "link", "set", "tap0", "netns", elsewhere)
    eventually("said", lambda: with_links.texts("moved"))
    assert with_links.texts() == []
    bring_back(elsewhere)
    eventually("its end", lambda: not with_links.texts("moved"))
    assert with_links.attached()


def test_catalogue_M17_an_interface_that_ends_elsewhere_is_swept(
    with_links: Watched, veth: Veth, elsewhere: str
) -> None:
    veth("tap0")
    with_links.start()
    run("ip", "link", "set", "tap0", "netns", elsewhere)
    eventually("said", lambda: with_links.texts("moved"))
    run("ip", "link", "del", "tap0-p")
    eventually("swept", lambda: not with_links.host.attached())
    eventually("its end", lambda: not with_links.texts("moved"))


def test_catalogue_M17_an_interface_that_ends_just_when_it_is_looked_at_leaves_no_alarm(
    with_links: Watched, veth: Veth, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is elsewhere when the alarm is raised, and gone when what is gone is swept."""
    veth("tap0")
    with_links.start()
    inspector = with_links.operations._inspector
    inspect = inspector.inspect
    raised: list[str] = []

    def inspect_and_end(suspect: Suspect) -> Outcome:
        outcome = inspect(suspect)
        if with_links.texts("moved") and not raised:
            raised.extend(with_links.texts("moved"))
            run("ip", "link", "del", "tap0-p")
        return outcome

    monkeypatch.setattr(inspector, "inspect", inspect_and_end)
    run("ip", "link", "set", "tap0", "netns", elsewhere)
    eventually("swept", lambda: raised and not with_links.host.attached())
    eventually("its end", lambda: not with_links.texts("moved"))
    eventually("let go", lambda: not with_links.watch._watched)


def test_catalogue_M16_a_renamed_interface_is_an_alarm_until_the_names_agree(
    with_links: Watched, tap: Tap
) -> None:
    tap("tap0")
    with_links.start()
    ifindex = socket.if_nametoindex("tap0")
    called: list[None] = []
    with_links.operations.on_rename = lambda: called.append(None)

    rename("tap0", "tap7")
    with_links.operations.links_changed({"tap7": ifindex}, {"tap0"})
    (text,) = with_links.texts("renamed")
    assert "the policy calls this interface tap0" in text
    (record,) = with_links.records("renamed")
    assert (record["vm"], record["interface"], record["before"]) == ("web01", "tap7", "tap0")
    assert called
    rename("tap7", "tap0")
    with_links.operations.links_changed({"tap0": ifindex}, {"tap7"})
    assert with_links.texts("renamed") == []
    assert with_links.texts() == []
    assert with_links.attached()
