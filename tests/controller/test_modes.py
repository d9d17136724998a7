# SPDX-License-Identifier: Apache-2.0
"""Modes that are ordered: what they do to real packets, why they are, and what they survive."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.controller.observe import passes
from tests.controller.policies import VM_MAC, from_vm, to_vm
from tests.controller.process import Controller
from tests.controller.test_safe_change import Bench, text
from vgw.abi import Mode, Verdict
from vgw.controller.manifest import load_manifest, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.policy.frame import build_frame

pytestmark = pytest.mark.bpf


@pytest.fixture
def bench(host: Host, paths: Paths, tap: Callable[[str], int]) -> Bench:
    bench = Bench(host, paths, tap("tap0"))
    bench.attach(text(80))
    return bench


def order(host: Host) -> dict[str, object] | None:
    found: dict[str, object] | None = host.status("web01")["vms"][0]["mode_order"]
    return found


def verdicts(bench: Bench) -> dict[Verdict, int]:
    """Return how many packets of the VM had each verdict, whatever their direction."""
    (endpoint,) = bench.host.open_endpoints("web01")
    found: dict[Verdict, int] = {}
    with endpoint:
        for (_, verdict, _), counter in endpoint.maps.stats().items():
            found[Verdict(verdict)] = found.get(Verdict(verdict), 0) + counter.packets
    return found


def passes_from_vm(bench: Bench, frame: bytes) -> bool:
    """Tell whether what the VM sends is accepted, as the counters say."""
    before = verdicts(bench)
    os.write(bench.vm, frame)
    after = verdicts(bench)
    return after.get(Verdict.ACCEPT, 0) > before.get(Verdict.ACCEPT, 0)


def spoofed() -> bytes:
    mac = bytes.fromhex(VM_MAC.replace(":", ""))
    fields = {"src": "10.9.9.9", "dst": "192.0.2.7", "proto": "tcp", "dport": 443}
    return build_frame(fields, source_mac=mac, destination_mac=bytes(6))


def test_monitor_drops_nothing_guards_included(bench: Bench) -> None:
    assert not bench.lets_in(443)
    assert not passes_from_vm(bench, spoofed())
    bench.host.set_mode("web01", Mode.MONITOR, "trying", "root")

    before = verdicts(bench)
    assert bench.lets_in(443)
    os.write(bench.vm, spoofed())
    os.write(bench.vm, from_vm()[:40])
    after = verdicts(bench)

    dropped = {Verdict.DROP, Verdict.REJECT}
    assert {each: after.get(each, 0) for each in dropped} == {
        each: before.get(each, 0) for each in dropped
    }
    assert after[Verdict.WOULD_DROP] >= before.get(Verdict.WOULD_DROP, 0) + 3
    bench.host.set_mode("web01", None)
    assert not bench.lets_in(443)


def test_quarantine_drops_everything_open_flows_too(bench: Bench) -> None:
    query = from_vm(proto="udp", sport=5000, dport=53)
    answer = to_vm(proto="udp", sport=53, dport=5000)

    def is_open() -> bool:
        return passes(bench.vm, answer)

    assert not is_open()
    assert passes_from_vm(bench, query)
    assert is_open()

    bench.host.set_mode("web01", Mode.QUARANTINE, "sends spam", "root")

    assert not is_open()
    assert not passes_from_vm(bench, query)
    assert not bench.lets_in(80)
    bench.host.set_mode("web01", None)
    assert is_open()
    assert bench.lets_in(80)


def test_an_order_has_a_reason_and_a_time_and_somebody(bench: Bench) -> None:
    assert order(bench.host) is None
    assert bench.host.set_mode("web01", Mode.QUARANTINE, "ticket 12\n\x1b[31m", "root (alice)")
    found = order(bench.host)
    assert found is not None
    assert (found["mode"], found["by"]) == ("quarantine", "root (alice)")
    assert found["reason"] == "ticket 12\\n\\x1b[31m"
    assert str(found["since"]).endswith("Z")

    assert not bench.host.set_mode("web01", Mode.QUARANTINE, "ticket 12\n\x1b[31m", "bob")
    assert order(bench.host) == found, "it is as old as it was"
    assert bench.host.set_mode("web01", Mode.QUARANTINE, "x" * 1000, "bob")
    found = order(bench.host)
    assert found is not None
    assert len(str(found["reason"])) == 200


def test_an_order_survives_apply_attach_and_the_interface(
    bench: Bench, tap: Callable[[str], int]
) -> None:
    bench.host.set_mode("web01", Mode.QUARANTINE, "spam", "root")
    found = order(bench.host)
    bench.apply(text(443))
    bench.attach(text(22))
    assert order(bench.host) == found
    subprocess.run(["ip", "link", "delete", "tap0"], check=True)
    bench.host.sweep()
    bench.vm = tap("tap0")
    bench.attach(text(80))
    assert order(bench.host) == found
    assert not bench.lets_in(80)
    bench.host.detach("web01")
    bench.attach(text(80))
    assert order(bench.host) is None


def test_catalogue_M6_an_order_is_in_force_where_what_it_replaced_cannot_be_freed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise VgwError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(EndpointMaps, "release", fail)
        assert bench.host.set_mode("web01", Mode.QUARANTINE)
    assert not bench.lets_in(80)
    bench.apply(text(443))
    assert bench.host.status("web01")["vms"][0]["mode"] == "quarantine"
    (endpoint,) = bench.host.open_endpoints("web01")
    with endpoint:
        assert not endpoint.maps.spare_is_used(), "the next change has freed it"


def test_with_a_reason_it_stays_even_if_the_policy_says_the_same(bench: Bench) -> None:
    quarantined = text(80).replace("interfaces:", "mode: quarantine, interfaces:")
    bench.apply(quarantined)
    bench.host.set_mode("web01", Mode.QUARANTINE, "spam", "root")
    bench.apply(text(80))
    assert not bench.lets_in(80)
    bench.host.set_mode("web01", Mode.ENFORCE)
    assert order(bench.host) is None
    assert bench.lets_in(80)


def test_an_order_survives_the_controller(bench: Bench, paths: Paths) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    paths.policy.write_text(text(80))
    controller = Controller(paths, 0)
    try:
        answer = controller.client.set_mode("web01", "quarantine", "spam")
        assert answer == {"vm": "web01", "mode": "quarantine"}
        found = order(bench.host)
        assert found is not None
        (record,) = controller.records("mode")
        assert (record["mode"], record["message"], record["user"]) == (
            *("quarantine", "spam"),
            found["by"],
        )
        controller.end(signal.SIGKILL)
        controller = Controller(paths, 0)
        assert order(bench.host) == found
        assert not bench.lets_in(80)
        assert controller.client.set_mode("web01", None)["mode"] == "enforce"
        assert order(bench.host) is None
        with pytest.raises(VgwError, match="has no mode"):
            controller.client.call("mode", vm="web01")
    finally:
        if controller.process.poll() is None:
            controller.end(signal.SIGKILL)


def test_a_manifest_of_an_earlier_version_has_an_order_without_a_note(bench: Bench) -> None:
    bench.host.set_mode("web01", Mode.MONITOR)
    file = bench.paths.manifest("web01")
    manifest = load_manifest(file)
    assert manifest is not None
    save_manifest(file, dataclasses.replace(manifest, mode_note=None))
    found = order(bench.host)
    assert found == {"mode": "monitor", "reason": None, "since": None, "by": None}


def test_to_release_needs_to_know_what_the_policy_says(bench: Bench) -> None:
    bench.host.set_mode("web01", Mode.QUARANTINE, "spam", "root")
    bench.paths.manifest("web01").unlink()
    with pytest.raises(VgwError, match="lost or damaged"):
        bench.host.set_mode("web01", None)
    assert not bench.lets_in(80)
    bench.attach(text(80))
    assert not bench.lets_in(80), "what the kernel does counts as ordered"
