# SPDX-License-Identifier: Apache-2.0
"""The thread that meets floods: what goes wrong with one VM, and what happens beside it."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.flood import Flood, Flooder, Step, tap_target
from tests.frames import OUT, UDP, udp
from tests.lab.devices import Devices, document, xdp
from tests.lab.topology import eventually
from vgw import libbpf
from vgw.controller import shield
from vgw.controller.changes import Changes
from vgw.controller.events import LogWriter
from vgw.controller.flood_watch import FloodWatch
from vgw.controller.links import shield_pin
from vgw.controller.metrics import ApplyTimes
from vgw.errors import VgwError
from vgw.policy.model import Hook
from vgw.policy.parse import parse_sources

pytestmark = [pytest.mark.lab, pytest.mark.bpf]

NO_23 = "[{name: telnet, action: drop, services: [udp/23]}]"
POLICY = f"""
schema: vgw/v1
vms: {{%s}}
policies: [{{name: out, tier: vm, applies_to: {{all: true}}, egress: {NO_23}}}]
defaults: {{ingress: drop, egress: accept}}
"""
DENIED = OUT.wrap4(udp(4000, 23), UDP)
#: A flood lasts so long at most, and a shield is up by then although it had to be compiled.
LONG = 60.0


# --- what gets no shield --------------------------------------------------------------------------


def test_an_endpoint_made_anew_does_not_get_the_shield_of_the_one_before(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23))
    before = devices.identity()
    devices.host.detach("web01")
    devices.protect(document(egress=NO_23))
    with pytest.raises(VgwError, match="attached anew"):
        devices.host.raise_shield(before, "web01", "tap0")
    assert xdp() is None


def test_nor_does_one_that_asks_for_tc(devices: Devices) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23), hook=Hook.TC)
    with pytest.raises(VgwError, match="rules out a shield"):
        devices.raise_shield()
    assert xdp() is None


def test_nor_a_veth(devices: Devices) -> None:
    devices.veth("tap0")
    devices.protect(document(egress=NO_23))
    with pytest.raises(VgwError, match="rules out a shield"):
        devices.raise_shield()
    assert xdp() is None


def test_nor_one_whose_programs_are_of_other_sources_than_there_are_now(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23))
    monkeypatch.setattr(shield, "packet_build", lambda: "0123456789ab")
    with pytest.raises(VgwError, match="another build"):
        devices.raise_shield()
    assert xdp() is None
    assert not shield_pin(devices.paths.endpoint_dir("web01", "tap0")).exists()


# --- beside a change ------------------------------------------------------------------------------


def test_a_change_waits_until_a_shield_that_is_being_lowered_is_off(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23))
    devices.raise_shield()
    (known,) = devices.host.shields.up()
    begun, changed = threading.Event(), threading.Event()
    detach = libbpf.link_detach

    def slow(link: int) -> None:
        begun.set()
        assert not changed.wait(1.0), "the change was made while the shield was still there"
        detach(link)

    monkeypatch.setattr(libbpf, "link_detach", slow)
    lowering = threading.Thread(target=devices.host.shields.lower, args=(known,))
    lowering.start()
    begun.wait()
    devices.host.attach(document(egress=NO_23), "web01", hook=Hook.XDP)
    changed.set()
    lowering.join()
    assert devices.host.shields.up() == set()


# --- where something goes wrong -------------------------------------------------------------------


@pytest.fixture
def changes(devices: Devices) -> Iterator[Changes]:
    devices.paths.policy.write_text("schema: vgw/v1\n")
    log = LogWriter(devices.paths.log_file)
    yield Changes(devices.host, log, ApplyTimes())
    log.close()


@contextmanager
def watching(changes: Changes) -> Iterator[FloodWatch]:
    watch = FloodWatch(changes, changes.host.shields)
    watch.start()
    yield watch
    watch.stop()


@contextmanager
def flooding(devices: Devices, flooder: Flooder, *names: str) -> Iterator[None]:
    """Protect VMs with the names of their interfaces, and let all of them flood for a block."""
    vms = ", ".join(f"vm-{name}: {{interfaces: [{{name: {name}}}]}}" for name in names)
    queues = [devices.queue(name, blocking=True) for name in names]
    devices.host.attach_many(parse_sources([("policy.yaml", POLICY % vms)]))
    steps = [Step(tap_target(queue.fd), "neither", DENIED) for queue in queues]
    with flooder.running(Flood(steps, 10**12, LONG)):
        yield


class Told:
    """Tells a watch of floods, again and again as the programs do."""

    def __init__(self, watch: FloodWatch, devices: Devices, *names: str) -> None:
        self._watch = watch
        self._floods = [(devices.identity(f"vm-{each}"), f"vm-{each}", each) for each in names]

    def __call__(self) -> bool:
        for flood in self._floods:
            self._watch.heard(*flood)
        return True


def test_an_endpoint_that_fails_leaves_the_floods_of_others_to_be_met(
    devices: Devices,
    flooder: Flooder,
    changes: Changes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raise_shield = devices.host.raise_shield

    def failing(known: int, vm: str, interface: str) -> None:
        if interface == "tap0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise_shield(known, vm, interface)

    monkeypatch.setattr(devices.host, "raise_shield", failing)
    with flooding(devices, flooder, "tap0", "tap1"), watching(changes) as watch:
        told = Told(watch, devices, "tap0", "tap1")
        eventually("the other one has a shield", lambda: told() and xdp("tap1") is not None, LONG)
        eventually("it is said", lambda: told() and "No space left" in caplog.text, LONG)
    assert "vm-tap0 tap0 floods, and is met at tc alone" in caplog.text
    assert xdp("tap1") is None, "the watch has ended"


def test_what_goes_wrong_once_a_shield_is_up_takes_it_off(
    devices: Devices,
    flooder: Flooder,
    changes: Changes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[bool] = []

    def failing(record: dict[str, Any]) -> None:
        seen.append(xdp() is not None)
        raise ValueError(record["event"])

    monkeypatch.setattr(changes.log, "add", failing)
    with (
        caplog.at_level(logging.ERROR),
        flooding(devices, flooder, "tap0"),
        watching(changes) as watch,
    ):
        told = Told(watch, devices, "tap0")
        eventually("it is said", lambda: told() and "shield_raised" in caplog.text, LONG)
        eventually("it has no shield", lambda: not devices.host.shields.up(), LONG)
        assert xdp() is None
    assert seen == [True, False]


def test_a_shield_that_fails_as_it_comes_up_leaves_nothing(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.queue("tap0")
    devices.protect(document(egress=NO_23))
    with monkeypatch.context() as patched:
        patched.setattr(shield.Shields, "_up", property(lambda _: frozenset()), raising=False)
        with pytest.raises(AttributeError):
            devices.raise_shield()
    assert xdp() is None
    assert not shield_pin(devices.paths.endpoint_dir("web01", "tap0")).exists()
    devices.raise_shield()
    assert xdp() is not None
    devices.host.shields.close()
