# SPDX-License-Identifier: Apache-2.0
"""Whoever sends what a policy rejects learns of it at once: real sockets, on every way there is.

Each way is gone with checksums left to cards and with checksums that the kernel fills in on the way
and the receiver verifies, with the VM's card as plain as a TAP can be and as a virtio card.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from scripts.lab import wire
from scripts.lab.wire import PATIENCE, Node
from tests.lab.conftest import remove_policy, unprotect
from tests.lab.topology import (
    Lab,
    policy,
    remove_leftovers,
    run_script,
)

pytestmark = pytest.mark.lab

PORT = 4100
PREFIX = "vgw-r"
REJECT_ALL = {
    "ingress": ["{name: nothing-in, action: reject, services: [any]}"],
    "egress": ["{name: nothing-out, action: reject, services: [any]}"],
}
DROP_ALL = {way: [text.replace("reject", "drop") for text in REJECT_ALL[way]] for way in REJECT_ALL}
#: What one VM may send and the other rejects.
REJECT_INGRESS = {
    "ingress": REJECT_ALL["ingress"],
    "egress": ["{name: everything-out, action: accept, services: [any]}"],
}
#: What a connected UDP socket says of "administratively prohibited".
UDP_ERRORS = {4: errno.EHOSTUNREACH, 6: errno.EACCES}
PING_TEXTS = {4: "Packet filtered", 6: "Administratively prohibited"}
#: VM -> its interface, and the hooks on which the packets that it sends can be judged.
HOOKS = {"web01": ("tap-web01", ("xdp", "tc")), "db01": ("veth-db01", ("tc",))}
SETUPS = [(vm, hook) for vm, (_, hooks) in HOOKS.items() for hook in hooks]
FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp", "ping"])


@pytest.fixture(scope="module", params=["plain", "virtio"])
def cards(built_lab: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Labs in which web01's card leaves no checksum out, and in which it does."""
    if request.param == "plain":
        yield built_lab
        return
    remove_leftovers(PREFIX)
    name = f"{PREFIX}{os.getpid()}"
    run_script(name, "up", offload=True)
    try:
        lab = Lab(name)
        remove_policy(lab)
        yield lab
    finally:
        run_script(name, "down")


@pytest.fixture(scope="module", params=[True, False], ids=["left-out", "filled-in"])
def checksums(cards: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab whose host leaves checksums to the receivers, or fills them in on the way out."""
    interfaces = ("tap-web01", "veth-db01", "veth-client")
    for name in interfaces:
        wire.leave_checksums(cards.host, name, to_card=request.param)
    yield cards
    for name in interfaces:
        wire.leave_checksums(cards.host, name, to_card=True)


@pytest.fixture(scope="module", params=SETUPS, ids="-".join)
def rejecting(checksums: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    """One VM on one hook under REJECT_ALL."""
    vm, hook = request.param
    checksums.write_policy(policy(REJECT_ALL))
    checksums.vgw("attach", "--vm", vm, "--hook", hook)
    yield checksums, vm
    unprotect(checksums)


def assert_refused(near: Node, far: Node, protocol: str, family: int) -> None:
    """Assert that `near` is told that it may not talk to `far`."""
    address = far.address(family)
    if protocol == "tcp":
        with pytest.raises(ConnectionRefusedError):
            wire.connect(near, address, PORT).close()
    elif protocol == "udp":
        with wire.client(near, socket.SOCK_DGRAM, address) as sock:
            sock.connect((address, PORT))
            sock.send(b"question")
            with pytest.raises(OSError, match=os.strerror(UDP_ERRORS[family])):
                sock.recv(64)
    else:
        command = near.command("ping", "-n", "-c1", f"-W{PATIENCE}", address)
        run = subprocess.run(
            command, env={"LC_ALL": "C", **os.environ}, capture_output=True, text=True, check=False
        )
        assert PING_TEXTS[family] in run.stdout


def answers(lab: Lab, vm: str) -> dict[str, int]:
    """Return what status says of the answers of a VM."""
    found: dict[str, int] = lab.json("status", "--vm", vm)["vms"][0]["interfaces"][0][
        "reject_answers"
    ]
    return found


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("inbound", [True, False], ids=["to_vm", "from_vm"])
def test_catalogue_H12_the_sender_is_told(
    rejecting: tuple[Lab, str], inbound: bool, protocol: str, family: int
) -> None:
    lab, vm = rejecting
    names = ("client", vm) if inbound else (vm, "client")
    assert_refused(lab.nodes[names[0]], lab.nodes[names[1]], protocol, family)


def test_every_answer_was_counted(rejecting: tuple[Lab, str]) -> None:
    """Comes after the twelve packets above, of which each got one answer."""
    lab, vm = rejecting
    counts = answers(lab, vm)
    assert counts["sent"] >= 12
    assert counts["failed"] == 0


@pytest.fixture(scope="module")
def dropping(built_lab: Lab) -> Iterator[Lab]:
    built_lab.write_policy(policy(DROP_ALL))
    built_lab.attach("web01", "db01")
    yield built_lab
    unprotect(built_lab)


@pytest.mark.parametrize("vm", HOOKS)
@pytest.mark.parametrize("inbound", [True, False])
def test_a_drop_tells_nobody(dropping: Lab, vm: str, inbound: bool) -> None:
    """The control: what the senders above were told, they were told because of `reject`."""
    near, far = (dropping.nodes[name] for name in (("client", vm) if inbound else (vm, "client")))
    with pytest.raises(TimeoutError):
        wire.connect(near, far.ipv4, PORT, timeout=0.3)
    assert answers(dropping, vm) == {"sent": 0, "suppressed": 0, "failed": 0}


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("names", [("web01", "db01"), ("db01", "web01")], ids="-".join)
@pytest.mark.parametrize("hook", ["auto", "tc"])
def test_between_two_vms_the_answer_belongs_to_the_flow(
    checksums: Lab, hook: str, names: tuple[str, str], protocol: str, family: int
) -> None:
    """The sender's own vgw takes the answer for what it is, a packet of an open flow."""
    near, far = names
    checksums.write_policy(policy(REJECT_INGRESS))
    try:
        for vm in names:
            order = ["--hook", hook] if vm == "web01" else []
            checksums.vgw("attach", "--vm", vm, *order)
        assert_refused(checksums.nodes[near], checksums.nodes[far], protocol, family)
        assert answers(checksums, far)["sent"] == 1
        assert answers(checksums, near)["sent"] == 0
    finally:
        unprotect(checksums)
