# SPDX-License-Identifier: Apache-2.0
"""Allowed and denied conversations, both directions, behind a TAP and behind a veth."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.lab.topology import Lab, policy

pytestmark = pytest.mark.lab

IN_PORT, OUT_PORT = 8080, 9090
RULES = {
    "ingress": [
        f"{{name: in, action: accept, services: [tcp/{IN_PORT}, udp/{IN_PORT}]}}",
        "{name: ping, action: accept, services: [icmp/echo-request, icmpv6/echo-request]}",
    ],
    "egress": [f"{{name: out, action: accept, services: [tcp/{OUT_PORT}, udp/{OUT_PORT}]}}"],
}
EVERY_VM = pytest.mark.parametrize("vm", ["web01", "db01"])
EVERY_FAMILY = pytest.mark.parametrize("family", [4, 6])


class Case(NamedTuple):
    """A conversation between a VM and the client, and whether RULES allow it."""

    protocol: str
    inbound: bool
    port: int
    allowed: bool

    def ends(self, vm: str) -> tuple[str, str]:
        """Return who begins and who answers."""
        return ("client", vm) if self.inbound else (vm, "client")


CASES = [
    Case("ping", inbound=True, port=0, allowed=True),
    Case("ping", inbound=False, port=0, allowed=False),
    *(
        Case(protocol, inbound, port, allowed=inbound == (port == IN_PORT))
        for protocol in ("tcp", "udp")
        for inbound in (True, False)
        for port in (IN_PORT, OUT_PORT)
    ),
]
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def protected(module_lab: Lab) -> Lab:
    """Both VMs under RULES, everything else denied."""
    module_lab.write_policy(policy(RULES))
    module_lab.attach("web01", "db01")
    return module_lab


@EVERY_VM
@EVERY_FAMILY
@EVERY_CASE
def test_without_vgw_everything_passes(built_lab: Lab, vm: str, family: int, case: Case) -> None:
    """The control: what the next test sees blocked is blocked by vgw and by nothing else."""
    built_lab.assert_reaches(case.protocol, *case.ends(vm), case.port, family)
    with pytest.raises(AssertionError, match="reached"):
        built_lab.assert_blocked(case.protocol, *case.ends(vm), case.port, family)


@EVERY_VM
@EVERY_FAMILY
@EVERY_CASE
def test_policy_decides(protected: Lab, vm: str, family: int, case: Case) -> None:
    check = protected.assert_reaches if case.allowed else protected.assert_blocked
    check(case.protocol, *case.ends(vm), case.port, family)


@EVERY_FAMILY
def test_between_two_vms_both_firewalls_decide(protected: Lab, family: int) -> None:
    # web01 may send to OUT_PORT, but db01 takes nothing there; for IN_PORT it is the other way.
    protected.assert_blocked("tcp", "web01", "db01", OUT_PORT, family)
    protected.assert_blocked("tcp", "db01", "web01", IN_PORT, family)


def test_both_interfaces_get_tc(protected: Lab) -> None:
    interfaces = [i for vm in protected.json("status")["vms"] for i in vm["interfaces"]]
    assert {i["name"]: i["from_vm"]["hook"] for i in interfaces} == {
        "tap-web01": "tc",
        "veth-db01": "tc",
    }
    assert all(i["attached"] and i["to_vm"]["hook"] == "tc" for i in interfaces)
