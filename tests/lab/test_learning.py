# SPDX-License-Identifier: Apache-2.0
"""A VM that learns its address from a real DHCP server: before its lease, with it, and after it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from scripts.lab import wire
from scripts.lab.wire import Node, Tap
from tests.controller import dhcp
from tests.frames import ICMPV6, OUT, TCP, UDP, Wire, bootp, ipv4, solicitation, tcp, udp
from tests.lab.dhcp_server import dhcp_server
from tests.lab.topology import Lab, eventually
from vgw import abi
from vgw.controller.learning.book import LeaseBook
from vgw.controller.learning.lease import Offer
from vgw.controller.paths import Paths
from vgw.policy.frame import build_frame
from vgw.policy.guards import link_local_address

_marks = itertools.count(1)
pytestmark = [pytest.mark.lab, pytest.mark.bpf]

LEASED, SECONDS = "10.20.0.50", 3600
POLICY = """
schema: vgw/v1
vms:
  web01:
    labels: {role: web}
    interfaces: [{name: tap-web01, mac: "52:54:00:00:00:11", addresses: learn}]
  db01:
    interfaces: [{name: veth-db01, mac: "52:54:00:00:00:12", addresses: [10.20.0.12]}]
groups:
  web: {labels: {role: web}}
policies:
  - name: web-only
    tier: vm
    applies_to: {vms: [db01]}
    ingress: [{name: sql, action: accept, from: [web], services: [tcp/5432]}]
defaults: {ingress: drop, egress: accept}
"""


def leasing(seconds: int = SECONDS) -> str:
    """Return the settings of a DHCP server that leases web01 one address."""
    return f"start {LEASED}\nend {LEASED}\nmin_lease 1\noption lease {seconds}\n"


def take_lease(node: Node, directory: Path) -> None:
    """Have a real client ask for an address, and give it to the node's card."""
    script = directory / "bound.sh"
    script.write_text(
        '#!/bin/sh\n[ "$1" = bound ] || exit 0\nip -4 address flush dev "$interface"\n'
        'ip address add "$ip/24" dev "$interface"\n'
    )
    script.chmod(0o755)
    client = ["busybox", "udhcpc", "-i", "eth0", "-f", "-n", "-q", "-T", "1", "-A", "1", "-t", "10"]
    done = subprocess.run(
        node.command(*client, "-s", str(script)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def at(node: Node, address: str) -> Node:
    """Return a node as it is at another address."""
    return Node(node.lab, node.name, node.mac, address, node.ipv6)


def learned(lab: Lab, vm: str = "web01") -> dict[str, int]:
    """Return the addresses that a VM has learned, with their seconds, as `vgw vms` says."""
    rows = {row["vm"]: row for row in lab.json("vms")["vms"]}
    (interface,) = rows[vm]["interfaces"]
    return {each["address"]: each["seconds"] for each in interface["learned"] or ()}


@dataclass(frozen=True)
class Records:
    """The records of a lab's log since a moment."""

    lab: Lab
    before: int

    def of(self, *events: str) -> list[dict[str, Any]]:
        return [each for each in self.lab.records()[self.before :] if each["event"] in events]


@pytest.fixture
def records(lab: Lab) -> Records:
    return Records(lab, len(lab.records()))


@pytest.fixture
def protected(lab: Lab) -> Iterator[Lab]:
    """A lab in which web01 learns its address; its card has the one before again after a test."""
    node = lab.nodes["web01"]
    ip = ("ip", "-n", node.namespace, "-4")
    routes = subprocess.check_output([*ip, "route"], text=True).splitlines()
    lab.write_policy(POLICY)
    lab.attach("web01", "db01")
    yield lab
    subprocess.run([*ip, "address", "flush", "dev", "eth0"], check=True)
    subprocess.run([*ip, "address", "add", f"{node.ipv4}/24", "dev", "eth0"], check=True)
    for route in routes:
        subprocess.run([*ip, "route", "replace", *route.split()], check=True)


@pytest.fixture
def learning(protected: Lab) -> Iterator[Lab]:
    """That lab under a controller."""
    with protected.controller():
        yield protected


def syn(source: str, target: Node, node: Node, port: int = 5432) -> bytes:
    """Return the frame of a SYN that a node sends another one."""
    fields = {"src": source, "dst": target.ipv4, "proto": "tcp", "sport": 4711, "dport": port}
    mac, to = wire.mac_bytes(node.mac), wire.mac_bytes(target.mac)
    return build_frame({**fields, "flags": "S"}, source_mac=mac, destination_mac=to)


def arrives(frame: bytes, near: Node, far: Node) -> bool:
    """Tell whether a frame arrives: a mark is sent after it, from the link-local address."""
    target = f"fe80::198:{next(_marks):x}"
    mark = Wire(abi.Path.FROM_VM, wire.mac_bytes(near.mac)).wrap6(
        solicitation(target), ICMPV6, local=link_local(near), remote="ff02::1", hop_limit=255
    )
    with Tap(near) as here, Tap(far) as there:
        here.send(frame)
        here.send(mark)
        return frame in there.until(lambda seen: seen == mark)


def link_local(node: Node) -> str:
    return str(link_local_address(wire.mac_bytes(node.mac)))


def test_a_vm_has_the_address_that_it_is_leased_and_no_other(
    learning: Lab, records: Records, tmp_path: Path
) -> None:
    lab, web, db, client = learning, *(learning.nodes[n] for n in ("web01", "db01", "client"))
    assert learned(lab) == {}
    assert lab.json("status", "--vm", "web01")["vms"][0]["interfaces"][0]["guards_off"] == {}
    assert not arrives(syn(LEASED, client, web), web, client), "it has no address yet"

    with dhcp_server(client, tmp_path, leasing()):
        take_lease(web, tmp_path)
    eventually("the lease is known", lambda: LEASED in learned(lab))
    assert SECONDS - 60 < learned(lab)[LEASED] <= SECONDS

    leased = at(web, LEASED)
    assert arrives(syn(LEASED, client, web), web, client)
    assert not arrives(syn("10.20.0.51", client, web), web, client)
    assert not arrives(syn(web.ipv4, client, web), web, client)
    with wire.listen(db, 5432) as server, wire.connect(leased, db.ipv4, 5432, LEASED):
        server.accept()[0].close()  # db01 lets in whoever is of the group, by its new address
    (record,) = records.of("lease")
    assert (record["vm"], record["address"], record["seconds"]) == ("web01", LEASED, SECONDS)

    lab.vgw("detach", "--vm", "web01")
    assert not (lab.directory / "state/leases").exists()


def test_a_lease_ends_by_its_time(learning: Lab, records: Records, tmp_path: Path) -> None:
    lab, web, client = learning, learning.nodes["web01"], learning.nodes["client"]
    with dhcp_server(client, tmp_path, leasing(3)):
        take_lease(web, tmp_path)
    frame = syn(LEASED, client, web)
    eventually("the lease is over", lambda: bool(records.of("lease_end")))

    assert [each["event"] for each in records.of("lease", "lease_end")] == ["lease", "lease_end"]
    assert learned(lab) == {}
    eventually("the address is not the VM's any more", lambda: not arrives(frame, web, client))


def ask(web: Node, client: Node) -> None:
    """Have the VM broadcast a request for any address."""
    packet = ipv4(udp(68, 67, bootp()), UDP, "0.0.0.0", "255.255.255.255")  # noqa: S104
    assert arrives(wire.ethernet(web.mac, wire.BROADCAST, wire.ETH_P_IP, packet), web, client)


def judged(lab: Lab) -> int:
    """Return how many leases were refused by now."""
    rows = {row["vm"]: row for row in lab.json("vms")["vms"]}
    count: int = rows["web01"]["interfaces"][0]["refused"]
    return count


def test_a_forged_lease_teaches_nothing(learning: Lab) -> None:
    lab, web, client = learning, learning.nodes["web01"], learning.nodes["client"]
    good = dhcp.frame4(dhcp.message4(LEASED))
    other = dhcp.frame4(dhcp.message4(LEASED, client=bytes.fromhex("525400000012")))
    offer = dhcp.frame4(dhcp.message4(LEASED, options=dhcp.lease_options(kind=2)))
    assert not arrives(good, client, web), "nobody asked, so it does not even reach the VM"
    with Tap(client) as server:
        ask(web, client)
        for frame in (other, offer):
            server.send(frame)
        eventually("both were judged", lambda: judged(lab) == 2)
        assert learned(lab) == {}

        assert not arrives(good, web, client), "the VM pretends to be its own server"
        server.send(other)
        eventually("what came behind it was judged", lambda: judged(lab) == 3)
        assert learned(lab) == {}

        server.send(good)  # what all of them are compared with
        eventually("the real one teaches", lambda: list(learned(lab)) == [LEASED])


def test_an_address_by_dhcpv6(learning: Lab) -> None:
    lab, web, client = learning, learning.nodes["web01"], learning.nodes["client"]
    mac, leased = wire.mac_bytes(web.mac), "2001:db8:20::50"
    ask6 = OUT.wrap6(udp(546, 547), UDP, local=link_local(web), remote="ff02::1:2")
    call = OUT.wrap6(tcp(), TCP, local=leased, remote=client.ipv6)
    assert arrives(ask6, web, client)
    assert not arrives(call, web, client)
    with Tap(client) as server:
        server.send(dhcp.frame6(to="fe80::1234", mac=mac))
        eventually("what goes to another is refused", lambda: judged(lab) == 1)
        server.send(dhcp.frame6(to=link_local(web), mac=mac))
        eventually("its own teaches", lambda: list(learned(lab)) == [leased])
    assert arrives(call, web, client)


def test_a_rule_that_lets_answers_in_teaches_nothing(lab: Lab) -> None:
    """What passes by a rule was not asked for, however right it is."""
    web, client = lab.nodes["web01"], lab.nodes["client"]
    lab.write_policy(POLICY.replace("ingress: drop", "ingress: accept"))
    lab.attach("web01")
    good = dhcp.frame4(dhcp.message4(LEASED), to=LEASED, mac=wire.mac_bytes(web.mac))
    with lab.controller():
        assert arrives(good, client, web)
        assert arrives(good, client, web), "now it is of an open flow, that somebody else opened"
        ask(web, client)
        other = dhcp.frame4(dhcp.message4(LEASED, client=bytes.fromhex("525400000012")))
        with Tap(client) as server:
            server.send(other)
            eventually("what came behind them was judged", lambda: judged(lab) == 1)
            assert learned(lab) == {}
            server.send(dhcp.frame4(dhcp.message4(LEASED)))  # by another server: housekeeping
            eventually("the real one teaches", lambda: list(learned(lab)) == [LEASED])


def test_a_renewal_renews_and_teaches_nothing_new(lab: Lab) -> None:
    web, client = lab.nodes["web01"], lab.nodes["client"]
    lab.write_policy(POLICY)
    # A lease of long ago: the VM's last broadcast does not count any more.
    server_address = ip_address(client.ipv4)
    held = Offer(ip_address(LEASED), SECONDS, server_address)
    LeaseBook(Paths.from_environment(lab.environment)).take("web01", web.mac, held)
    lab.attach("web01")

    def ack(address: str) -> bytes:
        message = dhcp.message4(address, options=dhcp.lease_options(seconds=2 * SECONDS))
        to = wire.mac_bytes(web.mac)
        return dhcp.frame4(message, to=LEASED, mac=to, source=client.ipv4)

    with lab.controller(), Tap(client) as server:
        assert not arrives(ack(LEASED), client, web), "nobody asked"
        request = ipv4(udp(68, 67, bootp()), UDP, LEASED, client.ipv4)
        renewal = wire.ethernet(web.mac, client.mac, wire.ETH_P_IP, request)
        assert arrives(renewal, web, client)
        server.send(ack("10.20.0.51"))
        server.send(ack(LEASED))
        eventually("it is renewed", lambda: learned(lab).get(LEASED, 0) > SECONDS)
        assert list(learned(lab)) == [LEASED]
        assert judged(lab) == 1


def test_what_is_too_much_or_another_vms_is_refused(learning: Lab, records: Records) -> None:
    lab, web, client = learning, learning.nodes["web01"], learning.nodes["client"]
    ask(web, client)
    with Tap(client) as server:
        server.send(dhcp.frame4(dhcp.message4("10.20.0.12")))
        eventually("db01's address is refused", lambda: judged(lab) == 1)
        for last in range(100, 110):
            server.send(dhcp.frame4(dhcp.message4(f"10.20.0.{last}")))
        eventually("two of ten are too many", lambda: judged(lab) == 3)
    assert len(learned(lab)) == 8
    assert alarms(lab) == {"leases_full"}
    assert lab.metric("vgw_alarm", alarm="leases_full", vm="web01") == 1
    raised = [each["alarm"] for each in records.of("alarm")]
    assert raised == ["lease_conflict", "leases_full"]


def alarms(lab: Lab) -> set[Any]:
    return {each["alarm"] for each in lab.json("status")["alarms"]}


def test_leases_outlive_the_controller(protected: Lab, tmp_path: Path) -> None:
    lab, web, client = protected, protected.nodes["web01"], protected.nodes["client"]
    with lab.controller():
        with dhcp_server(client, tmp_path, leasing()):
            take_lease(web, tmp_path)
        eventually("the lease is known", lambda: LEASED in learned(lab))
        programs = lab.programs()
    lab.apply(POLICY.replace("5432", "5433"))
    assert arrives(syn(LEASED, client, web), web, client), "an apply without it keeps the address"
    with lab.controller():
        assert LEASED in learned(lab)
        assert lab.programs() == programs
        assert arrives(syn(LEASED, client, web), web, client)
