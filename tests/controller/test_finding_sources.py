# SPDX-License-Identifier: Apache-2.0
"""The sources of VMs: real QEMU-like processes, libvirt's own test driver, a Proxmox of files."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from vgw.controller.finding import libvirt_domains
from vgw.controller.finding.domain_xml import MAX_CHARACTERS, read_domain
from vgw.controller.finding.found import FoundInterface, FoundVm, SourceError
from vgw.controller.finding.libvirt_domains import LibvirtDomains
from vgw.controller.finding.proxmox import Proxmox
from vgw.controller.finding.qemu_processes import (
    QemuProcesses,
    macs_of_taps,
    split_options,
    vm_name,
)
from vgw.errors import VgwError

MAC, OTHER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:12"

INTERFACE = """
    <interface type='{kind}'>
      <mac address='{mac}'/>
      <source network='default'/>
      {target}
    </interface>"""


def xml(name: str, *interfaces: str, kind: str = "test") -> str:
    return f"""
<domain type='{kind}' id='7'>
  <name>{name}</name>
  <memory>65536</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>{"".join(interfaces)}
  </devices>
</domain>"""


def interface(mac: str, tap: str | None, kind: str = "bridge") -> str:
    target = f"<target dev='{tap}'/>" if tap else ""
    text = INTERFACE.format(kind=kind, mac=mac, target=target)
    return text if kind == "network" else text.replace("network='default'", "bridge='br0'")


# --- libvirt's XML --------------------------------------------------------------------------------


def test_a_domain_is_read_from_its_xml() -> None:
    text = xml(
        "web01",
        interface(MAC, "vnet0", "network"),
        interface(OTHER_MAC.upper(), "vnet1", "ethernet"),
        interface(OTHER_MAC, None),
        interface(OTHER_MAC, "../x"),
    )
    domain = read_domain(text)
    assert domain.name == "web01"
    assert domain.interfaces == (FoundInterface("vnet0", MAC), FoundInterface("vnet1", OTHER_MAC))
    assert (domain.without_name, domain.others) == (2, ())


@pytest.mark.parametrize("kind", ["direct", "hostdev", "vhostuser", "user", "vdpa", ""])
def test_an_interface_that_the_host_does_not_see_is_told_apart(kind: str) -> None:
    domain = read_domain(xml("web01", interface(MAC, "macvtap0", kind)))
    assert (domain.interfaces, domain.others) == ((), (kind,))


def test_a_network_may_stand_for_a_device() -> None:
    text = interface(MAC, "vnet0", "network").replace("<mac", "<actual type='hostdev'/><mac")
    assert read_domain(xml("web01", text)).others == ("hostdev",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no XML",
        "<domain/>",
        "<domain><name> </name></domain>",
        "<network><name>a</name></network>",
        "<domain><name>a</name>",
        '<!DOCTYPE d [<!ENTITY a "b">]><domain><name>&a;</name></domain>',
        "<domain><name>a</name></domain>" + " " * MAX_CHARACTERS,
    ],
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(VgwError, match="XML"):
        read_domain(text)


# --- libvirt --------------------------------------------------------------------------------------


@pytest.fixture
def libvirt() -> Any:
    """The library, with its test driver: domains that run nothing, in this process."""
    pytest.importorskip("libvirt")
    return libvirt_domains.load_library()


@pytest.fixture
def connection(libvirt: Any) -> Iterator[Any]:
    opened = libvirt.open("test:///default")
    before = {each.name() for each in opened.listAllDomains()}
    yield opened
    for domain in opened.listAllDomains():
        if domain.name() not in before:
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
            with contextlib.suppress(libvirt.libvirtError):
                domain.undefine()
    opened.close()


@pytest.fixture
def source() -> Iterator[LibvirtDomains]:
    made = LibvirtDomains("test:///default")
    yield made
    made.close()


def found(source: LibvirtDomains, name: str) -> FoundVm | None:
    return next((vm for vm in source.scan() if vm.name == name), None)


def test_libvirt_says_what_runs_and_by_which_interfaces(
    source: LibvirtDomains, connection: Any
) -> None:
    assert found(source, "web01") is None
    domain = connection.createXML(xml("web01", interface(MAC, "tap7")))
    connection.defineXML(xml("db01", interface(OTHER_MAC, None)))

    web01 = FoundVm("web01", "libvirt", True, (FoundInterface("tap7", MAC),))
    assert found(source, "web01") == web01
    assert found(source, "db01") == FoundVm("db01", "libvirt", False)
    domain.destroy()
    assert found(source, "web01") is None


def test_libvirt_tells_of_changes(source: LibvirtDomains, connection: Any) -> None:
    changes: queue.SimpleQueue[str] = queue.SimpleQueue()
    source.watch(lambda: changes.put("changed"))
    source.scan()
    domain = connection.createXML(xml("web01", interface(MAC, "tap7")))
    assert changes.get(timeout=PATIENCE)
    domain.destroy()
    assert changes.get(timeout=PATIENCE)


def test_a_libvirt_that_went_is_asked_anew(source: LibvirtDomains, connection: Any) -> None:
    connection.createXML(xml("web01", interface(MAC, "tap7")))
    assert found(source, "web01") is not None
    source._connection.close()  # what a keepalive does when the daemon is gone
    source._closed(source._connection)
    assert found(source, "web01") is not None
    changes: queue.SimpleQueue[str] = queue.SimpleQueue()
    source.watch(lambda: changes.put("changed"))
    connection.createXML(xml("web02", interface(OTHER_MAC, "tap8")))
    assert changes.get(timeout=PATIENCE), "events come by the new connection"


def test_a_libvirt_that_is_not_there_is_an_error(libvirt: Any, tmp_path: Path) -> None:
    assert libvirt is not None
    nowhere = LibvirtDomains(f"qemu+unix:///system?socket={tmp_path}/none")
    with pytest.raises(SourceError, match="gives no answer"):
        nowhere.scan()


def test_without_the_library_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(SourceError, match="python3-libvirt is not installed"):
        LibvirtDomains().scan()


# --- QEMU -----------------------------------------------------------------------------------------

HOLDER = """
import fcntl, os, struct, sys
for name in sys.argv[1].split(","):
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
    print(fd, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(program: str, taps: str, *arguments: str) -> Iterator[list[int]]:
    """Run a process of another name that holds TAPs open; yields their descriptors."""
    # What the interpreter takes for itself comes first; QEMU's arguments are any that follow.
    command = [program, "-c", HOLDER, taps, *arguments]
    process = subprocess.Popen(
        command,
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = list(iter(process.stdout.readline, "held\n"))
    try:
        yield [int(line) for line in lines]
    finally:
        process.communicate("")


@pytest.mark.bpf
def test_a_qemu_is_found_by_the_taps_that_it_holds(netns: None) -> None:  # noqa: ARG001
    device = f"virtio-net-pci,netdev=net1,mac={MAC}"
    arguments = ("-name", "guest=web01,debug-threads=on", "-netdev", "tap,id=net1,ifname=tapx1")
    with holder("/usr/bin/qemu-system-x86_64", "tapx1,tapx2", *arguments, "-device", device):
        (vm,) = QemuProcesses().scan()
    assert vm == FoundVm(
        "web01", "qemu", True, (FoundInterface("tapx1", MAC), FoundInterface("tapx2"))
    )
    assert QemuProcesses().scan() == [], "it ended"


@pytest.mark.bpf
def test_other_processes_are_no_vms(netns: None) -> None:  # noqa: ARG001
    with (
        holder("/usr/sbin/openvpn", "tapx1", "-name", "guest=web01"),
        holder("qemu-system-x86_64", "tapx2"),
        holder("qemu-system-x86_64", "tapx3", "-name", "web01") as held,
    ):
        (vm,) = QemuProcesses().scan()
        assert held
        assert [each.name for each in vm.interfaces] == ["tapx3"]


@pytest.mark.bpf
def test_a_qemu_of_another_namespace_is_not_of_this_host(netns: None) -> None:  # noqa: ARG001
    with holder("qemu-system-x86_64", "tapx1", "-name", "web01"):
        assert len(QemuProcesses().scan()) == 1
        there = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", SCAN],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    assert there.stdout.strip() == "[]"


SCAN = """
from vgw.controller.finding.qemu_processes import QemuProcesses
print(QemuProcesses().scan())
"""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-name", "web01"], "web01"),
        (["--name", "guest=web01,process=q"], "web01"),
        (["-name", "debug-threads=on,guest=web01"], "web01"),
        (["-name", "a,,b"], "a,b"),
        (["-name", '{"guest": "web01"}'], "web01"),
        (["-name", "debug-threads=on"], None),
        (["-nameless", "x"], None),
        (["-name", "{broken"], None),
    ],
)
def test_the_name_of_a_qemu(arguments: list[str], name: str | None) -> None:
    assert vm_name(["qemu-system-x86_64", *arguments, "-m", "1G"]) == name


def test_macs_by_descriptors_names_and_json() -> None:
    taps = {30: "vnet0", 33: "vnet1"}
    arguments = [
        *("-netdev", '{"type":"tap","fds":"29:30","id":"hostnet0"}'),
        *("-device", f'{{"driver":"virtio-net-pci","netdev":"hostnet0","mac":"{MAC}"}}'),
        *("-netdev", "tap,fd=33,id=hostnet1"),
        *("-device", f"e1000,netdev=hostnet1,id=net1,mac={OTHER_MAC}"),
        *("-netdev", "user,id=hostnet2"),
        *("-device", "e1000,netdev=hostnet2,mac=52:54:00:00:00:13"),
        *("-netdev", "tap,fd=x,id=hostnet3"),
        *("-device", "e1000,netdev=nothing"),
    ]
    assert macs_of_taps(arguments, taps) == {"vnet0": MAC, "vnet1": OTHER_MAC}
    assert split_options("[1]", "type") == {"type": "[1]"}


# --- Proxmox --------------------------------------------------------------------------------------


@pytest.fixture
def pve(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write configurations of guests; returns a function of (file, text)."""
    for directory in ("qemu-server", "lxc"):
        (tmp_path / directory).mkdir()

    def write(file: str, text: str) -> Path:
        (tmp_path / file).write_text(text)
        return tmp_path

    return write


VM_CONFIG = f"""\
# a comment: not a setting
name: web01
net0: virtio={MAC.upper()},bridge=vmbr0,firewall=1
net1: e1000={OTHER_MAC},bridge=vmbr1
[snapshot]
name: old
net0: virtio=52:54:00:00:00:99,bridge=vmbr0
"""


@pytest.mark.bpf
def test_proxmox_guests_are_found_by_their_configuration(
    pve: Callable[[str, str], Path], veth: Callable[[str], str]
) -> None:
    pve("qemu-server/100.conf", VM_CONFIG)
    pve("qemu-server/101.conf", "memory: 512\n")
    pve("qemu-server/nonsense.conf", "name: nonsense\n")
    config = pve("lxc/200.conf", f"hostname: db01\nnet0: name=eth0,hwaddr={OTHER_MAC},type=veth\n")
    for name in ("tap100i0", "tap100i1", "tap101i0", "veth200i0", "tap999i0", "tap100i0x"):
        veth(name)

    assert Proxmox(config).scan() == [
        FoundVm(
            "web01",
            "proxmox",
            True,
            (FoundInterface("tap100i0", MAC), FoundInterface("tap100i1", OTHER_MAC)),
        ),
        FoundVm("vm101", "proxmox", True, (FoundInterface("tap101i0"),)),
        FoundVm("db01", "proxmox", True, (FoundInterface("veth200i0", OTHER_MAC),)),
    ]


def test_guests_of_one_name_go_by_their_numbers(pve: Callable[[str, str], Path]) -> None:
    pve("qemu-server/100.conf", "name: web\n")
    config = pve("qemu-server/101.conf", "name: web\n")
    assert [vm.name for vm in Proxmox(config).scan()] == ["vm100", "vm101"]


def test_a_host_without_proxmox_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Proxmox cannot be asked"):
        Proxmox(tmp_path / "pve").scan()
    assert Proxmox(tmp_path).scan() == [], "one without guests is none"
