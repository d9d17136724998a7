# SPDX-License-Identifier: Apache-2.0
"""Interfaces as the kernel knows them, and programs put on them, read back and taken off."""

from __future__ import annotations

import errno
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.patience import PATIENCE
from vgw import libbpf
from vgw.abi import Path as PacketPath
from vgw.controller import interfaces, links
from vgw.controller import links_netlink as netlink
from vgw.controller.change_feed import ChangeFeed
from vgw.controller.paths import Paths
from vgw.errors import ForeignProgramError, VgwError
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

FROM_VM, TO_VM = PacketPath.FROM_VM, PacketPath.TO_VM


def returning(prog_type: libbpf.ProgType, code: int) -> int:
    """Load `mov r0, code; exit`."""
    program = struct.pack("=BBhi", 0xB7, 0, 0, code) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    return libbpf.prog_load(prog_type, "constant", program)


class Endpoint:
    """A directory of pins with programs that let everything pass."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.fds: dict[tuple[PacketPath, Hook], int] = {}

    def program(self, path: PacketPath, hook: Hook) -> int:
        kind, code = (
            (libbpf.ProgType.XDP, 2) if hook is Hook.XDP else (libbpf.ProgType.SCHED_CLS, -1)
        )
        fd = returning(kind, code)
        libbpf.pin(fd, links.program_pin(self.directory, path))
        self.fds[path, hook] = fd
        return fd

    def attach(
        self,
        ifindex: int,
        path: PacketPath,
        hook: Hook,
        *,
        force: bool = False,
        prefer_link: bool = True,
    ) -> links.Attachment:
        pin = links.link_pin(self.directory, path)
        fd = self.fds.get((path, hook)) or self.program(path, hook)
        return links.attach(fd, ifindex, path, hook, pin, force=force, prefer_link=prefer_link)

    def read(self, ifindex: int, path: PacketPath) -> links.Attachment | None:
        return links.read_attachment(ifindex, path, self.directory)

    def detach(self, ifindex: int | None, path: PacketPath) -> None:
        links.detach(ifindex, path, links.link_pin(self.directory, path))

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def endpoint(paths: Paths) -> Iterator[Endpoint]:
    made = Endpoint(paths.endpoint_dir("vm", "if"))
    yield made
    made.close()


def index(name: str) -> int:
    return socket.if_nametoindex(name)


def shown(name: str) -> str:
    return run("ip", "link", "show", name)


# --- interfaces -----------------------------------------------------------------------------


@pytest.mark.usefixtures("netns")
def test_a_missing_interface_says_what_to_do() -> None:
    with pytest.raises(VgwError, match="nope0 does not exist in this network namespace; create"):
        links.find_interface("nope0")


@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("name", ["a" * 16, "x\0y", ""])
def test_a_name_no_interface_can_have_is_a_missing_interface(name: str) -> None:
    with pytest.raises(VgwError, match="does not exist"):
        links.find_interface(name)


def test_kinds_of_interfaces(veth: Callable[[str], str], tap: Callable[[str], int]) -> None:
    tap("tap0")
    veth("veth0")
    run("ip", "link", "add", "br0", "type", "bridge")

    assert links.find_interface("tap0") == links.InterfaceFacts("tap0", index("tap0"), "tun")
    assert links.find_interface("veth0").kind == "veth"
    assert links.find_interface("br0").kind == "bridge"


@pytest.mark.usefixtures("netns")
def test_an_interface_without_ethernet_is_refused() -> None:
    with pytest.raises(VgwError, match="lo carries no Ethernet"):
        links.find_interface("lo")


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(Hook.AUTO, Hook.TC), (Hook.TC, Hook.TC), (Hook.XDP, Hook.XDP)]
)
def test_the_hook_is_tc_unless_asked_for(wanted: Hook, chosen: Hook) -> None:
    assert links.choose_hook(wanted) is chosen


def test_interfaces_are_reported_as_they_come_change_and_go(veth: Callable[[str], str]) -> None:
    veth("first")
    seen: queue.Queue[tuple[str, str]] = queue.Queue()
    stop = threading.Event()
    watcher = threading.Thread(
        target=links.watch_links, args=(lambda event, name, _: seen.put((event, name)), stop)
    )
    watcher.start()
    try:
        before = {seen.get(timeout=PATIENCE) for _ in range(3)}
        run("ip", "link", "add", "br0", "type", "bridge")
        added = seen.get(timeout=PATIENCE)
        # Joining and leaving a bridge makes messages that are no new or gone interfaces.
        run("ip", "link", "set", "first", "master", "br0")
        run("ip", "link", "set", "first", "nomaster")
        run("ip", "link", "set", "first", "name", "second")
        renamed = [seen.get(timeout=PATIENCE) for _ in range(2)]
        run("ip", "link", "del", "br0")
        removed = seen.get(timeout=PATIENCE)
    finally:
        stop.set()
        watcher.join()

    assert before == {("new", "lo"), ("new", "first"), ("new", "first-p")}
    assert added == ("new", "br0")
    assert renamed == [("gone", "first"), ("new", "second")]
    assert removed == ("gone", "br0")
    assert seen.empty()


class LossySocket(socket.socket):
    """A netlink socket that loses what it receives, as the kernel does when the buffer is full."""

    losing = deaf = False

    def send(self, *arguments: Any) -> int:
        return 0 if self.deaf else super().send(*arguments)

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        if self.losing:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return data


def test_catalogue_M34_after_a_loss_of_messages_all_interfaces_are_listed_again(
    veth: Callable[[str], str],
) -> None:
    veth("first")
    seen: list[tuple[str, str]] = []
    with LossySocket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 1))
        watcher = interfaces.LinkWatcher(sock, lambda event, name, _: seen.append((event, name)))
        watcher.start_listing()
        while ("new", "lo") not in seen or ("new", "first") not in seen:
            watcher.receive()
        seen.clear()

        run("ip", "link", "del", "first")
        run("ip", "link", "add", "br0", "type", "bridge")
        sock.losing = True
        watcher.receive()
        sock.losing = False
        while len(seen) < 3:
            watcher.receive()

    assert sorted(seen) == [("gone", "first"), ("gone", "first-p"), ("new", "br0")]


@pytest.mark.usefixtures("netns")
def test_catalogue_M34_a_list_that_the_kernel_never_sends_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full buffer has no room for an answer, and nothing may ever come that makes it go on."""
    seen: queue.Queue[str] = queue.Queue()
    stop = threading.Event()
    asked: list[None] = []
    start_listing = interfaces.LinkWatcher.start_listing

    def unheard_at_first(watcher: interfaces.LinkWatcher) -> None:
        LossySocket.deaf = not asked
        asked.append(None)
        start_listing(watcher)

    monkeypatch.setattr(interfaces.LinkWatcher, "start_listing", unheard_at_first)
    monkeypatch.setattr(socket, "socket", LossySocket)
    watcher = threading.Thread(
        target=links.watch_links, args=(lambda _, name, __: seen.put(name), stop)
    )
    watcher.start()
    try:
        assert seen.get(timeout=PATIENCE) == "lo"
    finally:
        stop.set()
        watcher.join()
    assert len(asked) > 1


@pytest.mark.usefixtures("netns")
def test_catalogue_M34_a_burst_that_overflows_the_buffer_loses_nothing_that_stays(
    tmp_path: Path,
) -> None:
    """The kernel drops messages for so slow a reader; what is there in the end counts."""
    known: dict[int, str] = {}
    losses: list[None] = []
    stop = threading.Event()

    def slowly(event: str, name: str, ifindex: int) -> None:
        if event == "new":
            known[ifindex] = name
        else:
            del known[ifindex]
        stop.wait(0.0005)

    start_listing = interfaces.LinkWatcher.start_listing

    def counting(watcher: interfaces.LinkWatcher) -> None:
        losses.append(None)
        start_listing(watcher)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interfaces.LinkWatcher, "start_listing", counting)
        watcher = threading.Thread(
            target=links.watch_links, args=(slowly, stop), kwargs={"receive_buffer": 4096}
        )
        watcher.start()
        try:
            burst = tmp_path / "burst"
            made = (f"link add v{n} type veth peer name p{n}\n" for n in range(150))
            gone = (f"link del v{n}\n" for n in range(0, 150, 2))
            burst.write_text("".join((*made, *gone)))
            run("ip", "-batch", str(burst))
            expected = dict(socket.if_nameindex())
            deadline = time.monotonic() + PATIENCE
            while known != expected and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            stop.set()
            watcher.join()
    assert len(losses) > 1, "nothing was lost, so nothing was tested"
    assert len(expected) == 151
    assert known == expected


@pytest.mark.usefixtures("netns")
def test_catalogue_M34_a_feed_that_lost_messages_says_that_anything_may_have_changed(
    veth: Callable[[str], str], tmp_path: Path
) -> None:
    veth("first")
    feed = ChangeFeed(receive_buffer=1 << 16)
    ifindex = index("first")
    present = feed.presence(ifindex)
    run("ip", "link", "set", "first", "down")
    assert feed.take() == {ifindex, index("first-p")}
    assert feed.presence(ifindex) == present
    burst = tmp_path / "burst"
    burst.write_text("link set first up\nlink set first down\n" * 100)
    run("ip", "-batch", str(burst))

    assert feed.take() is None
    assert feed.take() == set()
    assert feed.presence(ifindex) != present, "it may have been replaced meanwhile"
    feed.close()


# --- attachments ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefer_link", [True, False])
@pytest.mark.parametrize(
    ("path", "hook"), [(FROM_VM, Hook.XDP), (FROM_VM, Hook.TC), (TO_VM, Hook.TC)]
)
def test_what_is_attached_is_read_back_and_gone_after_detach(
    endpoint: Endpoint,
    tap: Callable[[str], int],
    path: PacketPath,
    hook: Hook,
    prefer_link: bool,
) -> None:
    tap("tap0")
    ifindex = index("tap0")

    attached = endpoint.attach(ifindex, path, hook, prefer_link=prefer_link)

    mode = {(Hook.XDP, True): "native", (Hook.XDP, False): "native", (Hook.TC, True): "tcx"}
    assert attached == links.Attachment(
        hook=hook.value,  # type: ignore[arg-type]
        mode=mode.get((hook, prefer_link), "clsact"),  # type: ignore[arg-type]
        link=prefer_link,
        prog_id=libbpf.prog_info(endpoint.fds[path, hook]).id,
    )
    assert endpoint.read(ifindex, path) == attached
    endpoint.detach(ifindex, path)
    assert endpoint.read(ifindex, path) is None
    assert "prog/xdp" not in shown("tap0")
    assert not libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_INGRESS)
    assert not libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_EGRESS)
    assert "clsact" not in run("tc", "qdisc", "show", "dev", "tap0")
    assert not links.link_pin(endpoint.directory, path).exists()


def test_a_device_that_refuses_native_xdp_gets_generic(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    veth("veth0")
    run("ip", "link", "set", "veth0-p", "mtu", "9000")

    attached = endpoint.attach(index("veth0"), FROM_VM, Hook.XDP)

    assert (attached.mode, attached.link) == ("generic", True)


def test_an_attached_link_survives_what_other_tools_do(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    veth("veth0")
    ifindex = index("veth0")
    attached = [
        endpoint.attach(ifindex, FROM_VM, Hook.XDP),
        endpoint.attach(ifindex, TO_VM, Hook.TC),
    ]

    for attempt in ("ip link set veth0 xdp off", "tc qdisc del dev veth0 clsact"):
        subprocess.run(attempt.split(), check=False, capture_output=True)

    assert [endpoint.read(ifindex, path) for path in (FROM_VM, TO_VM)] == attached


def test_names_are_those_that_interfaces_have_now(tap: Callable[[str], int]) -> None:
    tap("tap0")
    ifindex = socket.if_nametoindex("tap0")
    with interfaces.InterfaceNames() as names:
        assert names.of(ifindex) == "tap0"
        run("ip", "link", "set", "tap0", "name", "a-name-of-15-by")
        assert names.of(ifindex) == "a-name-of-15-by"
        run("ip", "link", "delete", "a-name-of-15-by")
        assert names.of(ifindex) is None


@pytest.mark.parametrize("prefer_link", [True, False])
@pytest.mark.parametrize("held_by_link", [True, False])
def test_a_foreign_xdp_program_is_replaced_only_by_force(
    endpoint: Endpoint, veth: Callable[[str], str], held_by_link: bool, prefer_link: bool
) -> None:
    name = veth("veth0")
    ifindex = index(name)
    foreign = returning(libbpf.ProgType.XDP, 2)
    foreign_id = libbpf.prog_info(foreign).id
    link = None
    if held_by_link:
        link = libbpf.link_create(foreign, ifindex, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
    else:
        netlink.set_xdp(ifindex, foreign, libbpf.XDP_GENERIC)
    before = libbpf.xdp_program(ifindex)

    with pytest.raises(ForeignProgramError, match=f"veth0 .*id {foreign_id}.*--force"):
        endpoint.attach(ifindex, FROM_VM, Hook.XDP, prefer_link=prefer_link)
    assert libbpf.xdp_program(ifindex) == before
    attached = endpoint.attach(ifindex, FROM_VM, Hook.XDP, force=True, prefer_link=prefer_link)

    assert libbpf.xdp_program(ifindex) == (attached.prog_id, "native")
    assert attached.prog_id != foreign_id
    endpoint.detach(ifindex, FROM_VM)
    assert libbpf.xdp_program(ifindex) is None
    for fd in (foreign, link):
        if fd is not None:
            os.close(fd)


def test_a_foreign_xdp_program_is_back_when_ours_cannot_take_its_place(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    ifindex = index(veth("veth0"))
    foreign = returning(libbpf.ProgType.XDP, 2)
    netlink.set_xdp(ifindex, foreign, libbpf.XDP_NATIVE)
    before = libbpf.xdp_program(ifindex)
    links.link_pin(endpoint.directory, FROM_VM).mkdir()  # no link can be pinned here

    with pytest.raises(VgwError, match="File exists"):
        endpoint.attach(ifindex, FROM_VM, Hook.XDP, force=True)

    assert libbpf.xdp_program(ifindex) == before
    os.close(foreign)


def test_our_tcx_program_runs_before_foreign_ones_and_leaves_them_alone(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    ifindex = index(veth("veth0"))
    foreign = [returning(libbpf.ProgType.SCHED_CLS, -1) for _ in range(2)]
    early, late = (libbpf.prog_info(fd).id for fd in foreign)
    fds = [libbpf.link_create(foreign[0], ifindex, libbpf.AttachType.TCX_INGRESS)]

    attached = endpoint.attach(ifindex, FROM_VM, Hook.TC)

    there = libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_INGRESS)
    assert there == [attached.prog_id, early]
    assert attached.ahead == ()
    fds.append(libbpf.link_create(foreign[1], ifindex, libbpf.AttachType.TCX_INGRESS))
    read = endpoint.read(ifindex, FROM_VM)
    assert read is not None
    assert read.ahead == (late,)
    endpoint.detach(ifindex, FROM_VM)
    assert libbpf.tcx_programs(ifindex, libbpf.AttachType.TCX_INGRESS) == [late, early]
    for fd in (*fds, *foreign):
        os.close(fd)


@pytest.mark.parametrize("prefer_link", [True, False])
def test_a_foreign_xdp_program_runs_before_ours_at_tc(
    endpoint: Endpoint, veth: Callable[[str], str], prefer_link: bool
) -> None:
    ifindex = index(veth("veth0"))
    foreign = returning(libbpf.ProgType.XDP, 2)
    netlink.set_xdp(ifindex, foreign, libbpf.XDP_NATIVE)

    from_vm = endpoint.attach(ifindex, FROM_VM, Hook.TC, prefer_link=prefer_link)
    to_vm = endpoint.attach(ifindex, TO_VM, Hook.TC, prefer_link=prefer_link)

    assert from_vm.ahead == (libbpf.prog_info(foreign).id,)
    assert to_vm.ahead == ()
    os.close(foreign)


def test_foreign_clsact_filters_and_their_qdisc_stay(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    name = veth("veth0")
    ifindex = index(name)
    run("tc", "qdisc", "add", "dev", name, "clsact")
    foreign = returning(libbpf.ProgType.SCHED_CLS, -1)
    other = Endpoint(endpoint.directory.with_name("other"))

    netlink.add_clsact(ifindex)
    endpoint.attach(ifindex, FROM_VM, Hook.TC, prefer_link=False)
    with pytest.raises(ForeignProgramError, match="veth0 has a tc filter of somebody else"):
        other.attach(ifindex, FROM_VM, Hook.TC, prefer_link=False)
    other.detach(ifindex, FROM_VM)
    assert endpoint.read(ifindex, FROM_VM) is not None
    endpoint.detach(ifindex, FROM_VM)

    assert "clsact" in run("tc", "qdisc", "show", "dev", name)
    os.close(foreign)
    other.close()


def test_the_clsact_qdisc_goes_with_the_last_filter_of_ours(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    name = veth("veth0")
    ifindex = index(name)
    for path in (TO_VM, FROM_VM):
        endpoint.attach(ifindex, path, Hook.TC, prefer_link=False)

    endpoint.detach(ifindex, FROM_VM)
    assert "clsact" in run("tc", "qdisc", "show", "dev", name)
    assert endpoint.read(ifindex, TO_VM) is not None
    endpoint.detach(ifindex, TO_VM)

    assert "clsact" not in run("tc", "qdisc", "show", "dev", name)


@pytest.mark.parametrize("prefer_link", [True, False])
def test_detach_when_the_interface_is_gone(
    endpoint: Endpoint, veth: Callable[[str], str], prefer_link: bool
) -> None:
    name = veth("veth0")
    ifindex = index(name)
    endpoint.attach(ifindex, FROM_VM, Hook.XDP, prefer_link=prefer_link)
    endpoint.attach(ifindex, TO_VM, Hook.TC, prefer_link=prefer_link)
    run("ip", "link", "del", name)

    for path in (FROM_VM, TO_VM):
        endpoint.detach(None, path)
        assert not links.link_pin(endpoint.directory, path).exists()


def test_a_link_that_somebody_detached_is_no_attachment(
    endpoint: Endpoint, veth: Callable[[str], str]
) -> None:
    ifindex = index(veth("veth0"))
    endpoint.attach(ifindex, TO_VM, Hook.TC)

    with links.opened(links.link_pin(endpoint.directory, TO_VM)) as fd:
        libbpf.link_detach(fd)

    assert endpoint.read(ifindex, TO_VM) is None
