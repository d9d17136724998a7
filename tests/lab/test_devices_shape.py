# SPDX-License-Identifier: Apache-2.0
"""Devices of all shapes, changing while they work, and shared with others (K6 to K8, K10, K11)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from scripts.lab import wire
from tests.frames import IN, OUT, TCP, UDP, tcp, udp
from tests.lab.devices import TAP_HOOKS, AtHook, Devices, Guarded, Wire, document, refused, run
from tests.lab.foreign_xdp import redirecting_program
from tests.lab.taps import IFF_MULTI_QUEUE, IFF_VNET_HDR, Queue
from tests.lab.topology import eventually
from vgw import libbpf
from vgw.abi import Path, Reason, Verdict
from vgw.errors import ForeignProgramError, KernelError
from vgw.policy.model import Hook

pytestmark = pytest.mark.lab

HOOKS = pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
ACCEPTED = (Verdict.ACCEPT, Reason.DEFAULT)
DENIED = (Verdict.DROP, Reason.DEFAULT)
NO_23 = "[{name: no-telnet, action: drop, services: [tcp/23, udp/23]}]"
DENY_ALL = "{ingress: drop, egress: drop}"


def interface(devices: Devices) -> dict[str, Any]:
    """Return what status says of the VM's interface."""
    found: dict[str, Any]
    [found] = devices.host.status("web01")["vms"][0]["interfaces"]
    return found


# --- K6 -------------------------------------------------------------------------------------------

#: A veth whose far end takes more than this has no native XDP.
VETH_NATIVE_MTU = 3506
TAP_LARGEST = 65521
SIZES = (576, 1280, 1500, 9000)


def full_frame(mtu: int, port: int) -> bytes:
    """Return the largest frame of an MTU, to a port of its own."""
    return OUT.wrap4(udp(port, 53, bytes(mtu - 28)), UDP)


def assert_judges(guarded: Guarded, vm: Queue | Wire, mtu: int) -> None:
    """The largest frames of an MTU are judged, those that are allowed and those that are not."""
    guarded.forget()
    assert guarded.reason(partial(vm.send, full_frame(mtu, 1))) == ACCEPTED
    denied = OUT.wrap4(udp(2, 23, bytes(mtu - 28)), UDP)
    assert guarded.reason(partial(vm.send, denied)) == (Verdict.DROP, Reason.RULE)


@TAP_HOOKS
@pytest.mark.parametrize("mtu", [*SIZES, TAP_LARGEST])
def test_catalogue_K6_a_tap_of_any_size(devices: Devices, hook: AtHook, mtu: int) -> None:
    vm = devices.queue("tap0")
    run(f"ip link set tap0 mtu {mtu}")
    guarded = devices.protect(document(egress=NO_23), hook=hook)

    assert interface(devices)["from_vm"]["mode"] == ("native" if hook is Hook.XDP else "tcx")
    assert_judges(guarded, vm, mtu)


@HOOKS
@pytest.mark.parametrize("mtu", [*SIZES, VETH_NATIVE_MTU, VETH_NATIVE_MTU + 1, 65535])
def test_catalogue_K6_a_veth_of_any_size(devices: Devices, hook: Hook, mtu: int) -> None:
    """Too large for native XDP is no failure: the program runs as generic, and status says so."""
    vm = devices.veth("tap0", mtu)
    guarded = devices.protect(document(egress=NO_23), hook=hook)

    mode = interface(devices)["from_vm"]["mode"]
    if hook is Hook.XDP:
        there = libbpf.xdp_program(socket.if_nametoindex("tap0"))
        assert there is not None
        assert mode == there[1] == ("native" if mtu <= VETH_NATIVE_MTU else "generic")
    else:
        assert mode == "tcx"
    assert_judges(guarded, vm, mtu)


@HOOKS
def test_catalogue_K6_a_size_that_changes(devices: Devices, hook: Hook) -> None:
    vm = devices.queue("tap0")
    guarded = devices.protect(document(egress=NO_23), hook=hook)
    before = interface(devices)

    for mtu in (9000, 576, TAP_LARGEST, 1500):
        run(f"ip link set tap0 mtu {mtu}")
        assert interface(devices)["from_vm"] == before["from_vm"]
        assert_judges(guarded, vm, mtu)


@HOOKS
def test_catalogue_K6_a_veth_that_grows(devices: Devices, hook: Hook) -> None:
    """With native XDP on the host's end the kernel refuses a far end that is too large for it."""
    vm = devices.veth("tap0")
    guarded = devices.protect(document(egress=NO_23), hook=hook)
    run("ip link set tap0 mtu 9000")

    run(*vm.space.command("ip link set eth0 mtu 9000"), check=hook is not Hook.XDP)

    with wire.inside(vm.space.namespace):
        mtu = int(run("cat /sys/class/net/eth0/mtu")) if hook is Hook.TC else 1500
    assert interface(devices)["attached"]
    assert_judges(guarded, vm, 9000 if hook is Hook.TC else mtu)
    if hook is Hook.XDP:
        assert refused(partial(vm.send, full_frame(9000, 3)))


# --- K7 -------------------------------------------------------------------------------------------


@TAP_HOOKS
def test_catalogue_K7_a_flow_over_all_queues(devices: Devices, hook: AtHook) -> None:
    queues = [devices.queue("tap0", IFF_MULTI_QUEUE) for _ in range(4)]
    guarded = devices.protect(document(egress=NO_23), hook=hook)
    segment = OUT.wrap4(tcp(flags="A", seq=1001), TCP)

    assert guarded.reason(partial(queues[0].send, OUT.wrap4(tcp(), TCP))) == ACCEPTED
    for queue in queues:
        established = (Verdict.ACCEPT, Reason.CT_ESTABLISHED)
        assert guarded.reason(partial(queue.send, segment)) == established
        # The control: on each of them the policy holds as well.
        telnet = OUT.wrap4(tcp(dport=23), TCP)
        assert guarded.reason(partial(queue.send, telnet)) == (Verdict.DROP, Reason.RULE)
    assert guarded.endpoint.maps.meta().entries == 1


def test_catalogue_K7_counters_of_all_cpus_sum_up(devices: Devices) -> None:
    queues = [devices.queue("tap0", IFF_MULTI_QUEUE) for _ in range(4)]
    guarded = devices.protect(document())
    each, frame = 500, OUT.wrap4(udp(), UDP)

    def flood(queue: Queue, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        for _ in range(each):
            queue.send(frame)

    cpus = sorted(os.sched_getaffinity(0))
    threads = [
        threading.Thread(target=flood, args=(queue, cpus[number % len(cpus)]))
        for number, queue in enumerate(queues)
    ]
    guarded.counts()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    counts = guarded.counts()
    assert {key[1] for key in counts} == {Verdict.ACCEPT}
    assert sum(count.packets for count in counts.values()) == each * len(queues)
    assert sum(count.bytes for count in counts.values()) == each * len(queues) * len(frame)
    # However many queues saw its first packet at once, it is one flow.
    assert counts[Path.FROM_VM, Verdict.ACCEPT, Reason.DEFAULT].packets >= 1
    assert guarded.endpoint.maps.meta().entries == 1


@TAP_HOOKS
def test_catalogue_K7_queues_that_come_and_go(devices: Devices, hook: AtHook) -> None:
    first = devices.queue("tap0", IFF_MULTI_QUEUE)
    second = devices.queue("tap0", IFF_MULTI_QUEUE)
    guarded = devices.protect(document(egress=NO_23), hook=hook)
    third = devices.queue("tap0", IFF_MULTI_QUEUE)  # after the program
    telnet = partial(OUT.wrap4, tcp(dport=23), TCP)

    # A queue that is switched off takes nothing for the VM, but what it sends is judged.
    second.set_attached(False)
    fate = guarded.reason_or_refusal(partial(second.send, telnet()))
    assert fate in {None, (Verdict.DROP, Reason.RULE)}
    second.set_attached(True)

    for queue in (first, second, third):
        guarded.forget()
        assert guarded.reason(partial(queue.send, OUT.wrap4(tcp(), TCP))) == ACCEPTED
        assert guarded.reason(partial(queue.send, telnet())) == (Verdict.DROP, Reason.RULE)
    assert interface(devices)["attached"]


# --- K8 -------------------------------------------------------------------------------------------

MORE = 200


@contextmanager
def stream(send: Callable[[bytes], None], arrived: Callable[[], list[bytes]]) -> Iterator[Stream]:
    """Send numbered frames without a pause for the length of the block."""
    streaming = Stream(send, arrived)
    thread = threading.Thread(target=streaming.run)
    thread.start()
    try:
        yield streaming
    finally:
        streaming.stop.set()
        thread.join()


class Stream:
    """Frames that are numbered by their ports; what arrived of them is collected on the way."""

    def __init__(self, send: Callable[[bytes], None], arrived: Callable[[], list[bytes]]) -> None:
        self._send, self._arrived = send, arrived
        self.stop = threading.Event()
        self.sent = 0
        self.numbers: set[int] = set()

    def run(self) -> None:
        while not self.stop.is_set():
            self._send(OUT.wrap4(udp(1 + self.sent % 60000, 1 + self.sent // 60000), UDP))
            self.sent += 1
            for frame in self._arrived():
                source, destination = (int.from_bytes(frame[n : n + 2], "big") for n in (34, 36))
                self.numbers.add(source - 1 + (destination - 1) * 60000)

    def wait_for(self, count: int) -> None:
        eventually(f"{count} frames were sent", lambda: self.sent >= count)


def _tap(devices: Devices) -> Callable[[bytes], None]:
    return devices.queue("tap0").send


def _sleeping_tap(devices: Devices) -> Callable[[bytes], None]:
    return devices.queue("tap0", blocking=True).send


def _headed_tap(devices: Devices) -> Callable[[bytes], None]:
    return devices.queue("tap0", IFF_VNET_HDR).send


def _veth(devices: Devices) -> Callable[[bytes], None]:
    return devices.veth("tap0").send


@HOOKS
@pytest.mark.parametrize("make", [_tap, _sleeping_tap, _headed_tap, _veth])
def test_catalogue_K8_attach_while_the_vm_sends(
    devices: Devices, make: Callable[[Devices], Callable[[bytes], None]], hook: Hook
) -> None:
    send = make(devices)
    outside = devices.veth("net0")
    devices.bridge("tap0", "net0")
    with stream(send, outside.received) as streaming:
        streaming.wait_for(MORE)
        devices.protect(document(defaults=DENY_ALL), hook=hook)
        # The one after this number may have been on its way while attach returned.
        after = streaming.sent + 1
        streaming.wait_for(after + MORE)

    late = [number for number in streaming.numbers if number >= after]
    assert late == []
    # The control: up to then they arrived.
    assert len(streaming.numbers) >= MORE // 2


# --- K10 ------------------------------------------------------------------------------------------


def test_catalogue_K10_attach_is_refused_where_somebody_else_has_xdp(devices: Devices) -> None:
    vm = devices.queue("tap0")
    outside = devices.veth("net0")
    devices.bridge("tap0", "net0")
    ifindex = socket.if_nametoindex("tap0")

    with redirecting_program(ifindex) as program:
        with pytest.raises(ForeignProgramError, match=f"XDP program .* {program}.*--force"):
            devices.protect(document(), hook=Hook.XDP)
        assert libbpf.xdp_program(ifindex) == (program, "native")
        assert devices.host.attached() == []
        vm.send(OUT.wrap4(udp(), UDP))
        assert outside.received() == []  # it goes to the sockets of the other one

    # The control: once it is gone vgw has its place.
    guarded = devices.protect(document(), hook=Hook.XDP)
    assert guarded.reason(partial(vm.send, OUT.wrap4(udp(), UDP))) == ACCEPTED
    assert outside.received() == [OUT.wrap4(udp(), UDP)]


def test_catalogue_K10_somebody_else_is_said_at_the_tc_hook(devices: Devices) -> None:
    """What XDP redirects tc never sees: status says that there is such a program."""
    vm = devices.queue("tap0")
    guarded = devices.protect(document(), hook=Hook.TC)
    assert interface(devices)["reason"] is None

    with redirecting_program(socket.if_nametoindex("tap0")) as program:
        vm.send(OUT.wrap4(udp(), UDP))
        assert guarded.counts() == {}
        assert interface(devices)["from_vm"]["ahead"] == [program]
        assert "may bypass it" in interface(devices)["reason"]

    assert guarded.reason(partial(vm.send, OUT.wrap4(udp(), UDP))) == ACCEPTED


def test_catalogue_K10_nobody_takes_the_place_of_vgw(devices: Devices) -> None:
    vm = devices.queue("tap0")
    guarded = devices.protect(document(defaults=DENY_ALL), hook=Hook.XDP)
    ifindex = socket.if_nametoindex("tap0")
    ours = libbpf.xdp_program(ifindex)

    with pytest.raises(KernelError), redirecting_program(ifindex):
        pass

    assert libbpf.xdp_program(ifindex) == ours
    assert guarded.reason(partial(vm.send, OUT.wrap4(udp(), UDP))) == DENIED


# --- K11 ------------------------------------------------------------------------------------------


@HOOKS
def test_catalogue_K11_a_redirect_of_others_is_said(devices: Devices, hook: Hook) -> None:
    """What vgw drops is dropped before it, what vgw accepts may go elsewhere: status warns."""
    vm = devices.queue("tap0")
    outside, sink = devices.veth("net0"), devices.veth("sink0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document(egress=NO_23), hook=hook)
    allowed, denied = OUT.wrap4(udp(1, 53), UDP), OUT.wrap4(udp(1, 23), UDP)
    assert interface(devices)["beside"] == []

    run("tc qdisc add dev tap0 clsact")
    redirect = "u32 match u32 0 0 action mirred egress redirect dev sink0"
    run(f"tc filter add dev tap0 ingress prio 5 protocol all {redirect}")
    assert interface(devices)["beside"] == [{"path": "from_vm", "kind": "u32", "id": 5}]
    assert guarded.reason(partial(vm.send, allowed)) == ACCEPTED
    assert guarded.reason(partial(vm.send, denied)) == (Verdict.DROP, Reason.RULE)

    assert (outside.received(), sink.received()) == ([], [allowed])
    run("tc qdisc del dev tap0 clsact")
    assert interface(devices)["beside"] == []
    vm.send(allowed)
    assert (outside.received(), sink.received()) == ([allowed], [])


def test_catalogue_K11_what_others_redirect_to_the_vm_is_judged(devices: Devices) -> None:
    """A redirect of tc to the VM's interface goes through its firewall, as the bridge does."""
    vm = devices.queue("tap0")
    outside = devices.veth("net0")
    guarded = devices.protect(document(ingress=NO_23.replace("telnet", "telnet-in")))
    run("tc qdisc add dev net0 clsact")
    redirect = "u32 match u32 0 0 action mirred egress redirect dev tap0"
    run(f"tc filter add dev net0 ingress prio 5 protocol all {redirect}")

    telnet = IN.wrap4(tcp(dport=23), TCP)
    assert guarded.reason(partial(outside.send, telnet)) == (Verdict.DROP, Reason.RULE)
    assert guarded.reason(partial(outside.send, IN.wrap4(tcp(), TCP))) == ACCEPTED
    assert [data for _, data in vm.received()] == [IN.wrap4(tcp(), TCP)]
