# SPDX-License-Identifier: Apache-2.0
"""Flows that come and go faster than a VM opens them, where the VM is a TAP that the test holds.

What is written to a TAP or sent out of it has been judged when the call returns, so every account
here is exact.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Callable

import pytest

from bench.accounts import half_open_flows, read_account
from bench.expiry_race import LIMITS, Ends, run_race
from bench.flood import Flood, Flooder, Side, outcome, packet_target, syn, tap_target
from tests.controller import policies
from vgw import abi, libbpf
from vgw.abi import Path, Reason, Verdict
from vgw.controller.reconcile import Host

pytestmark = pytest.mark.bpf

CLIENT = Side(policies.PEER_MAC, "10.50.0.0", 1)
VM = Side(policies.VM_MAC, policies.VM_ADDRESS, 80)
OPEN = "{ingress: accept, egress: accept}"
Tap = Callable[[str], int]


def ends(vm: int) -> Ends:
    """Return the two sides of connections to the VM on tap0, whose end of it is `vm`."""
    return Ends(packet_target("tap0"), tap_target(vm), CLIENT, VM)


def attach_open(host: Host) -> None:
    """Protect web01 on tap0 so that everything honest passes, in a large table."""
    vm = policies.interface("tap0", ", conntrack_max: 131072", vm=f"{LIMITS.key()},")
    host.attach(policies.document("[]", vms={"web01": vm}, defaults=OPEN), "web01")


def test_catalogue_L6_expiry_cuts_no_live_flow(host: Host, tap: Tap, flooder: Flooder) -> None:
    vm = tap("tap0")
    attach_open(host)

    race = run_race(flooder, host, "web01", ends(vm), live=300, connections=200_000, limit=120)

    assert race.cut == []
    assert race.opened > 150_000
    assert race.exchanges >= 3


def test_catalogue_L6_a_flow_that_is_cut_is_noticed(
    host: Host, tap: Tap, flooder: Flooder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: an expiry that deletes one flow too many."""
    vm = tap("tap0")
    attach_open(host)
    expire = host.expire

    def expire_too_much(name: str | None = None) -> int:
        (endpoint,) = host.open_endpoints("web01")
        with endpoint:
            live = (key for key, _ in endpoint.maps.flows() if abi.be16(key.local_port) == 443)
            libbpf.map_delete(endpoint.fds["conntrack"], bytes(next(live)))
        monkeypatch.setattr(host, "expire", expire)
        return expire(name)

    monkeypatch.setattr(host, "expire", expire_too_much)
    race = run_race(flooder, host, "web01", ends(vm), live=50, connections=2_000, limit=60)

    assert len(race.cut) == 1


def test_catalogue_G22_two_cpus_open_one_flow(host: Host, tap: Tap, flooder: Flooder) -> None:
    """The same SYNs from two CPUs at once: whoever is behind finds flows and so catches up."""
    tap("tap0")
    attach_open(host)
    flows = 60_000
    flood = Flood(syn(packet_target("tap0"), CLIENT, VM, "source"), flows, 60)
    before = read_account(host, "web01")
    with contextlib.ExitStack() as stack:
        cpus = sorted(os.sched_getaffinity(0))[:2]
        running = [stack.enter_context(flooder.running(flood, cpu)) for cpu in cpus]
        sent = sum(outcome(process).sent for process in running)

    after = read_account(host, "web01")
    accepted = after.by_reason(before, Verdict.ACCEPT)
    opened = flows_in_table(host)
    half_open = {Path.TO_VM: flows, Path.FROM_VM: 0}
    assert sent == 2 * flows
    assert accepted[Reason.DEFAULT] + accepted[Reason.CT_ESTABLISHED] == sent
    assert after.entries == len(opened) == flows
    assert after.half_open == half_open_flows(host, "web01") == half_open
    assert set(queued(host)) == opened
    assert set(queued(host).values()) == {1}


def test_catalogue_G22_a_flow_of_two_cpus_counts_once(
    host: Host, tap: Tap, flooder: Flooder
) -> None:
    """Limits and metrics go by what was counted as opened."""
    tap("tap0")
    attach_open(host)
    flood = Flood(syn(packet_target("tap0"), CLIENT, VM, "source"), 60_000, 60)
    before = read_account(host, "web01")
    with contextlib.ExitStack() as stack:
        cpus = sorted(os.sched_getaffinity(0))[:2]
        for process in [stack.enter_context(flooder.running(flood, cpu)) for cpu in cpus]:
            outcome(process)

    assert read_account(host, "web01").opened(before) == 60_000


def flows_in_table(host: Host) -> set[bytes]:
    """Return the keys of web01's flows."""
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        return {bytes(key) for key, _ in endpoint.maps.flows()}


def queued(host: Host) -> Counter[bytes]:
    """Return how often each key is in web01's expiry queue or in a CPU's buffer."""
    (endpoint,) = host.open_endpoints("web01")
    found: Counter[bytes] = Counter()
    cpus, stride = libbpf.possible_cpus(), ctypes.sizeof(abi.QueueBuffer)
    with endpoint:
        size = ctypes.sizeof(abi.QueueBatch)
        for _, value in libbpf.map_entries(endpoint.fds["expiry_queue"], 8, size):
            found.update(bytes(key) for key in abi.QueueBatch.from_buffer_copy(value).keys)
        buffers = libbpf.map_lookup(endpoint.fds["expiry_buffer"], bytes(4), stride * cpus)
    assert buffers is not None
    for cpu in range(cpus):
        buffer = abi.QueueBuffer.from_buffer_copy(buffers, cpu * stride)
        found.update(bytes(buffer.batch.keys[n]) for n in range(buffer.count))
    return found
