# SPDX-License-Identifier: Apache-2.0
"""What keeps a network going - ARP, neighbour discovery, DHCP - under a policy that denies all."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts.lab import wire
from scripts.lab.wire import Node, Tap
from tests.lab.dhcp_server import dhcp_server
from tests.lab.topology import Lab, policy, send_first

pytestmark = pytest.mark.lab

#: What a DHCP server leases: web01 its own address.
WEB01 = "start 10.20.0.50\nend 10.20.0.60\nstatic_lease 52:54:00:00:00:11 10.20.0.11\n"
EVERY_VM = pytest.mark.parametrize("vm", ["web01", "db01"])


def neighbour_state(node: Node, address: str) -> str:
    """Return what a node knows of a neighbour: REACHABLE, FAILED, ... or ABSENT."""
    command = ["ip", "-n", node.namespace, "-json", "neigh", "show", "to", address]
    entries = json.loads(subprocess.check_output(command) or b"[]")
    return str(entries[0]["state"][0]) if entries else "ABSENT"


def ask_anew(node: Node, address: str) -> None:
    """Make a node forget a neighbour and send it something, so that it has to ask again."""
    subprocess.run(["ip", "-n", node.namespace, "neigh", "flush", "to", address], check=True)
    assert neighbour_state(node, address) == "ABSENT"
    send_first("udp", node, address, 9).close()


@EVERY_VM
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("inbound", [True, False])
def test_neighbours_are_found(lab: Lab, vm: str, family: int, inbound: bool) -> None:
    lab.write_policy(policy())
    lab.attach(vm)
    asker, asked = lab.nodes["client"], lab.nodes[vm]
    if not inbound:
        asker, asked = asked, asker
    address = asked.address(family)
    with Tap(asker) as card:
        ask_anew(asker, address)
        # The answer, ARP reply or neighbour advertisement, is the first that comes from there.
        source = wire.mac_bytes(asked.mac)
        card.until(lambda frame: frame[6:12] == source)
    assert neighbour_state(asker, address) in {"REACHABLE", "DELAY", "STALE"}


@EVERY_VM
def test_nobody_is_found_in_quarantine(lab: Lab, vm: str) -> None:
    """The control: the test before would notice if the answer did not come."""
    lab.write_policy(policy())
    lab.attach(vm)
    lab.vgw("mode", "--vm", vm, "quarantine")
    client, far = lab.nodes["client"], lab.nodes[vm]
    with Tap(client) as card:
        ask_anew(client, far.ipv4)
        question = card.until(lambda frame: frame[12:14] == b"\x08\x06", outgoing=True)[-1]
        assert question[38:42] == bytes(map(int, far.ipv4.split(".")))
    assert neighbour_state(client, far.ipv4) == "INCOMPLETE"
    lab.vgw("mode", "--vm", vm, "enforce")


def test_a_forged_arp_answer_is_stopped(lab: Lab) -> None:
    web01, client = lab.nodes["web01"], lab.nodes["client"]
    forged = wire.arp_request(web01.mac, "10.20.0.1", client.ipv4)
    with Tap(web01) as near, Tap(client) as far:
        near.send(forged)
        assert wire.arrivals(near, far, lambda frame: frame == forged) == [forged]
        lab.write_policy(policy())
        lab.attach("web01")
        near.send(forged)
        assert wire.arrivals(near, far, lambda frame: frame == forged) == []


def lease(node: Node, directory: Path, attempts: int) -> str | None:
    """Ask for an address by DHCP; returns it, None when nobody offers one."""
    script, result = directory / "bound.sh", directory / "bound"
    script.write_text(f'#!/bin/sh\n[ "$1" = bound ] && echo "$ip" >"{result}"\nexit 0\n')
    script.chmod(0o755)
    result.unlink(missing_ok=True)
    client = ["busybox", "udhcpc", "-i", "eth0", "-f", "-n", "-q", "-T", "1", "-A", "1"]
    command = node.command(*client, "-t", str(attempts), "-s", str(script))
    subprocess.run(command, capture_output=True, check=False)
    return result.read_text().strip() if result.exists() else None


def test_a_dhcp_client_gets_its_lease(lab: Lab, tmp_path: Path) -> None:
    lab.write_policy(policy())
    lab.attach("web01")
    with dhcp_server(lab.nodes["client"], tmp_path, WEB01):
        assert lease(lab.nodes["web01"], tmp_path, attempts=10) == "10.20.0.11"


def test_a_vm_is_no_dhcp_server(lab: Lab, tmp_path: Path) -> None:
    with dhcp_server(lab.nodes["db01"], tmp_path, WEB01):
        assert lease(lab.nodes["web01"], tmp_path, attempts=10) == "10.20.0.11"
        lab.write_policy(policy(default="accept"))
        lab.attach("db01")
        assert lease(lab.nodes["web01"], tmp_path, attempts=2) is None
