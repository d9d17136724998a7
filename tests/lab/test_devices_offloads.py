# SPDX-License-Identifier: Apache-2.0
"""Super-packets, aggregates and checksums left to others, on real devices (K1 to K5, K12)."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from scripts.lab import wire
from tests.frames import (
    IN,
    OUT,
    PEER4,
    PEER6,
    STRANGER4,
    TCP,
    UDP,
    VM4,
    VM6,
    tcp,
    udp,
)
from tests.frames import Wire as Conversation
from tests.lab import link_settings
from tests.lab.devices import TAP_HOOKS, AtHook, Counts, Devices, Space, document
from tests.lab.taps import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, IFF_VNET_HDR, NEEDS_CSUM, VnetHeader
from vgw.abi import Path, Reason, Verdict
from vgw.policy.frame import internet_checksum
from vgw.policy.model import Hook, PolicyDocument

pytestmark = pytest.mark.lab

HOOKS = pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
FAMILIES = pytest.mark.parametrize("family", [4, 6])
ACCEPTED = (Verdict.ACCEPT, Reason.DEFAULT)
SEGMENT = 1400
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4


def only_443() -> PolicyDocument:
    return document(
        egress="[{name: https-out, action: accept, services: [tcp/443]}]",
        ingress="[{name: https-in, action: accept, services: [tcp/443]}]",
        defaults="{ingress: drop, egress: drop}",
    )


def upper_header(family: int) -> int:
    """Return where the header behind that of IP begins."""
    return 34 if family == 4 else 54


def partial_sum(frame: bytes, family: int, checksum_at: int) -> bytes:
    """Return a frame whose checksum is left to the card: the sum of its pseudo-header only."""
    start = upper_header(family)
    field = start + checksum_at
    payload = frame[start:]
    addresses = frame[26:34] if family == 4 else frame[22:54]
    protocol = frame[23] if family == 4 else frame[20]
    pseudo = addresses + struct.pack("!II", len(payload), protocol)
    total = internet_checksum(pseudo) ^ 0xFFFF
    return frame[:field] + struct.pack("!H", total) + frame[field + 2 :]


def super_packet(
    way: Conversation, family: int, size: int, dport: int = 443, local: str | None = None
) -> tuple[bytes, VnetHeader]:
    """Return a TCP super-packet of that many bytes of payload and its header."""
    segment = tcp(dport=dport, flags="PA", payload=bytes(range(256)) * (size // 256))
    ours, theirs = (VM4, PEER4) if family == 4 else (VM6, PEER6)
    whole = way.wrap(segment, TCP, local or ours, theirs)
    start = upper_header(family)
    kind = GSO_TCPV4 if family == 4 else GSO_TCPV6
    header = VnetHeader(NEEDS_CSUM, kind, start + 20, SEGMENT, start, 16)
    return partial_sum(whole, family, 16), header


def syn_of(way: Conversation, family: int, dport: int = 443) -> bytes:
    wrap = way.wrap4 if family == 4 else way.wrap6
    return wrap(tcp(dport=dport, seq=999), TCP)


def on_the_wire(frame: bytes, family: int) -> int:
    """Return the bytes of a super-packet once it is cut into segments."""
    head = upper_header(family) + 20
    payload = len(frame) - head
    return payload + -(-payload // SEGMENT) * head


# --- K1 -------------------------------------------------------------------------------------------


@TAP_HOOKS
@FAMILIES
def test_catalogue_K1_super_packets_of_a_tap(devices: Devices, hook: AtHook, family: int) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(only_443(), hook=hook)
    assert guarded.reason(lambda: vm.send(syn_of(OUT, family))) == (Verdict.ACCEPT, Reason.RULE)
    frame, header = super_packet(OUT, family, 63 * 1024)

    counts = guarded.judged(lambda: vm.send(frame, header))

    key = (Path.FROM_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED)
    assert set(counts) == {key}
    # XDP is not told that a frame is a super-packet, so it counts the headers once.
    expected = len(frame) if hook is Hook.XDP else on_the_wire(frame, family)
    assert counts[key] == (1, expected)
    # The control: what one segment would not get, a super-packet does not get either.
    other, header = super_packet(OUT, family, 63 * 1024, dport=22)
    assert guarded.reason(lambda: vm.send(other, header)) == (Verdict.DROP, Reason.NO_STATE)


@TAP_HOOKS
def test_catalogue_K1_super_packets_obey_the_guards(devices: Devices, hook: AtHook) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document(), hook=hook)

    spoofed, header = super_packet(OUT, 4, 63 * 1024, local=STRANGER4)
    assert guarded.reason(lambda: vm.send(spoofed, header)) == (Verdict.DROP, Reason.SPOOF_ADDRESS)

    datagrams = OUT.wrap4(udp(payload=bytes(SEGMENT * 20)), UDP)
    header = VnetHeader(NEEDS_CSUM, GSO_UDP_L4, 42, SEGMENT, 34, 6)
    assert guarded.reason(lambda: vm.send(partial_sum(datagrams, 4, 6), header)) == ACCEPTED


# --- K2 -------------------------------------------------------------------------------------------

BIG = 185_000
TRANSFER = 24 << 20


def machines(devices: Devices, mtu: int = 1500) -> tuple[Space, Space]:
    """Make the VM behind tap0 and a machine outside, on one bridge."""
    vm = devices.stack("tap0", "52:54:00:00:00:11", VM4, VM6, mtu)
    outside = devices.stack("net0", "52:54:00:00:00:02", "10.20.0.2", "2001:db8:20::2", mtu)
    devices.bridge("tap0", "net0")
    return vm, outside


def send_much(sender: Space, receiver: Space, family: int, size: int = TRANSFER) -> int:
    """Send bytes by TCP and return how many arrived."""
    with (
        wire.listen(receiver, 443) as server,
        wire.connect(sender, receiver.address(family), 443) as here,
    ):
        there, _ = server.accept()
        with there:
            there.settimeout(wire.PATIENCE)
            sending = threading.Thread(target=_send_all, args=(here, size))
            sending.start()
            arrived = 0
            while data := there.recv(1 << 20):
                arrived += len(data)
            sending.join()
    return arrived


def _send_all(sock: socket.socket, size: int) -> None:
    block = bytes(1 << 20)
    for _ in range(size // len(block)):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)


@FAMILIES
@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("inbound", [True, False])
def test_catalogue_K2_big_tcp(devices: Devices, family: int, big: bool, inbound: bool) -> None:
    """Super-packets of more than 64 KB, which IP has no length for, are judged by their flow."""
    vm, outside = machines(devices)
    guarded = devices.protect(only_443())
    for place in (devices.here, vm, outside):
        with wire.inside(place.namespace):
            for name in ("tap0", "net0", "br0") if place is devices.here else ("eth0",):
                link_settings.allow_big_tcp(name, BIG if big else 65536)
    guarded.counts()

    ends = (outside, vm) if inbound else (vm, outside)
    assert send_much(*ends, family) == TRANSFER

    counts = guarded.counts()
    assert {key[1] for key in counts} == {Verdict.ACCEPT}, counts
    path = Path.TO_VM if inbound else Path.FROM_VM
    largest = _mean_size(counts, path)
    # The control is the run without: only with BIG TCP a packet is larger than IP can say.
    assert (largest > 70_000) is big, largest


def _mean_size(counts: Counts, path: Path) -> float:
    count = counts[path, Verdict.ACCEPT, Reason.CT_ESTABLISHED]
    return count.bytes / count.packets


# --- K3 -------------------------------------------------------------------------------------------

DATAGRAM, DATAGRAMS = 100, 40


@FAMILIES
@pytest.mark.parametrize(
    "aggregate", [{"rx_gro_list": True}, {"rx_udp_gro_forwarding": True}, {}], ids=str
)
def test_catalogue_K3_aggregates_toward_the_vm(
    devices: Devices, family: int, aggregate: dict[str, bool]
) -> None:
    """Datagrams put together on their way in are judged together and arrive one by one."""
    vm = devices.queue("tap0")
    outside = devices.veth("net0", vnet=True)
    devices.bridge("tap0", "net0")
    with wire.inside(outside.space.namespace):
        # Segments leave the sender in one go, so that the receiving side has some to put together.
        link_settings.set_features("eth0", tx_udp_segmentation=False)
    link_settings.set_features("net0", rx_gro=bool(aggregate), **aggregate)
    guarded = devices.protect(document())
    wrap = IN.wrap4 if family == 4 else IN.wrap6
    start = upper_header(family)
    frame = wrap(udp(payload=bytes(DATAGRAM * DATAGRAMS)), UDP)
    header = VnetHeader(NEEDS_CSUM, GSO_UDP_L4, start + 8, DATAGRAM, start, 6)

    counts = guarded.judged(lambda: outside.send(partial_sum(frame, family, 6), header))
    mark = IN.wrap4(tcp(dport=9), TCP)
    guarded.judged(lambda: outside.send(mark))
    arrived = [data for _, data in vm.received() if data != mark]

    assert [len(data) for data in arrived] == [start + 8 + DATAGRAM] * DATAGRAMS
    single = wrap(udp(payload=bytes(DATAGRAM)), UDP)
    assert {data[start:] for data in arrived} == {single[start:]}
    assert {key[1] for key in counts} == {Verdict.ACCEPT}
    # The control is the run without: aggregates were judged only where devices make them.
    packets = sum(count.packets for count in counts.values())
    assert (packets < DATAGRAMS // 2) is bool(aggregate), packets


# --- K4 -------------------------------------------------------------------------------------------


@HOOKS
@FAMILIES
def test_catalogue_K4_checksums_left_to_the_card_arrive_right(
    devices: Devices, hook: Hook, family: int
) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    outside = devices.queue("net0", IFF_VNET_HDR)
    devices.bridge("tap0", "net0")
    devices.protect(document(), hook=hook)
    start = upper_header(family)

    for way, sender, receiver in ((OUT, vm, outside), (IN, outside, vm)):
        wrap = way.wrap4 if family == 4 else way.wrap6
        for segment, protocol, field in (
            (tcp(dport=443, payload=b"odd"), TCP, 16),
            (udp(payload=b"even"), UDP, 6),
        ):
            whole = wrap(segment, protocol)
            left_out = partial_sum(whole, family, field)
            assert left_out != whole
            sender.send(left_out, VnetHeader(NEEDS_CSUM, 0, 0, 0, start, field))
            assert [data for _, data in receiver.received()] == [whole]
            # The control: without the request nobody puts it right.
            sender.send(left_out)
            assert [data for _, data in receiver.received()] == [left_out]


# --- K5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [Hook.TC, Hook.AUTO], ids=str)
def test_catalogue_K5_a_checksum_request_cannot_rewrite_a_port(
    devices: Devices, hook: Hook
) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    outside = devices.queue("net0")
    devices.bridge("tap0", "net0")
    only_dns = "[{name: dns, action: accept, services: [udp/53]}]"
    drop = "{ingress: drop, egress: drop}"
    guarded = devices.protect(document(egress=only_dns, defaults=drop), hook=hook)

    # The first word of the payload makes the sum of all that follows the place of port 22.
    frame = OUT.wrap4(udp(40000, 53, bytes(8)), UDP)
    rest = internet_checksum(frame[34:])
    word = (0xFFFF - 22) + rest
    word = (word & 0xFFFF) + (word >> 16)
    frame = frame[:42] + struct.pack("!H", word) + frame[44:]
    guarded.judged(lambda: vm.send(frame, VnetHeader(NEEDS_CSUM, 0, 0, 0, 34, 2)))

    ports = [struct.unpack_from("!H", data, 36)[0] for _, data in outside.received()]
    assert set(ports) <= {53}


# --- K12 ------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("takes_them", [False, True])
def test_catalogue_K12_super_packets_toward_a_vm(
    devices: Devices, family: int, takes_them: bool
) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    if takes_them:
        vm.set_offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    outside = devices.veth("net0", vnet=True)
    devices.bridge("tap0", "net0")
    guarded = devices.protect(only_443())
    guarded.judged(lambda: outside.send(syn_of(IN, family)))
    vm.received()
    frame, header = super_packet(IN, family, 20 * 1024)

    counts = guarded.judged(lambda: outside.send(frame, header))

    key = (Path.TO_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED)
    assert counts == {key: (1, on_the_wire(frame, family))}
    sizes = [len(data) for _, data in vm.received()]
    head = upper_header(family) + 20
    if takes_them:
        assert sizes == [len(frame)]  # the control: it was a super-packet up to here
    else:
        assert max(sizes) == head + SEGMENT
        assert sum(size - head for size in sizes) == len(frame) - head
