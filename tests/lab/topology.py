# SPDX-License-Identifier: Apache-2.0
"""The lab as the tests use it: built by scripts/netns-lab.sh, asked by real packets.

Whether a packet was stopped is never a matter of waiting: once it has left the sender's card, a
mark is sent after it, and when the mark has arrived without it, it was stopped.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from scripts.lab import wire
from scripts.lab.wire import Node, Tap
from tests.patience import PATIENCE
from vgw import libbpf
from vgw.policy.frame import internet_checksum

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/netns-lab.sh"
VGW = str(Path(sys.executable).with_name("vgw"))
METRICS_PORT = 9477
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
ECHO = {4: (socket.IPPROTO_ICMP, 8), 6: (socket.IPPROTO_ICMPV6, 128)}
_pause = threading.Event()


def run_script(
    lab: str, *words: str, check: bool = True, offload: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run scripts/netns-lab.sh on the lab of that name."""
    return subprocess.run(
        [str(SCRIPT), *words],
        env=os.environ | {"VGW_LAB": lab, "VGW_LAB_OFFLOAD": "1" if offload else ""},
        capture_output=True,
        text=True,
        check=check,
    )


def remove_leftovers(prefix: str) -> None:
    """Remove labs named PREFIX + process id whose process is gone: runs that were killed."""
    names = {path.name.removesuffix("-host") for path in Path("/run/netns").glob(f"{prefix}*-host")}
    for name in names | {path.name for path in Path("/run").glob(f"{prefix}*")}:
        owner = name.removeprefix(prefix)
        if owner.isdecimal() and not Path("/proc", owner).exists():
            run_script(name, "down")


def eventually(what: str, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Return as soon as `condition` holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        _pause.wait(0.02)


class Lab:
    """A lab that is up, and vgw set up for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = Path("/run", name)
        self.nodes = wire.lab_nodes(name)
        self.host = Node(name, "host", "", "", "")
        self.policy_dir = self.directory / "policy.d"
        self.environment = os.environ | {
            "VGW_POLICY": str(self.policy_dir),
            "VGW_RUN_DIR": str(self.directory / "run"),
            "VGW_STATE_DIR": str(self.directory / "state"),
            "VGW_BPFFS": str(self.directory / "bpf"),
            "VGW_CACHE_DIR": str(self.directory / "cache"),
            "VGW_LOG": str(self.directory / "log/events.jsonl"),
            "VGW_INVENTORY": str(self.directory / "inventory.yaml"),
        }

    # --- vgw ------------------------------------------------------------------------------------

    def vgw(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one vgw command on the lab's host."""
        run = subprocess.run(
            self.host.command(VGW, *words),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or run.returncode == 0, f"vgw {' '.join(words)}: {run.stderr}"
        return run

    def json(self, *words: str) -> Any:
        """Run one vgw command and return its JSON output."""
        return json.loads(self.vgw(*words, "-o", "json").stdout)

    def write_policy(self, text: str) -> None:
        """Make `text` the whole policy."""
        self.policy_dir.joinpath("policy.yaml").write_text(text)

    def attach(self, *vms: str) -> None:
        """Protect VMs by the policy as written."""
        self.vgw("attach", *(word for vm in vms for word in ("--vm", vm)))

    def apply(self, text: str) -> None:
        """Write a policy and apply it to all protected VMs."""
        self.write_policy(text)
        self.vgw("apply", str(self.policy_dir))

    def addressing(self) -> dict[str, str]:
        """Return the addresses and routes of each node."""
        what = (("-4", "route"), ("-6", "route"), ("-br", "address", "show", "dev", "eth0"))
        return {
            name: "".join(
                subprocess.check_output(["ip", "-n", node.namespace, *words], text=True)
                for words in what
            )
            for name, node in self.nodes.items()
        }

    def programs(self) -> dict[str, tuple[int, int]]:
        """Return for each protected interface its program ids, as the kernel has them."""
        return {
            interface["name"]: (interface["from_vm"]["prog_id"], interface["to_vm"]["prog_id"])
            for vm in self.json("status")["vms"]
            for interface in vm["interfaces"]
        }

    def kernel_programs(self) -> list[str]:
        """Return all programs on the VMs' interfaces, vgw's or not, as the kernel lists them."""
        found = []
        with wire.inside(self.host.namespace):
            for name in ("tap-web01", "veth-db01"):
                index = socket.if_nametoindex(name)
                xdp = libbpf.xdp_program(index)
                found += [f"{name} XDP {xdp[0]}"] if xdp else []
                for kind in (libbpf.AttachType.TCX_INGRESS, libbpf.AttachType.TCX_EGRESS):
                    found += [f"{name} {kind.name} {n}" for n in libbpf.tcx_programs(index, kind)]
        return found

    def records(self) -> list[dict[str, Any]]:
        """Return the log records written so far."""
        path = Path(self.environment["VGW_LOG"])
        if not path.exists():
            return []
        # The last line may be in the middle of being written.
        lines = path.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines]

    def get(self, port: int, path: str) -> str:
        """Fetch http://127.0.0.1:PORT/PATH on the lab's host."""
        with wire.inside(self.host.namespace):
            url = f"http://127.0.0.1:{port}/{path}"
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                text: bytes = answer.read()
        return text.decode()

    def metric(self, name: str, **labels: str) -> float | None:
        """Return the sum of a metric's series that have these labels; None without any."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        values = [
            float(line.rpartition(" ")[2])
            for line in self.get(METRICS_PORT, "metrics").splitlines()
            if line.startswith(f"{name}{{") and all(text in line for text in wanted)
        ]
        return sum(values) if values else None

    @contextmanager
    def controller(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run `vgw controller` for the length of the block; it answers when the block starts."""
        log = self.directory / "log/controller.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.host.command(VGW, "controller", *options),
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        try:
            eventually("the controller answers", lambda: self._answers(process, log))
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE)

    def _answers(self, process: subprocess.Popen[bytes], log: Path) -> bool:
        assert process.poll() is None, f"the controller ended: {log.read_text()}"
        try:
            self.get(METRICS_PORT, "metrics")
        except urllib.error.URLError:
            return False
        return True

    # --- packets --------------------------------------------------------------------------------

    def assert_reaches(
        self, protocol: str, sender: str, receiver: str, port: int = 0, family: int = 4
    ) -> None:
        """Assert that `sender` can talk to `receiver`: tcp or udp with an answer, or a ping."""
        near, far = self.nodes[sender], self.nodes[receiver]
        address = far.address(family)
        if protocol == "ping":
            assert wire.ping(near, address), f"{receiver} did not answer a ping of {sender}"
        elif protocol == "tcp":
            with connection(near, far, port, family) as (here, there):
                exchange(here, there)
        else:
            with (
                wire.receiver(far, port) as server,
                wire.client(near, socket.SOCK_DGRAM, address) as here,
            ):
                here.sendto(b"question", (address, port))
                _, origin = server.recvfrom(64)
                server.sendto(b"answer", origin)
                assert here.recv(64) == b"answer"

    def assert_blocked(
        self, protocol: str, sender: str, receiver: str, port: int = 0, family: int = 4
    ) -> None:
        """Assert that the first packet of `sender` to `receiver` leaves but does not arrive."""
        near, far = self.nodes[sender], self.nodes[receiver]
        wanted = packet_filter(protocol, far.address(family), port)
        with ExitStack() as stack:
            here, there = stack.enter_context(Tap(near)), stack.enter_context(Tap(far))
            if protocol == "tcp":
                stack.enter_context(wire.listen(far, port))
            elif protocol == "udp":
                stack.enter_context(wire.receiver(far, port))
            stack.enter_context(closing(send_first(protocol, near, far.address(family), port)))
            here.until(wanted, outgoing=True)
            seen = wire.arrivals(here, there, wanted)
        assert not seen, f"{protocol} of {sender} reached {receiver}, port {port}"


def send_first(protocol: str, sender: Node, address: str, port: int) -> socket.socket:
    """Make the kernel send the first packet of a conversation, without awaiting the answer."""
    family = wire.family_of(address)
    if protocol == "ping":
        number, kind = ECHO[6 if family == socket.AF_INET6 else 4]
        sock = sender.open(family, socket.SOCK_RAW, number)
        message = struct.pack("!BBHHH", kind, 0, 0, 4711, 1)
        if family == socket.AF_INET:
            # For ICMPv6 the kernel fills in the checksum.
            message = struct.pack("!BBHHH", kind, 0, internet_checksum(message), 4711, 1)
        sock.sendto(message, (address, 0))
    elif protocol == "udp":
        sock = sender.open(family, socket.SOCK_DGRAM)
        sock.sendto(b"question", (address, port))
    else:
        sock = sender.open(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        assert sock.connect_ex((address, port)) == errno.EINPROGRESS
    return sock


def packet_filter(protocol: str, address: str, port: int = 0) -> Callable[[bytes], bool]:
    """Return what tells whether a frame goes to this address and port, or is an echo request."""

    def wanted(frame: bytes) -> bool:
        packet = wire.network_packet(frame)
        if packet is None or packet[1] != address:
            return False
        number, _, rest = packet
        if protocol == "ping":
            return (number, rest[0]) in ECHO.values()
        return number == PROTOCOLS[protocol] and rest[2:4] == struct.pack("!H", port)

    return wanted


@contextmanager
def connection(
    near: Node, far: Node, port: int, family: int = 4
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open a TCP connection from `near` to `far`; yields both its ends."""
    with (
        wire.listen(far, port) as server,
        wire.connect(near, far.address(family), port) as here,
    ):
        there, _ = server.accept()
        with there:
            there.settimeout(PATIENCE)
            yield here, there


def exchange(here: socket.socket, there: socket.socket) -> None:
    """Assert that both ends of a connection hear each other."""
    here.sendall(b"question")
    assert there.recv(64) == b"question"
    there.sendall(b"answer")
    assert here.recv(64) == b"answer"


#: The facts of the lab's VMs; rules, groups and so on follow.
VMS = """
schema: vgw/v1
vms:
  web01:
    labels: {role: web}
    interfaces:
      - {name: tap-web01, mac: "52:54:00:00:00:11", addresses: [10.20.0.11, "2001:db8:20::11"]}
  db01:
    labels: {role: db}
    interfaces:
      - {name: veth-db01, mac: "52:54:00:00:00:12", addresses: [10.20.0.12, "2001:db8:20::12"]}
"""


def policy(
    rules: Mapping[str, list[str]] | None = None, default: str = "drop", vms: str = VMS
) -> str:
    """Write a policy: direction -> rules as written in a policy file, for all VMs."""
    lines = [vms, f"defaults: {{ingress: {default}, egress: {default}}}"]
    if rules:
        lines += ["policies:", "  - name: test", "    tier: vm", "    applies_to: {all: true}"]
        for direction, texts in rules.items():
            lines += [f"    {direction}:", *(f"      - {text}" for text in texts)]
    return "\n".join(lines) + "\n"
