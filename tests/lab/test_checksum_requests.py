# SPDX-License-Identifier: Apache-2.0
"""Checksum requests of a real virtio header get what their verdict table says (K5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.cases.checksum import CASES, UPPER4
from tests.cases.table import Send
from tests.frames import OUT, PEER4, PEER6, STRANGER4, TCP, UDP, tcp, udp
from tests.lab.devices import Devices, Guarded, document
from tests.lab.taps import IFF_VNET_HDR, NEEDS_CSUM, VnetHeader
from tests.lab.test_devices_offloads import partial_sum
from vgw.abi import Path, Reason, Verdict
from vgw.loader import socket_buffer
from vgw.loader.socket_buffer import socket_buffer_options
from vgw.policy.model import Hook

pytestmark = pytest.mark.lab

ACCEPTED = (Verdict.ACCEPT, Reason.DEFAULT)
REFUSED = (Verdict.DROP, Reason.CHECKSUM_REQUEST)
#: Kernels of late refuse requests that begin in front of the upper header, old ones do not.
MOST_UNTAKEN = 0.5


def request(start: int, offset: int) -> VnetHeader:
    return VnetHeader(NEEDS_CSUM, 0, 0, 0, start, offset)


def rows(path: Path) -> Iterator[tuple[str, Send]]:
    for case in CASES:
        (step,) = case.steps
        if isinstance(step, Send) and step.path is path:
            yield case.name, step


def play(guarded: Guarded, path: Path, send: Callable[[bytes, VnetHeader], None]) -> None:
    """Send each row of a path; every kind of packet and most rows are taken by the kernel."""
    wrong, untaken, taken, kinds = [], [], set(), set()
    for name, step in rows(path):
        assert step.checksum is not None
        guarded.forget()
        got = guarded.reason_or_refusal(partial(send, step.frame, request(*step.checksum)))
        kind = name.rpartition(" (")[0], step.expected.reason
        kinds.add(kind)
        if got is None:
            untaken.append(name)
            continue
        taken.add(kind)
        if got != step.expected[:2]:
            wrong.append(f"{name}: {got[0].name} {got[1].name}")

    assert not wrong, "\n".join(wrong)
    assert kinds - taken == set()
    assert len(untaken) <= MOST_UNTAKEN * sum(1 for _ in rows(path)), untaken


def test_catalogue_K5_requests_of_the_vm(devices: Devices) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    play(devices.protect(document()), Path.FROM_VM, vm.send)


def test_catalogue_K5_requests_where_programs_cannot_read_directly(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older kernel, or one without JIT."""
    monkeypatch.setattr(socket_buffer, "_cast", dict)
    socket_buffer_options.cache_clear()
    try:
        vm = devices.queue("tap0", IFF_VNET_HDR)
        play(devices.protect(document()), Path.FROM_VM, vm.send)
    finally:
        socket_buffer_options.cache_clear()


def test_catalogue_K5_requests_of_a_neighbour(devices: Devices) -> None:
    """The neighbour is another guest on the host's bridge: nobody fills in what goes to the VM."""
    devices.queue("tap0", IFF_VNET_HDR)
    neighbour = devices.queue("net0", IFF_VNET_HDR)
    devices.bridge("tap0", "net0")
    play(devices.protect(document()), Path.TO_VM, neighbour.send)


def test_catalogue_K5_requests_in_a_frame_with_a_tag(devices: Devices) -> None:
    """The kernel takes the tag out of the frame, and the place of the request goes along."""
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document(more=", vlans: [100]"))
    frame = OUT.wrap4(tcp(payload=bytes(20)), TCP)
    frame = frame[:12] + bytes.fromhex("81000064") + frame[12:]

    fates = {}
    for place in ((38, 16), (34, 16), (38, 2), (34, 6), (58, 0), (57, 0)):
        guarded.forget()
        fates[place] = guarded.reason(partial(vm.send, frame, request(*place)))

    assert [place for place, fate in fates.items() if fate == ACCEPTED] == [(38, 16), (58, 0)]
    assert set(fates.values()) == {ACCEPTED, REFUSED}


@pytest.mark.parametrize("takes", [True, False])
def test_catalogue_K5_requests_in_a_long_frame(devices: Devices, takes: bool) -> None:
    """Frames of more than a page, whose head is elsewhere once the program has read it."""
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document())
    frame = OUT.wrap4(udp(payload=bytes(8000)), UDP)
    place = (UPPER4, 6) if takes else (UPPER4, 2)
    header = VnetHeader(NEEDS_CSUM, 0, 60, 0, *place)
    assert guarded.reason(partial(vm.send, frame, header)) == (ACCEPTED if takes else REFUSED)


def test_catalogue_K5_the_checksum_in_a_tunnel_is_filled_in(devices: Devices) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    outside = devices.queue("net0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document())
    whole = OUT.wrap4(tcp(payload=b"inner"), TCP)
    left_out = partial_sum(whole, 4, 16)
    start = UPPER4 + 8 + 8

    def packed(inner: bytes) -> bytes:
        # Without a checksum of its own, as VXLAN goes.
        frame = OUT.wrap4(udp(50000, 4789, bytes(8) + inner), UDP)
        return frame[: UPPER4 + 6] + bytes(2) + frame[UPPER4 + 8 :]

    ask = request(start + UPPER4, 16)
    assert guarded.reason(lambda: vm.send(packed(left_out), ask)) == ACCEPTED
    assert outside.received() == [(b"", packed(whole))]
    # The control: the same inner packet arrives as it is where nothing is asked for.
    vm.send(packed(left_out))
    assert outside.received() == [(b"", packed(left_out))]


@pytest.mark.parametrize("family", [4, 6])
def test_catalogue_K5_an_address_cannot_be_rewritten(devices: Devices, family: int) -> None:
    """A rule lets the VM talk to one host only, and no request makes it another."""
    vm = devices.queue("tap0", IFF_VNET_HDR)
    outside = devices.queue("net0")
    devices.bridge("tap0", "net0")
    peer = PEER4 if family == 4 else PEER6
    one = f"[{{name: one, action: accept, to: ['{peer}']}}]"
    guarded = devices.protect(document(egress=one, defaults="{ingress: drop, egress: drop}"))
    frame = (OUT.wrap4 if family == 4 else OUT.wrap6)(udp(payload=bytes(40)), UDP)
    end = 34 if family == 4 else 54

    for start in range(end - 4, end - 1):
        guarded.reason_or_refusal(partial(vm.send, frame, request(start, end - 2 - start)))
    assert outside.received() == []
    # The control: it reaches that host, and no other.
    assert guarded.reason(partial(vm.send, frame, request(end, 6)))[0] is Verdict.ACCEPT
    assert len(outside.received()) == 1
    stranger = OUT.wrap4(udp(), UDP, remote=STRANGER4)
    assert guarded.reason(partial(vm.send, stranger)) == (Verdict.DROP, Reason.DEFAULT)


def test_catalogue_K5_xdp_does_not_see_requests(devices: Devices) -> None:
    """What the limits in README.md say, and status of the interface: the control of the rest."""
    vm = devices.queue("tap0", IFF_VNET_HDR)
    guarded = devices.protect(document(), hook=Hook.XDP)
    frame = OUT.wrap4(udp(), UDP)
    assert guarded.reason(partial(vm.send, frame, request(UPPER4, 2))) == ACCEPTED
    [interface] = devices.host.status("web01")["vms"][0]["interfaces"]
    assert "use tc" in interface["guards_off"]["checksum"]

    devices.protect(document(), hook=Hook.AUTO)
    [interface] = devices.host.status("web01")["vms"][0]["interfaces"]
    assert interface["from_vm"]["hook"] == "tc"
    assert "checksum" not in interface["guards_off"]
