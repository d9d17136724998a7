# SPDX-License-Identifier: Apache-2.0
"""What a host runs out of, and what it must not: memory for maps, room in counters, leftovers."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from bench import leftovers
from bench.accounts import read_account
from bench.leftovers import WARM_UP, Cycles
from tests.controller import policies
from tests.controller.observe import received, row, send_to_vm, traces
from vgw import abi, libbpf
from vgw.abi import Path as PacketPath
from vgw.abi import Reason, Verdict
from vgw.controller.conntrack import list_flows
from vgw.controller.metrics import ApplyTimes, HostCollector
from vgw.controller.paths import Paths
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.controller.rule_readings import RuleReadings
from vgw.errors import PartlyAppliedError
from vgw.libbpf.library import failure
from vgw.loader import clone

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
#: A table so large tells which VM a map is for.
#: How often an interface comes and goes.
CYCLES = 40
LARGE = 131072
VMS = {
    "one": "{interfaces: [{name: tap0}]}",
    "two": f"{{interfaces: [{{name: tap1, conntrack_max: {LARGE}}}]}}",
    "three": "{interfaces: [{name: tap2}]}",
}


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_of", ["conntrack", "expiry_queue"])
def test_catalogue_L12_a_vm_without_memory_is_not_attached_and_others_are(
    host: Host, paths: Paths, tap: Tap, monkeypatch: pytest.MonkeyPatch, short_of: str
) -> None:
    ends = [tap(name) for name in ("tap0", "tap1", "tap2")]
    original = libbpf.map_create
    sizes = {"conntrack": LARGE, "expiry_queue": abi.queue_batches(LARGE)}

    def map_create(*arguments: Any, **options: Any) -> int:
        if sizes[short_of] in {*arguments, *options.values()}:
            raise failure(f"create the map {short_of}", errno.ENOMEM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(clone, "map_create", map_create)
        with pytest.raises(PartlyAppliedError) as caught:
            host.attach_many(policies.document(vms=VMS))

    assert set(caught.value.failures) == {"two"}
    assert "Cannot allocate memory" in str(caught.value.failures["two"])
    assert host.attached() == ["one", "three"]
    assert not [trace for trace in traces(paths) if "two" in trace]
    index = socket.if_nametoindex("tap1")
    assert libbpf.xdp_program(index) is None
    assert not libbpf.tcx_programs(index, libbpf.AttachType.TCX_EGRESS)
    for name, end in (("tap0", ends[0]), ("tap2", ends[2])):
        assert is_judged(name, end)
    assert not is_judged("tap1", ends[1])

    host.attach_many(policies.document(vms=VMS))
    assert host.attached() == ["one", "three", "two"]
    assert is_judged("tap1", ends[1])


def is_judged(name: str, end: int) -> bool:
    """Tell whether a packet that the policy drops is dropped, and one that it accepts is not."""
    dropped, accepted = policies.to_vm(dport=22), policies.to_vm(dport=80)
    send_to_vm(name, dropped)
    passed = received(end, dropped)
    send_to_vm(name, accepted)
    assert received(end, accepted)
    return not passed


# --- leftovers ------------------------------------------------------------------------------------


def test_catalogue_L13_nothing_is_left_of_interfaces_that_were(host: Host) -> None:
    cycles = Cycles(host, policies.document())
    cycles.run(WARM_UP)
    before = cycles.traces()
    cycles.run(CYCLES)
    after = cycles.traces()

    assert (after.programs, after.maps, after.pins, after.files) == (0, 0, 0, 0)
    assert after.descriptors == before.descriptors
    # Fewer than one for each cycle: none stays for each.
    assert after.objects < before.objects + CYCLES


def test_catalogue_L13_what_is_left_is_noticed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an endpoint that nobody removes."""
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.1)
    cycles = Cycles(host, policies.document())
    monkeypatch.setattr(host, "detach_all", list)
    cycles.run(1)
    left = cycles.traces()

    assert left.programs == 2
    assert min(left.maps, left.pins) > 10
    assert left.files > 0


# --- counters -------------------------------------------------------------------------------------


def metrics(host: Host) -> dict[str, float]:
    """Return what a scrape shows, by name and verdict or direction."""
    collector = HostCollector(
        lambda: read_endpoints(host, RuleReadings(host.paths)), dict, ApplyTimes(), rules=True
    )
    return {
        f"{sample.name} {' '.join(sorted(sample.labels.values()))}": sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def put_counter(host: Host, reason: Reason, values: list[int]) -> None:
    """Set the packets and bytes that each CPU counted of what is accepted for the VM."""
    (endpoint,) = host.open_endpoints("web01")
    index = next(
        n
        for n in range(libbpf.map_info(endpoint.fds["stats"]).max_entries)
        if abi.stats_labels(n) == (PacketPath.TO_VM, Verdict.ACCEPT, reason)
    )
    with endpoint:
        numbers = [value for value in values for _ in range(2)]
        data = struct.pack(f"={len(numbers)}Q", *numbers)
        libbpf.map_update(endpoint.fds["stats"], struct.pack("=I", index), data)


@pytest.mark.parametrize("count", [(1 << 32) - 1, (1 << 53) - 1])
def test_catalogue_L17_counters_go_on_beyond_32_bits(host: Host, tap: Tap, count: int) -> None:
    tap("tap0")
    host.attach(policies.document(), "web01")
    cpus = libbpf.possible_cpus()
    put_counter(host, Reason.RULE, [count] + [0] * (cpus - 1))
    send_to_vm("tap0", policies.to_vm())

    shown = metrics(host)
    assert shown["vgw_packets_total accept ingress tap0 web01"] >= count + 1
    assert shown["vgw_bytes_total accept ingress tap0 web01"] >= count + len(policies.to_vm())


def test_catalogue_L17_sums_over_cpus_do_not_wrap(host: Host, tap: Tap) -> None:
    """What is exported is never less than before, though each CPU is at its end.

    A single CPU's counter of 64 bits does wrap, after 584 years of a packet each nanosecond.
    """
    tap("tap0")
    host.attach(policies.document(), "web01")
    cpus, most = libbpf.possible_cpus(), (1 << 64) - 1
    put_counter(host, Reason.RULE, [most] * cpus)

    shown = read_account(host, "web01")
    assert shown.packets[PacketPath.TO_VM, Verdict.ACCEPT, Reason.RULE] == cpus * most
    # The host sends something by itself now and then, which counts as accepted too.
    assert metrics(host)["vgw_packets_total accept ingress tap0 web01"] >= cpus * most


def test_catalogue_L17_flows_and_new_connections_go_on_beyond_32_bits(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(policies.document(), "web01")
    send_to_vm("tap0", policies.to_vm(sport=4000))
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        ((key, flow),) = endpoint.maps.flows()
        flow.packets[PacketPath.FROM_VM] = flow.bytes[PacketPath.FROM_VM] = (1 << 32) - 1
        libbpf.map_update(endpoint.fds["conntrack"], bytes(key), bytes(flow))
        meta = endpoint.maps.meta()
        meta.created[PacketPath.TO_VM] = (1 << 32) - 1
        libbpf.map_update(endpoint.fds["conntrack_meta"], bytes(4), bytes(meta))
    os.write(vm, policies.from_vm(sport=80, dport=4000, flags="SA"))
    send_to_vm("tap0", policies.to_vm(sport=4001))

    flows = {each["remote_port"]: each for each in list_flows(host, "web01")["flows"]}
    assert flows[4000]["packets"]["egress"] == 1 << 32
    assert flows[4000]["bytes"]["egress"] > 1 << 32
    assert metrics(host)["vgw_new_connections_total ingress tap0 web01"] == 1 << 32
    assert row(host)["conntrack"]["entries"] == 2


def test_catalogue_L17_every_counter_has_64_bits() -> None:
    for structure in (abi.PacketCounter, abi.RuleCounter, abi.EventMeter, abi.ConntrackMeta):
        for name, kind, *_ in structure._fields_:
            element = getattr(kind, "_type_", kind) if hasattr(kind, "_length_") else kind
            assert ctypes.sizeof(element) == 8, f"{structure.__name__}.{name}"
