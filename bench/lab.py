# SPDX-License-Identifier: Apache-2.0
"""The network that measurements send traffic through: a client, a bridge, a VM and another VM.

    namespace   plays             interface    on the host behind
    host        the hypervisor    br0          -
    client      somebody outside  eth0         veth-client
    vm          the VM            eth0         veth-vm
    other       another VM        eth0         veth-other
    guest       a VM with a TAP   eth0         tap-guest       (only where it is asked for)

Neighbours are static and the bridge learns nothing new, so nothing but the measured traffic is on
the way. Nothing outside the namespaces and the lab's directory is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from bench.native import build
from bench.policy_text import Endpoint
from scripts.lab.tap_guest import open_tap
from scripts.lab.wire import inside
from vgw.errors import VgwError

PREFIX: Final = "vgw-bench-"
VM_MAC: Final = "52:54:00:00:00:11"
OTHER_MAC: Final = "52:54:00:00:00:12"
GUEST_MAC: Final = "52:54:00:00:00:13"
CLIENT_MAC: Final = "52:54:00:00:00:02"
VM_ADDRESSES: Final = {4: "10.20.0.11", 6: "2001:db8:20::11"}
OTHER_ADDRESSES: Final = {4: "10.20.0.12", 6: "2001:db8:20::12"}
GUEST_ADDRESSES: Final = {4: "10.20.0.13", 6: "2001:db8:20::13"}
CLIENT_ADDRESSES: Final = {4: "10.20.0.2", 6: "2001:db8:20::2"}
PREFIX_LENGTHS: Final = {4: 24, 6: 64}
VM: Final = "vm"
#: The most that a policy can ask for: a run's connections fit in at once.
CONNTRACK_MAX: Final = 131072
NODES: Final = ("host", "client", "vm", "other", "guest")
#: Node -> MAC and addresses of its card.
CARDS: Final = {
    "client": (CLIENT_MAC, CLIENT_ADDRESSES),
    "vm": (VM_MAC, VM_ADDRESSES),
    "other": (OTHER_MAC, OTHER_ADDRESSES),
    "guest": (GUEST_MAC, GUEST_ADDRESSES),
}
_GUEST_TAP: Final = "tap-guest"
_NEEDED: Final = ("ip", "nsenter", "nft", "iptables-restore", "gcc")


class BenchError(VgwError):
    """A measurement cannot be made, or shows something else than it was made for."""


class Lab:
    """A lab that is up; `vgw_command` is the command to measure."""

    def __init__(self, name: str, vgw: str) -> None:
        self.name = name
        self.directory = Path("/run", name)
        self.connections = self.directory / "connections"
        self.vgw_command = vgw
        # Programs that are compiled already are as good here; all else is the lab's own.
        kept = {name: os.environ[name] for name in ("VGW_CACHE_DIR",) if name in os.environ}
        self.environment = (
            os.environ
            | {
                f"VGW_{place}": str(self.directory / directory)
                for place, directory in (
                    ("POLICY", "policy.d"),
                    ("RUN_DIR", "run"),
                    ("STATE_DIR", "state"),
                    ("BPFFS", "bpf"),
                    ("CACHE_DIR", "cache"),
                    ("LOG", "log/events.jsonl"),
                )
            }
            | kept
        )

    @property
    def endpoint(self) -> Endpoint:
        """The VM as a policy describes it."""
        return Endpoint(VM, "veth-vm", VM_MAC, tuple(VM_ADDRESSES.values()), CONNTRACK_MAX)

    def command(self, node: str, *words: str) -> list[str]:
        """Return a command line that runs `words` in a node."""
        return ["nsenter", f"--net=/run/netns/{self.name}-{node}", "--", *words]

    def vgw(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one vgw command on the lab's host."""
        return subprocess.run(
            self.command("host", self.vgw_command, *words),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def write_policy(self, text: str) -> None:
        """Make `text` the whole policy."""
        self.directory.joinpath("policy.d/policy.yaml").write_text(text)

    def nft(self, text: str) -> None:
        """Execute nftables commands on the lab's host."""
        with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".nft") as file:
            file.write(text)
            file.flush()
            _run(*self.command("host", "nft", "-f", file.name))

    def run_on_host(self, *words: str, text: str | None = None) -> None:
        """Run a command that has to succeed on the lab's host, with `text` as its input."""
        _run(*self.command("host", *words), text=text)

    def filter_bridged(self, on: bool) -> None:
        """Give bridged packets to the forward hooks of IPv4 and IPv6, or not."""
        for family in ("iptables", "ip6tables"):
            setting = f"/proc/sys/net/bridge/bridge-nf-call-{family}"
            _run(*self.command("host", "sh", "-c", f"echo {on:d} >{setting}"))


def check_host() -> None:
    """Raise BenchError when something that every lab needs is missing."""
    if os.geteuid() != 0:
        raise BenchError("network namespaces need root; run the command with sudo")
    missing = [command for command in _NEEDED if shutil.which(command) is None]
    if missing:
        raise BenchError(f"missing: {', '.join(missing)}; run scripts/setup.sh --dev")
    if not Path("/proc/sys/net/bridge").is_dir():
        _run("modprobe", "br_netfilter")


@contextmanager
def lab(vgw: str | None = None, *, guest: bool = False) -> Iterator[Lab]:
    """Build a lab for the length of the block; `vgw` is the command, else this installation's.

    With `guest` there is also a VM behind a TAP.
    """
    check_host()
    _remove_leftovers()
    built = Lab(f"{PREFIX}{os.getpid()}", vgw or str(Path(sys.executable).with_name("vgw")))
    try:
        with ExitStack() as stack:
            _build(built)
            if guest:
                stack.enter_context(_guest(built))
            yield built
    finally:
        _remove(built.name)


def _build(built: Lab) -> None:
    for directory in ("policy.d", "run", "state", "bpf", "cache", "log"):
        built.directory.joinpath(directory).mkdir(parents=True)
    _run("mount", "-t", "bpf", "-o", "mode=700", "bpf", str(built.directory / "bpf"))
    build("connections", built.directory)
    for node in NODES:
        _run("ip", "netns", "add", f"{built.name}-{node}")
        _run(*built.command(node, "sh", "-c", _QUIET))
    _run("ip", "-n", f"{built.name}-host", "-batch", "-", text=_HOST_LINKS)
    built.filter_bridged(on=False)
    cards = {node: mac for node, (mac, _) in CARDS.items() if node != "guest"}
    for node, mac in cards.items():
        _run("ip", "-n", f"{built.name}-host", "-batch", "-", text=_node_links(built, node, mac))
    for node in cards:
        _run("ip", "-n", f"{built.name}-{node}", "-batch", "-", text=_node_addresses(node))


@contextmanager
def _guest(built: Lab) -> Iterator[None]:
    """Give the guest its card: a TAP of its own, and a program between it and that of the host."""
    relay = build("relay", built.directory)
    with ExitStack() as stack:
        taps = []
        for node, name, mac in (("host", _GUEST_TAP, None), ("guest", "eth0", GUEST_MAC)):
            with inside(f"{built.name}-{node}"):
                taps.append(open_tap(name, mac, offload=True))
            stack.callback(os.close, taps[-1])
        _run("ip", "-n", f"{built.name}-host", "-batch", "-", text=_joined(_GUEST_TAP))
        _run("ip", "-n", f"{built.name}-guest", "-batch", "-", text=_node_addresses("guest"))
        process = subprocess.Popen([relay, *map(str, taps)], pass_fds=taps)
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield


#: No duplicate address detection and no router solicitations; all ports for connections.
_QUIET: Final = """
for scope in all default; do
  conf=/proc/sys/net/ipv6/conf/$scope
  [ -d "$conf" ] || continue
  echo 0 >"$conf/accept_dad"
  echo 0 >"$conf/router_solicitations"
  echo 0 >"$conf/accept_ra"
done
echo '1024 65535' >/proc/sys/net/ipv4/ip_local_port_range
"""
_HOST_LINKS: Final = """\
link set lo up
link add br0 type bridge mcast_snooping 0
link set br0 addrgenmode none
link set br0 up
"""


def _node_links(built: Lab, node: str, mac: str) -> str:
    return (
        f"link add veth-{node} type veth peer name eth0 address {mac} netns {built.name}-{node}\n"
        f"{_joined(f'veth-{node}')}"
    )


def _joined(interface: str) -> str:
    """Return the commands that make an interface of the host one of the bridge's."""
    return f"link set {interface} addrgenmode none\nlink set {interface} master br0 up\n"


def _node_addresses(node: str) -> str:
    lines = ["link set lo up", "link set eth0 up"]
    for version, address in CARDS[node][1].items():
        flags = " nodad" if version == 6 else ""
        lines.append(f"addr add {address}/{PREFIX_LENGTHS[version]} dev eth0{flags}")
        for other, (mac, addresses) in CARDS.items():
            if other != node:
                neighbour = f"{addresses[version]} lladdr {mac}"
                lines.append(f"neigh replace {neighbour} dev eth0 nud permanent")
    return "\n".join(lines) + "\n"


def _remove_leftovers() -> None:
    """Remove labs whose process is gone: runs that were killed."""
    names = {path.name.rpartition("-")[0] for path in Path("/run/netns").glob(f"{PREFIX}*")}
    for name in names | {path.name for path in Path("/run").glob(f"{PREFIX}*")}:
        owner = name.removeprefix(PREFIX)
        if owner.isdecimal() and not Path("/proc", owner).exists():
            _remove(name)


def _remove(name: str) -> None:
    """Remove a lab, whole or half built."""
    pins = Path("/run", name, "bpf")
    while pins.is_mount():
        # A vgw command of a run that was killed may still be at work; what it holds goes with it.
        _run("umount", "--lazy", str(pins))
    for node in NODES:
        if Path("/run/netns", f"{name}-{node}").exists():
            _run("ip", "netns", "delete", f"{name}-{node}")
    with suppress(FileNotFoundError):
        shutil.rmtree(Path("/run", name))


def _run(*command: str, text: str | None = None) -> None:
    """Run a command that has to succeed, with `text` as its input."""
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BenchError(f"{_shown(command)}: {run.stderr.strip() or run.stdout.strip()}")


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)[:200]
