# SPDX-License-Identifier: Apache-2.0
"""Floods of a VM behind a TAP are met at XDP while they last, and no packet is judged otherwise."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from bench.flood import Flood, Flooder, Step, tap_target
from scripts.lab.tap_guest import open_tap
from scripts.lab.wire import inside
from tests.frames import OUT, UDP, udp
from tests.fuzz.compare import pinned
from tests.lab.devices import SHIELDED, Devices, document, run, xdp
from tests.lab.foreign_xdp import passing_program, redirecting_program
from tests.lab.topology import Lab, eventually
from vgw import libbpf
from vgw.abi import Path, Reason, Verdict
from vgw.controller.floods import CALM_SECONDS
from vgw.controller.links import shield_pin
from vgw.errors import KernelError
from vgw.policy.model import Hook

pytestmark = [pytest.mark.lab, pytest.mark.bpf]

NO_23 = "[{name: telnet, action: drop, services: [tcp/23, udp/23]}]"
DENIED, ALLOWED = OUT.wrap4(udp(4000, 23), UDP), OUT.wrap4(udp(4000, 53), UDP)
TOGGLES, EACH, DATAGRAMS = 60, 100, 2000
#: A flood lasts so long at most, and a shield is up by then although it had to be compiled.
LONG = 60.0


def numbered(number: int) -> bytes:
    return OUT.wrap4(udp(4000, 53, struct.pack("!I", number)), UDP)


def flood_of(fd: int, seconds: float, frame: bytes = DENIED) -> Flood:
    return Flood((Step(tap_target(fd), "neither", frame),), 10**12, seconds)


# --- one host, by hand ----------------------------------------------------------------------------


def test_no_packet_of_a_flood_is_judged_otherwise_while_the_shield_comes_and_goes(
    devices: Devices, flooder: Flooder
) -> None:
    vm, outside = devices.queue("tap0", blocking=True), devices.veth("net0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document(egress=NO_23))
    guarded.counts()
    arrived: list[bytes] = []
    with flooder.running(flood_of(vm.fd, LONG)) as process:
        for turn in range(TOGGLES):
            devices.raise_shield()
            _send(vm.fd, range(2 * turn * EACH, (2 * turn + 1) * EACH))
            devices.host.shields.close()
            _send(vm.fd, range((2 * turn + 1) * EACH, (2 * turn + 2) * EACH))
            arrived += outside.received()
        process.terminate()
        process.wait()
    arrived += outside.received()

    assert arrived == [numbered(each) for each in range(2 * TOGGLES * EACH)]
    counts = guarded.counts()
    passed = sum(each.packets for key, each in counts.items() if key[1] is Verdict.ACCEPT)
    assert passed == 2 * TOGGLES * EACH
    assert set(counts) <= {
        (Path.FROM_VM, Verdict.DROP, Reason.RULE),
        (Path.FROM_VM, Verdict.ACCEPT, Reason.DEFAULT),
        (Path.FROM_VM, Verdict.ACCEPT, Reason.CT_ESTABLISHED),
    }


def _send(fd: int, numbers: range) -> None:
    for number in numbers:
        os.write(fd, numbered(number))


def test_fragments_that_wait_on_their_way_to_tc_are_not_cut_off(devices: Devices) -> None:
    """Receive Packet Steering queues frames behind XDP, so a datagram's second one comes there
    before tc has judged the first one.
    """
    vm = devices.queue("tap0", blocking=True)
    guarded = devices.protect(document(egress=NO_23), hook=SHIELDED)
    whole = udp(4000, 53, bytes(64))
    first, second = (
        OUT.wrap4(whole[:40], UDP, fragment=0x2000),
        OUT.wrap4(whole[40:], UDP, fragment=5),
    )
    here, *others = sorted(os.sched_getaffinity(0))
    steer("tap0", others or [here])

    def send(numbers: range) -> None:
        for number in numbers:
            for frame in (first, second):
                os.write(vm.fd, frame[:18] + struct.pack("!H", number) + frame[20:])

    with pinned(here):
        for turn in range(DATAGRAMS // EACH):
            numbers = range(turn * EACH, (turn + 1) * EACH)
            counts = guarded.judged(partial(send, numbers), 2 * EACH)
            assert {verdict for _, verdict, _ in counts} == {Verdict.ACCEPT}, counts


def steer(interface: str, cpus: Sequence[int]) -> None:
    """Have the frames of an interface queued for some CPUs."""
    mask = f"{sum(1 << cpu for cpu in cpus):x}"
    script = (
        f"mount -t sysfs none /sys && echo {mask} > /sys/class/net/{interface}/queues/rx-0/rps_cpus"
    )
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True)


def test_each_packet_is_counted_once(devices: Devices, flooder: Flooder) -> None:
    vm = devices.queue("tap0", blocking=True)
    guarded = devices.protect(document(egress=NO_23))
    guarded.counts()
    sent = 0
    for shielded in (False, True, False, True):
        if shielded:
            devices.raise_shield()
        sent += flooder.run(flood_of(vm.fd, 0.1)).sent
        devices.host.shields.close()
    assert {key: each.packets for key, each in guarded.counts().items()} == {
        (Path.FROM_VM, Verdict.DROP, Reason.RULE): sent
    }


def status_of(devices: Devices) -> dict[str, Any]:
    """Return what `status` says of the from_vm program and of the interface."""
    (vm,) = devices.host.status("web01")["vms"]
    (interface,) = vm["interfaces"]
    return interface  # type: ignore[no-any-return]


def test_status_says_so_and_takes_it_for_nobody_elses(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23), hook=SHIELDED)
    interface = status_of(devices)
    assert xdp() == (interface["from_vm"]["shield"], "native")
    assert (interface["from_vm"]["hook"], interface["reason"], interface["beside"]) == (
        "tc",
        None,
        [],
    )
    devices.host.shields.close()
    assert "shield" not in status_of(devices)["from_vm"]


CHANGES: dict[str, Callable[[Devices], object]] = {
    "apply": lambda devices: devices.host.attach(document(), "web01"),
    "attach --hook xdp": lambda devices: devices.host.attach(
        document(egress=NO_23), "web01", hook=Hook.XDP
    ),
    "detach": lambda devices: devices.host.detach("web01"),
    "detach --all": lambda devices: devices.host.detach_all(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_taken_off_before_a_change(devices: Devices, name: str) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23), hook=SHIELDED)
    shield = xdp()
    CHANGES[name](devices)
    assert devices.host.shields.up() == set()
    assert xdp() != shield
    assert not shield_pin(devices.paths.endpoint_dir("web01", "tap0")).exists()


def test_it_leaves_no_pin_where_the_interface_got_another_name(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23), hook=SHIELDED)
    run("ip link set tap0 down")
    run("ip link set tap0 name tap9")
    (renamed,) = devices.host.follow_renames()
    pin = shield_pin(devices.paths.endpoint_dir("web01", renamed.new))
    assert pin.exists()
    devices.host.shields.close()
    assert xdp("tap9") is None
    assert not pin.exists()


def test_an_apply_that_changes_nothing_leaves_it(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23), hook=SHIELDED)
    shield = xdp()
    devices.host.attach(document(egress=NO_23), "web01")
    assert xdp() == shield


def test_somebody_elses_program_keeps_its_place(devices: Devices) -> None:
    vm = devices.queue("tap0")
    guarded = devices.protect(document(egress=NO_23))
    with redirecting_program(socket.if_nametoindex("tap0")) as program:
        with pytest.raises(KernelError):
            devices.raise_shield()
        assert xdp() == (program, "native")
    assert not shield_pin(devices.paths.endpoint_dir("web01", "tap0")).exists()
    assert guarded.reason(partial(vm.send, DENIED)) == (Verdict.DROP, Reason.RULE)


def test_what_a_killed_process_left_is_in_nobodys_way(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23))
    directory = devices.paths.endpoint_dir("web01", "tap0")
    libbpf.pin(libbpf.get_pinned(directory / "prog_to_vm"), shield_pin(directory))
    assert status_of(devices)["reason"] is None
    devices.raise_shield()
    assert xdp() == (status_of(devices)["from_vm"]["shield"], "native")


# --- a controller ---------------------------------------------------------------------------------

POLICY = f"""
schema: vgw/v1
vms:
  flood:
    interfaces: [{{name: tap-flood, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}}]
policies:
  - name: out
    tier: vm
    applies_to: {{all: true}}
    egress: {NO_23}
defaults: {{ingress: drop, egress: accept}}
"""


@pytest.fixture
def tap(lab: Lab) -> Iterator[int]:
    """The VM's side of a TAP on the lab's host."""
    with inside(f"{lab.name}-host"):
        fd = open_tap("tap-flood", None, offload=False)
    yield fd
    os.close(fd)


def shield(lab: Lab) -> object:
    (vm,) = lab.json("status", "--vm", "flood")["vms"]
    return vm["interfaces"][0]["from_vm"].get("shield")


def dropped(lab: Lab) -> float:
    return lab.metric("vgw_packets_total", vm="flood", verdict="drop") or 0.0


def events(lab: Lab) -> list[str]:
    return [each["event"] for each in lab.records() if each["event"].startswith("shield_")]


def test_a_controller_meets_a_flood_and_lets_go_when_it_is_over(
    lab: Lab, tap: int, flooder: Flooder
) -> None:
    lab.write_policy(POLICY)
    before = len(events(lab))
    with lab.controller():
        eventually("the VM is protected", lambda: lab.metric("vgw_attached", vm="flood") == 1.0)
        assert lab.metric("vgw_shield", vm="flood") == 0.0
        with flooder.running(flood_of(tap, LONG)):
            eventually("a shield is up", lambda: shield(lab) is not None, LONG)
            assert lab.metric("vgw_shield", vm="flood") == 1.0
            before_now = dropped(lab)
            eventually("packets are dropped behind it", lambda: dropped(lab) > before_now)
        eventually("the shield is off", lambda: shield(lab) is None, 4 * CALM_SECONDS)
        assert lab.metric("vgw_shield", vm="flood") == 0.0
        alarms = lab.json("status")["alarms"]
    assert events(lab)[before:] == ["shield_raised", "shield_lowered"]
    assert alarms == []


def test_a_controller_that_is_killed_takes_its_shields_along(
    lab: Lab, tap: int, flooder: Flooder
) -> None:
    lab.write_policy(POLICY)
    with flooder.running(flood_of(tap, LONG)):
        with lab.controller() as process:
            eventually("the VM is protected", lambda: lab.metric("vgw_attached", vm="flood") == 1.0)
            eventually("a shield is up", lambda: shield(lab) is not None, LONG)
            process.kill()
            process.wait()
        assert shield(lab) is None
        with lab.controller():
            eventually("a shield is up again", lambda: shield(lab) is not None, LONG)


def test_a_vm_that_asks_for_tc_gets_no_shield(lab: Lab, tap: int, flooder: Flooder) -> None:
    lab.write_policy(POLICY.replace("addresses:", "hook: tc, addresses:"))
    with lab.controller():
        eventually("the VM is protected", lambda: lab.metric("vgw_attached", vm="flood") == 1.0)
        flooder.run(flood_of(tap, 2.5))
        assert shield(lab) is None
        assert lab.metric("vgw_shield", vm="flood") is None


def test_where_xdp_is_taken_a_flood_is_met_at_tc(lab: Lab, tap: int, flooder: Flooder) -> None:
    lab.write_policy(POLICY)
    log = lab.directory / "log/controller.log"
    begin = log.stat().st_size if log.exists() else 0
    with ExitStack() as stack:
        with inside(lab.host.namespace):
            ifindex = socket.if_nametoindex("tap-flood")
            other = stack.enter_context(passing_program(ifindex))
        stack.enter_context(lab.controller())
        stack.enter_context(flooder.running(flood_of(tap, LONG)))
        eventually("it is said", lambda: "is met at tc alone" in log.read_text()[begin:], LONG)
        with inside(lab.host.namespace):
            assert xdp("tap-flood") == (other, "native")
        last = dropped(lab)
        eventually("packets are dropped", lambda: dropped(lab) > last)
