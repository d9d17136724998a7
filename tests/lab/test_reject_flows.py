# SPDX-License-Identifier: Apache-2.0
"""Answers to rejected packets of open connections, and under attack."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from scripts.lab import wire
from scripts.lab.wire import Node, Tap
from tests.frames import tagged
from tests.lab.conftest import unprotect
from tests.lab.refusals import (
    ACCEPT_ALL,
    DROP_ALL,
    FAMILIES,
    PORT,
    REJECT_ALL,
    answers,
    drops,
)
from tests.lab.topology import VMS, Lab, connection, eventually, exchange, policy
from vgw.policy.frame import build_frame

pytestmark = pytest.mark.lab

HOOKS = pytest.mark.parametrize("hook", ["xdp", "tc"])
LITTLE, MUCH = 100, 500_000
SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CHECKSUM = 1
UDP, SCTP = socket.IPPROTO_UDP, 132
PROHIBITED = bytes((3, 13))


#: Hook, direction and size of what is sent. XDP answers no super-frames: bpf/README.md says why.
REVOKED = [
    (hook, inbound, size)
    for hook in ("xdp", "tc")
    for inbound in (True, False)
    for size in (LITTLE, MUCH)
    if (hook, inbound, size) != ("xdp", False, MUCH)
]


@FAMILIES
@pytest.mark.parametrize(("hook", "inbound", "size"), REVOKED)
def test_catalogue_H12_a_revoked_connection_is_reset(
    virtio_lab: Lab, hook: str, inbound: bool, size: int, family: int
) -> None:
    """Both ends have large segments and left-out checksums."""
    virtio_lab.write_policy(policy(ACCEPT_ALL))
    virtio_lab.vgw("attach", "--vm", "web01", "--hook", hook)
    near, far = ("client", "web01") if inbound else ("web01", "client")
    try:
        with connection(virtio_lab.nodes[near], virtio_lab.nodes[far], PORT, family) as ends:
            exchange(*ends)
            virtio_lab.apply(policy(REJECT_ALL))
            with pytest.raises(ConnectionResetError):
                send_and_wait(ends[0], size)
        assert answers(virtio_lab, "web01")["failed"] == 0
    finally:
        unprotect(virtio_lab)


def send_and_wait(sock: socket.socket, size: int) -> None:
    """Send so many bytes and wait for what comes back."""
    sock.sendall(bytes(size))
    sock.recv(1)


# --- limits --------------------------------------------------------------------------------------

FLOOD = 60
BUDGET = 5
LIMITED = VMS.replace("    labels: {role: web}\n", f"    reject_per_second: {BUDGET}\n")


def datagram(near: Node, far: Node, number: int, source: str | None = None) -> bytes:
    """Return a UDP frame, which its port tells from all others."""
    return build_frame(
        {
            "src": source or near.ipv4,
            "dst": far.ipv4,
            "proto": "udp",
            "sport": 2000 + number,
            "dport": PORT,
        },
        source_mac=wire.mac_bytes(near.mac),
        destination_mac=wire.mac_bytes(far.mac),
    )


def is_answer(frame: bytes) -> bool:
    packet = wire.network_packet(frame)
    return packet is not None and packet[0] == socket.IPPROTO_ICMP and packet[2][:2] == PROHIBITED


@HOOKS
@pytest.mark.parametrize("inbound", [True, False], ids=["to_vm", "from_vm"])
def test_catalogue_L14_a_flood_gets_few_answers(lab: Lab, hook: str, inbound: bool) -> None:
    lab.write_policy(policy(REJECT_ALL, vms=LIMITED))
    lab.vgw("attach", "--vm", "web01", "--hook", hook)
    names = ("client", "web01") if inbound else ("web01", "client")
    near, far = (lab.nodes[name] for name in names)
    with Tap(near) as sender, Tap(lab.nodes["web01"]) as vm, Tap(lab.nodes["client"]) as client:
        begun = time.monotonic()
        for number in range(FLOOD):
            sender.send(datagram(near, far, number))
        eventually("the flood is over", lambda: sum(answers(lab, "web01").values()) == FLOOD)
        windows = int(time.monotonic() - begun) + 2
        # A mark goes the way of the answers, to which the VM's own vgw adds none here.
        counts = answers(lab, "web01")
        if inbound:
            heard = wire.arrivals(vm, client, is_answer)
        else:
            heard = wire.arrivals(client, vm, is_answer)
    assert counts["failed"] == 0
    assert 0 < counts["sent"] <= BUDGET * windows
    assert counts["suppressed"] > 0
    assert len(heard) == counts["sent"]


@pytest.mark.parametrize("vm", ["web01", "db01"])
@pytest.mark.parametrize("inbound", [True, False], ids=["to_vm", "from_vm"])
def test_a_drop_tells_nobody(lab: Lab, vm: str, inbound: bool) -> None:
    """The control: what senders are told in all these tests, they are told because of `reject`."""
    lab.write_policy(policy(DROP_ALL))
    lab.attach(vm)
    near, far = (lab.nodes[name] for name in (("client", vm) if inbound else (vm, "client")))
    with pytest.raises(TimeoutError):
        wire.connect(near, far.ipv4, PORT, timeout=0.3)
    assert answers(lab, vm) == {"sent": 0, "suppressed": 0, "failed": 0}


def test_catalogue_L14_a_forged_packet_gets_no_answer(lab: Lab) -> None:
    lab.write_policy(policy(REJECT_ALL))
    lab.attach("web01")
    near, far = lab.nodes["web01"], lab.nodes["client"]
    with Tap(near) as sender:
        sender.send(datagram(near, far, 1, source="198.51.100.7"))
        eventually("it is dropped", lambda: drops(lab, "web01") == 1)
        assert answers(lab, "web01") == {"sent": 0, "suppressed": 0, "failed": 0}
        sender.send(datagram(near, far, 1))
        eventually("the control is answered", lambda: answers(lab, "web01")["sent"] == 1)


@pytest.mark.parametrize(("protocol", "offset", "answered"), [(UDP, 6, True), (SCTP, 8, False)])
def test_catalogue_H12_a_checksum_that_would_hit_the_answer(
    virtio_lab: Lab, protocol: int, offset: int, answered: bool
) -> None:
    """A card would write SCTP's checksum over what an answer quotes, so there is none."""
    virtio_lab.write_policy(policy(REJECT_ALL))
    virtio_lab.vgw("attach", "--vm", "web01", "--hook", "tc")
    near, far = virtio_lab.nodes["web01"], virtio_lab.nodes["client"]
    name = {UDP: "udp", SCTP: "sctp"}[protocol]
    frame = build_frame(
        {"src": near.ipv4, "dst": far.ipv4, "proto": name, "sport": 2000, "dport": PORT},
        source_mac=wire.mac_bytes(near.mac),
        destination_mac=wire.mac_bytes(far.mac),
    )
    header = struct.pack("=BBHHHH", NEEDS_CHECKSUM, 0, 0, 0, 34, offset)
    try:
        with near.open(socket.AF_PACKET, socket.SOCK_RAW) as card:
            card.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            card.bind(("eth0", wire.ETH_P_ALL))
            card.send(header + frame)
        eventually("it is rejected", lambda: drops(virtio_lab, "web01") == 1)
        expected = {"sent": int(answered), "suppressed": 0, "failed": int(not answered)}
        assert answers(virtio_lab, "web01") == expected
    finally:
        unprotect(virtio_lab)


# --- tags ----------------------------------------------------------------------------------------

VLAN_ID = 100
TRUNKS = VMS.replace('"]}\n', '"], vlans: [100]}\n')
PACKET_AUXDATA, VLAN_VALID = 8, 1 << 4
SETUPS = [("web01", "xdp"), ("web01", "tc"), ("db01", "tc")]


@pytest.mark.parametrize(("vm", "hook"), SETUPS)
@pytest.mark.parametrize("inbound", [True, False], ids=["to_vm", "from_vm"])
def test_catalogue_H12_the_answer_keeps_the_tag(
    lab: Lab, vm: str, hook: str, inbound: bool
) -> None:
    """At tc the tag is held beside the frame, and so it is where the answer arrives."""
    lab.write_policy(policy(REJECT_ALL, vms=TRUNKS))
    lab.vgw("attach", "--vm", vm, "--hook", hook)
    names = ("client", vm) if inbound else (vm, "client")
    near, far = (lab.nodes[name] for name in names)
    with near.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(wire.ETH_P_ALL)) as card:
        card.bind(("eth0", wire.ETH_P_ALL))
        card.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        card.settimeout(wire.PATIENCE)
        card.send(tagged(datagram(near, far, 1), VLAN_ID))
        answer, tag = next(filter(lambda found: is_answer(found[0]), received(card)))
    assert tag == VLAN_ID
    assert answer[:12] == wire.mac_bytes(near.mac) + wire.mac_bytes(far.mac)


def received(card: socket.socket) -> Iterator[tuple[bytes, int | None]]:
    """Yield frames as they come, each with the tag that the kernel holds beside it."""
    while True:
        frame, notes, _, _ = card.recvmsg(65536, 256)
        ((_, _, auxiliary),) = notes
        status, _, _, _, _, tag, _ = struct.unpack("=IIIHHHH", auxiliary)
        yield frame, tag if status & VLAN_VALID else None
