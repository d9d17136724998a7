# SPDX-License-Identifier: Apache-2.0
"""The connections of a VM as they are listed: live ones only, with their rule and their times."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.controller.observe import send_to_vm
from tests.controller.policies import PEER_ADDRESS, VM_ADDRESS, document, from_vm, to_vm
from vgw import abi
from vgw.controller.conntrack import list_flows
from vgw.controller.expiry import is_live
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

RULES = """[
  {name: http, action: accept, services: [tcp/80]},
  {name: ping, action: accept, services: [icmp/echo-request]}]"""
Tap = Callable[[str], int]


@pytest.mark.bpf
def test_flows_are_listed_from_the_vms_side(host: Host, tap: Tap) -> None:
    vm = tap("tap0")
    host.attach(document(RULES), "web01")
    send_to_vm("tap0", to_vm(sport=40001))
    os.write(vm, from_vm(sport=80, dport=40001, flags="SA"))
    os.write(vm, from_vm(proto="udp", sport=5353, dport=53))
    send_to_vm("tap0", to_vm(proto="icmp", icmp_id=7))

    listed = list_flows(host, "web01")

    assert listed["vm"] == "web01"
    flows = {flow["proto"]: flow for flow in listed["flows"]}
    assert set(flows) == {"tcp", "udp", "icmp"}
    tcp = flows["tcp"]
    assert (tcp["local"], tcp["local_port"]) == (VM_ADDRESS, 80)
    assert (tcp["remote"], tcp["remote_port"]) == (PEER_ADDRESS, 40001)
    assert (tcp["direction"], tcp["state"], tcp["generation"]) == ("ingress", "tcp_syn", 1)
    assert (tcp["tier"], tcp["policy"], tcp["rule"]) == ("vm", "base", "http")
    assert tcp["packets"] == {"ingress": 1, "egress": 1}
    assert tcp["bytes"] == {"ingress": len(to_vm()), "egress": len(from_vm())}
    assert 0 <= tcp["age"] < 10
    assert 20 < tcp["expires_in"] <= 30
    assert tcp["icmp_id"] is None
    udp = flows["udp"]
    assert (udp["direction"], udp["state"], udp["rule"]) == ("egress", "udp_single", None)
    icmp = flows["icmp"]
    assert (icmp["icmp_id"], icmp["local_port"], icmp["rule"]) == (7, None, "ping")


@pytest.mark.bpf
def test_flushed_flows_are_not_listed(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    send_to_vm("tap0", to_vm())
    assert len(list_flows(host, "web01")["flows"]) == 1

    host.flush("web01")

    assert list_flows(host, "web01")["flows"] == []


@pytest.mark.bpf
def test_a_vm_that_is_not_attached_has_no_connections(host: Host) -> None:
    with pytest.raises(VgwError, match="VM nobody is not attached"):
        list_flows(host, "nobody")


@pytest.mark.parametrize(
    ("state", "epoch", "idle_ns", "live"),
    [
        (abi.FlowState.TCP_SYN, 4, 30, True),
        (abi.FlowState.TCP_SYN, 4, 31, False),
        (abi.FlowState.TCP_SYN, 3, 0, False),
        (abi.FlowState.DEAD, 4, 0, False),
        (abi.FlowState.UDP_SINGLE, 4, -5, True),  # another CPU has just refreshed it
    ],
)
def test_which_flows_are_live(state: abi.FlowState, epoch: int, idle_ns: int, live: bool) -> None:
    config = abi.EndpointConfig(flow_epoch=4)
    config.timeout_ns[abi.FlowState.TCP_SYN] = 30
    config.timeout_ns[abi.FlowState.UDP_SINGLE] = 30
    flow = abi.Flow(state=state, epoch=epoch, last_seen_ns=1000)

    assert is_live(flow, config, 1000 + idle_ns) is live
