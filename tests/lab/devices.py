# SPDX-License-Identifier: Apache-2.0
"""TAPs and veths that a test plays the VM of, frame by frame, and what vgw counted of each frame.

Everything lives in network namespaces without a name, which go with the process. IPv6 is off in
them: no frame is on its way but those that a test sends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pytest

from scripts.lab import wire
from scripts.lab.wire import CLONE_NEWNET, Node
from tests.lab.taps import LARGEST_FRAME, PLAIN, VNET_HEADER_SIZE, Queue, VnetHeader
from tests.lab.topology import eventually
from vgw import abi, libbpf
from vgw.abi import Path as PacketPath
from vgw.abi import Reason, Verdict
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.maps import Counter
from vgw.policy.model import Hook, PolicyDocument
from vgw.policy.parse import parse_sources

#: Setting of a VM under which no flow is picked up in its middle after an attach.
NO_GRACE: Final = "conntrack: {grace: 0s}, "

_libc = ctypes.CDLL(None, use_errno=True)

#: At tc, behind a shield at XDP.
SHIELDED: Final = "shielded"
AtHook = Hook | Literal["shielded"]
#: How the packets of a VM behind a TAP may be met.
TAP_HOOKS = pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC, SHIELDED], ids=str)

Key = tuple[PacketPath, Verdict, Reason]
Counts = dict[Key, Counter]
Fate = tuple[Verdict, Reason]


def run(*words: str, check: bool = True) -> str:
    """Run a command, split at blanks, in the thread's namespace and return what it printed."""
    command = [word for text in words for word in text.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout + done.stderr


def xdp(name: str = "tap0") -> tuple[int, str] | None:
    """Return the id of the XDP program on an interface and its mode, None without one."""
    return libbpf.xdp_program(socket.if_nametoindex(name))


@dataclass(frozen=True)
class Space(Node):
    """A namespace without a name, held by a descriptor; otherwise a node like the lab's."""

    fd: int = -1

    @property
    def namespace(self) -> str:
        """Path of the network namespace, good for the processes that a test starts as well."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs `words` in this space."""
        return ["nsenter", f"--net={self.namespace}", "--", *words]


def make_space(name: str, mac: str = "", ipv4: str = "", ipv6: str = "") -> Space:
    """Make a network namespace; it lives until its descriptor is closed and nothing is in it."""
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare the network namespace")
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if not ipv6:
            for scope in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        if _libc.setns(home.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "return to the network namespace")
    return Space("", name, mac, ipv4, ipv6, fd)


class Wire:
    """The far end of a veth: a raw socket in a namespace of its own."""

    def __init__(self, space: Space, name: str = "eth0", *, vnet: bool = False) -> None:
        self.space, self._vnet = space, vnet
        self.socket = space.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(wire.ETH_P_ALL))
        self.socket.bind((name, wire.ETH_P_ALL))
        self.socket.setblocking(False)
        if vnet:
            self.socket.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR

    def send(self, frame: bytes, header: VnetHeader = PLAIN) -> None:
        """Send a frame; OSError when the kernel does not take it."""
        try:
            self.socket.send((header.encode() if self._vnet else b"") + frame)
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # a program dropped it on its way out
                raise

    def received(self) -> list[bytes]:
        """Return the frames that came in and wait."""
        frames: list[bytes] = []
        while True:
            try:
                frame, address = self.socket.recvfrom(LARGEST_FRAME)
            except BlockingIOError:
                return frames
            if address[2] != wire.PACKET_OUTGOING:
                frames.append(frame[VNET_HEADER_SIZE if self._vnet else 0 :])

    def close(self) -> None:
        self.socket.close()


class Guarded:
    """A protected interface: what becomes of frames, by its counters."""

    def __init__(self, endpoint: OpenEndpoint) -> None:
        self.endpoint = endpoint
        self._before = endpoint.maps.stats()

    def counts(self) -> Counts:
        """Return what was counted since the last look."""
        before, self._before = self._before, self.endpoint.maps.stats()
        none = Counter(0, 0)
        return {
            key: Counter(now.packets - old.packets, now.bytes - old.bytes)
            for key, now in self._before.items()
            if now != (old := before.get(key, none))
        }

    def judged(
        self, send: Callable[[], object], packets: int = 1, until: Reason | None = None
    ) -> Counts:
        """Send and return what the frames were counted as, once so many are.

        `until` is the reason of the last frame, where some before it may not be judged at all.
        """
        self.counts()
        send()
        return self._await(packets, until)

    def _await(self, packets: int, until: Reason | None = None) -> Counts:
        seen: Counts = {}

        def all_counted() -> bool:
            for key, more in self.counts().items():
                old = seen.get(key, Counter(0, 0))
                seen[key] = Counter(old.packets + more.packets, old.bytes + more.bytes)
            if until is not None:
                return any(reason is until for _, _, reason in seen)
            return sum(count.packets for count in seen.values()) >= packets

        eventually(f"{packets} packets are counted", all_counted)
        return seen

    def reason(self, send: Callable[[], object]) -> Fate:
        """Send one frame and return what it got."""
        return self._only_one(self.judged(send))

    @staticmethod
    def _only_one(seen: Counts) -> Fate:
        assert [count.packets for count in seen.values()] == [1], seen
        ((_, verdict, reason),) = seen
        return verdict, reason

    def reason_or_refusal(self, send: Callable[[], object]) -> Fate | None:
        """Send a frame and return what it got, or None when the kernel did not take it."""
        self.counts()
        if refused(send):
            assert self.counts() == {}, "counted what was refused"
            return None
        return self._only_one(self._await(1))

    def forget(self) -> None:
        """Forget all flows."""
        fd = self.endpoint.fds["conntrack"]
        key_size, flow_size = ctypes.sizeof(abi.FlowKey), ctypes.sizeof(abi.Flow)
        for key, _ in list(libbpf.map_entries(fd, key_size, flow_size)):
            libbpf.map_delete(fd, key)


class Devices:
    """A host of its own: interfaces, namespaces beside it, and vgw; all gone with it."""

    def __init__(self, paths: Paths, here: Space, stack: ExitStack) -> None:
        self.host = Host(paths)
        self.paths = paths
        self.here = here
        self._stack = stack

    def queue(self, name: str, flags: int = 0, *, blocking: bool = False) -> Queue:
        """Make a TAP, or open one more queue of it."""
        queue = Queue(name, flags, blocking=blocking)
        self._stack.callback(queue.close)
        run(f"ip link set {name} up")
        return queue

    def wire(self, name: str) -> Wire:
        """Open an interface of the host itself, to send out of it."""
        end = Wire(self.here, name)
        self._stack.callback(end.close)
        return end

    def space(self, name: str, mac: str = "", ipv4: str = "", ipv6: str = "") -> Space:
        """Make another namespace."""
        space = make_space(name, mac, ipv4, ipv6)
        self._stack.callback(os.close, space.fd)
        return space

    def veth(self, name: str, mtu: int = 1500, *, vnet: bool = False) -> Wire:
        """Make a veth whose far end is eth0 of a namespace of its own."""
        space = self.space(name)
        run(f"ip link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu}")
        run(f"ip link set eth0 netns {space.namespace}")
        run(f"ip link set {name} up")
        run(*space.command("ip link set eth0 up"))
        end = Wire(space, vnet=vnet)
        self._stack.callback(end.close)
        return end

    def stack(self, name: str, mac: str, ipv4: str, ipv6: str, mtu: int = 1500) -> Space:
        """Make a veth whose far end is the card of a namespace with addresses: a real machine."""
        space = self.space(name, mac, ipv4, ipv6)
        run(f"ip link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu} address {mac}")
        run(f"ip link set eth0 netns {space.namespace}")
        run(f"ip link set {name} up")
        with wire.inside(space.namespace):
            run("ip link set lo up")
            # What a machine does on its own when it comes up would only be in the way.
            for setting in ("accept_dad", "router_solicitations", "accept_ra"):
                Path(f"/proc/sys/net/ipv6/conf/eth0/{setting}").write_text("0")
            run("ip link set eth0 up")
            run(f"ip addr add {ipv4}/24 dev eth0")
            run(f"ip addr add {ipv6}/64 dev eth0 nodad")
        return space

    def bridge(self, *names: str) -> None:
        """Join interfaces to a bridge that only forwards."""
        run("ip link add br0 type bridge mcast_snooping 0")
        for family in ("ip", "ip6"):
            # Where it is on, netfilter of bridges fragments what is too long for a port.
            switch = Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}tables")
            if switch.exists():
                switch.write_text("0")
        run("ip link set br0 up")
        for name in names:
            run(f"ip link set {name} master br0")

    def protect(
        self, document: PolicyDocument, vm: str = "web01", *, hook: AtHook = Hook.AUTO
    ) -> Guarded:
        """Attach a VM with one interface."""
        self.host.attach(document, vm, hook=Hook.AUTO if hook == SHIELDED else hook)
        (endpoint,) = self.host.open_endpoints(vm)
        self._stack.callback(endpoint.close)
        if hook == SHIELDED:
            self.raise_shield(vm)
            self._stack.callback(self.host.shields.close)
        return Guarded(endpoint)

    def raise_shield(self, vm: str = "web01") -> None:
        """Raise the shield of a VM with one interface."""
        (endpoint,) = self.host.open_endpoints(vm)
        with endpoint:
            self.host.raise_shield(self.identity(vm), vm, endpoint.interface)

    def identity(self, vm: str = "web01") -> int:
        """Return the identity of the endpoint of a VM with one interface."""
        (endpoint,) = self.host.open_endpoints(vm)
        with endpoint:
            return int(endpoint.maps.config().endpoint)


@contextlib.contextmanager
def devices_in(directory: Path, cache: Path) -> Iterator[Devices]:
    """Make a host; the thread is in its namespace for the length of the block."""
    bpffs = directory / "bpffs"
    bpffs.mkdir()
    with ExitStack() as stack:
        space = make_space("host")
        stack.callback(os.close, space.fd)
        run("mount -t bpf bpf", str(bpffs))
        stack.callback(run, "umount -l", str(bpffs))
        stack.enter_context(wire.inside(space.namespace))
        paths = Paths(
            policy=directory / "policy.yaml",
            run_dir=directory / "run",
            state_dir=directory / "state",
            bpffs=bpffs / "vgw",
            cache_dir=cache,
            log_file=directory / "events.jsonl",
        )
        yield Devices(paths, space, stack)


def document(
    vms: Sequence[tuple[str, str]] = (("web01", "tap0"),),
    *,
    ingress: str = "[]",
    egress: str = "[]",
    defaults: str = "{ingress: accept, egress: accept}",
    more: str = "",
    settings: str = NO_GRACE,
) -> PolicyDocument:
    """Return a policy for VMs, each with an interface; all have the addresses of tests/frames.py.

    `more` goes into each interface, `settings` into each VM. Without rules everything that is
    readable and honest passes.
    """
    pairs = (
        '[{address: 10.20.0.100, mac: "00:00:5e:00:01:01"}, {address: 10.20.0.200/30}, '
        '{address: "2001:db8:20:8000::/65", mac: "00:00:5e:00:01:01"}]'
    )
    facts = f'mac: "52:54:00:00:00:11", addresses: [10.20.0.11, "2001:db8:20::11"]{more}'
    lines = [
        f"  {vm}: {{{settings}interfaces: [{{name: {name}, {facts}, allowed_pairs: {pairs}}}]}}"
        for vm, name in vms
    ]
    text = "\n".join(
        [
            "schema: vgw/v1",
            "vms:",
            *lines,
            "policies:",
            "  - name: test",
            "    tier: vm",
            "    applies_to: {all: true}",
            f"    ingress: {ingress}",
            f"    egress: {egress}",
            f"defaults: {defaults}",
        ]
    )
    return parse_sources([("policy.yaml", text)])


def refused(send: Callable[[], object]) -> bool:
    """Send what the kernel may refuse as malformed; tell whether it did."""
    try:
        send()
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EMSGSIZE, errno.ENOMEM, errno.EBADFD}:
            raise
        return True
    return False
