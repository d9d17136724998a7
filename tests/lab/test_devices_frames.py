# SPDX-License-Identifier: Apache-2.0
"""Frames on real devices: short, long, in pieces, with lies beside them (A1, A16, B4, B14, K5)."""

from __future__ import annotations

from functools import partial

import pytest

from tests.frames import (
    IN,
    OUT,
    STRANGER4,
    TCP,
    UDP,
    fragment6,
    tagged,
    tcp,
    udp,
)
from tests.lab.devices import (
    SHIELDED,
    TAP_HOOKS,
    AtHook,
    Devices,
    Fate,
    Guarded,
    Wire,
    document,
    refused,
)
from tests.lab.taps import (
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    IFF_NAPI,
    IFF_NAPI_FRAGS,
    IFF_VNET_HDR,
    NEEDS_CSUM,
    Queue,
    VnetHeader,
)
from vgw.abi import Reason, Verdict
from vgw.policy.model import Hook

pytestmark = pytest.mark.lab

HOOKS = pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
SYN = OUT.wrap4(tcp(), TCP)
SPOOFED = OUT.wrap4(tcp(), TCP, local=STRANGER4)
ACCEPTED = (Verdict.ACCEPT, Reason.DEFAULT)


def fresh(sport: int, payload: bytes = b"") -> bytes:
    """Return a frame of the VM that opens a flow of its own."""
    return OUT.wrap4(udp(sport, 53, payload), UDP)


# --- A1 -------------------------------------------------------------------------------------------


@TAP_HOOKS
def test_catalogue_A1_short_frames_of_a_tap(devices: Devices, hook: AtHook) -> None:
    vm = devices.queue("tap0")
    guarded = devices.protect(document(), hook=hook)

    for size in range(14):
        got = guarded.reason_or_refusal(partial(vm.send, SYN[:size]))
        assert got in (None, (Verdict.DROP, Reason.TRUNCATED))

    # The control: the first length that is a frame is counted, and whole frames still pass.
    assert guarded.reason(lambda: vm.send(SYN[:14])) == (Verdict.DROP, Reason.TRUNCATED)
    assert guarded.reason(lambda: vm.send(SYN)) == ACCEPTED


@HOOKS
def test_catalogue_A1_short_frames_of_a_veth(devices: Devices, hook: Hook) -> None:
    vm = devices.veth("tap0")
    guarded = devices.protect(document(), hook=hook)

    for size in range(14):
        got = guarded.reason_or_refusal(partial(vm.send, SYN[:size]))
        assert got in (None, (Verdict.DROP, Reason.TRUNCATED))

    assert guarded.reason(lambda: vm.send(SYN[:14])) == (Verdict.DROP, Reason.TRUNCATED)
    assert guarded.reason(lambda: vm.send(SYN)) == ACCEPTED


# --- A16 ------------------------------------------------------------------------------------------

#: Frames whose verdict needs more than the first bytes.
TELLING = {
    "accepted": (SYN, ACCEPTED),
    "spoofed": (SPOOFED, (Verdict.DROP, Reason.SPOOF_ADDRESS)),
    "port zero": (OUT.wrap4(tcp(dport=0), TCP), (Verdict.DROP, Reason.PORT_ZERO)),
    "xmas": (OUT.wrap4(tcp(flags="FPU"), TCP), (Verdict.DROP, Reason.TCP_FLAGS)),
    "cut": (OUT.wrap4(tcp(), TCP)[:-3], (Verdict.DROP, Reason.BAD_LENGTH)),
    "IPv6": (OUT.wrap6(tcp(), TCP), ACCEPTED),
    "IPv6 port zero": (
        OUT.wrap6(tcp(dport=0), TCP, headers=fragment6(TCP), first=44),
        (Verdict.DROP, Reason.PORT_ZERO),
    ),
}
CUTS = (14, 18, 34, 40, 54)


@TAP_HOOKS
def test_catalogue_A16_headers_in_pieces_from_a_tap(devices: Devices, hook: AtHook) -> None:
    vm = devices.queue("tap0", IFF_NAPI | IFF_NAPI_FRAGS)
    guarded = devices.protect(document(), hook=hook)
    got: dict[tuple[str, int], Fate] = {}

    for name, (frame, _) in TELLING.items():
        for cut in CUTS:
            parts = [frame[:cut], *(frame[n : n + 7] for n in range(cut, len(frame), 7))]
            guarded.forget()
            fate = guarded.reason_or_refusal(partial(vm.send_parts, parts))
            if fate is not None:
                got[name, cut] = fate

    assert {key: TELLING[key[0]][1] for key in got} == got
    # The control: the kernel took each of them in pieces at one place at least.
    assert {name for name, _ in got} == set(TELLING)


@TAP_HOOKS
def test_catalogue_A16_large_frames_with_a_short_linear_part(
    devices: Devices, hook: AtHook
) -> None:
    """A guest says how long the head of its frame is; beyond a page the kernel believes it."""
    tap = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document(), hook=hook)

    for head in (14, 15, 34, 54):
        _assert_judged_as_linear(guarded, tap, VnetHeader(header_length=head))


@HOOKS
def test_catalogue_A16_large_frames_of_a_veth(devices: Devices, hook: Hook) -> None:
    veth = devices.veth("tap0", mtu=9000, vnet=True)
    guarded = devices.protect(document(), hook=hook)

    for head in (14, 15, 34, 54):
        _assert_judged_as_linear(guarded, veth, VnetHeader(header_length=head))


def _assert_judged_as_linear(guarded: Guarded, vm: Queue | Wire, header: VnetHeader) -> None:
    """Frames of more than a page get what the same frames get when they are short."""
    body = bytes(8000)
    frames = {
        "accepted": (OUT.wrap4(udp(payload=body), UDP), ACCEPTED),
        "IPv6": (OUT.wrap6(udp(payload=body), UDP), ACCEPTED),
        "spoofed": (
            OUT.wrap4(udp(payload=body), UDP, local=STRANGER4),
            (Verdict.DROP, Reason.SPOOF_ADDRESS),
        ),
        "port zero": (
            OUT.wrap4(udp(dport=0, payload=body), UDP),
            (Verdict.DROP, Reason.PORT_ZERO),
        ),
        "length": (
            OUT.wrap4(udp(payload=body, length=9000), UDP),
            (Verdict.DROP, Reason.BAD_LENGTH),
        ),
    }
    for name, (frame, expected) in frames.items():
        guarded.forget()
        assert guarded.reason(partial(vm.send, frame, header)) == expected, name


# --- B4 -------------------------------------------------------------------------------------------

TAGS = {
    "allowed": (tagged(IN.wrap4(tcp(), TCP), 100), ACCEPTED),
    "not allowed": (tagged(IN.wrap4(tcp(), TCP), 101), (Verdict.DROP, Reason.VLAN)),
    "priority": (tagged(IN.wrap4(tcp(), TCP), 0), (Verdict.DROP, Reason.VLAN)),
    "with priority bits": (tagged(IN.wrap4(tcp(), TCP), 0xE064), ACCEPTED),
    "twice": (tagged(tagged(IN.wrap4(tcp(), TCP), 100), 100), (Verdict.DROP, Reason.VLAN)),
    "802.1ad": (tagged(IN.wrap4(tcp(), TCP), 100, 0x88A8), (Verdict.DROP, Reason.VLAN)),
    "untagged": (IN.wrap4(tcp(), TCP), ACCEPTED),
}


def test_catalogue_B4_a_tag_beside_or_in_the_frame_toward_the_vm(devices: Devices) -> None:
    """A tag is beside the bytes when the frame came through the bridge, in them when sent here."""
    vm = devices.queue("tap0")
    outside = devices.veth("net0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document(more=", vlans: [100]"))
    host = devices.wire("tap0")

    for name, (frame, expected) in TAGS.items():
        for sender in (outside, host):
            guarded.forget()
            assert guarded.reason(partial(sender.send, frame)) == expected, name
            arrived = [data for _, data in vm.received()]
            # Accepted frames reach the VM with their tag, dropped ones do not at all.
            assert arrived == ([frame] if expected == ACCEPTED else []), name


@TAP_HOOKS
def test_catalogue_B4_a_tag_from_the_vm(devices: Devices, hook: AtHook) -> None:
    """XDP on a TAP has the tag in the frame, tc beside it."""
    vm = devices.queue("tap0")
    guarded = devices.protect(document(more=", vlans: [100]"), hook=hook)
    syn = OUT.wrap4(tcp(), TCP)

    for tag, expected in ((100, ACCEPTED), (101, (Verdict.DROP, Reason.VLAN))):
        guarded.forget()
        assert guarded.reason(partial(vm.send, tagged(syn, tag))) == expected


# --- B14 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1505, 4000, 20000, 65535])  # a bridge forgives 4 bytes: a tag
def test_catalogue_B14_a_tap_may_write_more_than_its_mtu(devices: Devices, size: int) -> None:
    vm = devices.queue("tap0")
    outside = devices.veth("net0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document())
    payload = bytes(size - 28)

    # It is judged like any other, and the bridge has no room for it.
    assert guarded.reason(lambda: vm.send(fresh(1, payload))) == ACCEPTED
    spoofed = OUT.wrap4(udp(payload=payload), UDP, local=STRANGER4)
    assert guarded.reason(lambda: vm.send(spoofed)) == (Verdict.DROP, Reason.SPOOF_ADDRESS)
    assert guarded.reason(lambda: vm.send(fresh(2))) == ACCEPTED
    assert outside.received() == [fresh(2)]


@HOOKS
def test_catalogue_B14_a_veth_has_the_kernel_stop_them(devices: Devices, hook: Hook) -> None:
    vm = devices.veth("tap0")
    guarded = devices.protect(document(), hook=hook)

    assert refused(lambda: vm.send(fresh(1, bytes(1500))))
    assert guarded.counts() == {}
    assert guarded.reason(lambda: vm.send(fresh(2, bytes(1472)))) == ACCEPTED


# --- K5 -------------------------------------------------------------------------------------------

TCP_HEAD = 14 + 20 + 20
LIES = {
    "gso_size 0": VnetHeader(NEEDS_CSUM, GSO_TCPV4, TCP_HEAD, 0, 34, 16),
    "gso_size 1": VnetHeader(NEEDS_CSUM, GSO_TCPV4, TCP_HEAD, 1, 34, 16),
    "gso_size 65535": VnetHeader(NEEDS_CSUM, GSO_TCPV4, TCP_HEAD, 65535, 34, 16),
    "gso without checksum": VnetHeader(0, GSO_TCPV4, TCP_HEAD, 100),
    "gso of another family": VnetHeader(NEEDS_CSUM, GSO_TCPV6, TCP_HEAD, 100, 34, 16),
    "gso of another protocol": VnetHeader(NEEDS_CSUM, GSO_UDP, TCP_HEAD, 100, 34, 16),
    "gso of datagrams": VnetHeader(NEEDS_CSUM, GSO_UDP_L4, TCP_HEAD, 100, 34, 6),
    "gso of no kind": VnetHeader(NEEDS_CSUM, 0x7F, TCP_HEAD, 100, 34, 16),
    "all gso bits": VnetHeader(0xFF, 0xFF, TCP_HEAD, 100, 34, 16),
    "header longer than the frame": VnetHeader(0, 0, 0xFFFF),
    "gso header longer than the frame": VnetHeader(NEEDS_CSUM, GSO_TCPV4, 0xFFFF, 100, 34, 16),
    "header of 1 byte": VnetHeader(0, 0, 1),
    "checksum beyond the frame": VnetHeader(NEEDS_CSUM, 0, 0, 0, 0xFFF0, 2),
    "checksum field beyond the frame": VnetHeader(NEEDS_CSUM, 0, 0, 0, 34, 0xFFF0),
    "checksum at the very end": VnetHeader(NEEDS_CSUM, 0, 0, 0, 54, 0),
    "checksum over the link header": VnetHeader(NEEDS_CSUM, 0, 0, 0, 0, 0),
    "checksum over the network header": VnetHeader(NEEDS_CSUM, 0, 0, 0, 14, 10),
}
#: What tc refuses of that: it sees requests for checksums at places where there is none.
WRONG_REQUESTS = {
    "gso of datagrams",
    "checksum over the link header",
    "checksum over the network header",
}


@TAP_HOOKS
def test_catalogue_K5_lies_in_the_virtio_header(devices: Devices, hook: AtHook) -> None:
    """The kernel or tc refuses them, or what is judged is the frame and nothing said of it."""
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document(), hook=hook)
    payload = bytes(300)
    honest = {
        OUT.wrap4(tcp(payload=payload), TCP): ACCEPTED,
        OUT.wrap4(tcp(payload=payload), TCP, local=STRANGER4): (
            Verdict.DROP,
            Reason.SPOOF_ADDRESS,
        ),
    }
    refusals = set()

    for frame, expected in honest.items():
        for name, lie in LIES.items():
            guarded.forget()
            guarded.counts()
            was_refused = refused(partial(vm.send, frame, lie))
            # XDP may have seen a frame before the kernel looked at what was said of it.
            seen = [key[1:] for key in guarded.counts()]
            # A shield drops what is forged before tc sees what else is wrong with it.
            at_tc = hook is Hook.TC or (hook == SHIELDED and expected == ACCEPTED)
            is_wrong = at_tc and name in WRONG_REQUESTS
            fate = (Verdict.DROP, Reason.CHECKSUM_REQUEST) if is_wrong else expected
            assert seen in ([fate], [] if was_refused else [fate]), (name, seen)
            if was_refused:
                refusals.add(name)

    # The controls: an honest header is taken, and the worst lies never are.
    honest_header = VnetHeader(NEEDS_CSUM, GSO_TCPV4, TCP_HEAD, 100, 34, 16)
    guarded.forget()
    assert guarded.reason(lambda: vm.send(next(iter(honest)), honest_header)) == ACCEPTED
    assert refusals >= {"gso_size 0", "checksum beyond the frame", "header longer than the frame"}
