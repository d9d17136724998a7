# SPDX-License-Identifier: Apache-2.0
"""What others run on a protected interface is said: by status, and by the doctor."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.controller.conftest import run
from tests.controller.observe import row
from tests.controller.policies import document
from vgw import libbpf
from vgw.controller.doctor import examine
from vgw.controller.foreign import programs_beside
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
Veth = Callable[[str], str]
MIRROR = "u32 match u32 0 0 action mirred egress redirect dev sink0"


@contextmanager
def foreign_program(kind: libbpf.ProgType, attach_type: libbpf.AttachType) -> Iterator[int]:
    """Attach a program of somebody else to tap0 that lets everything pass; yield its id."""
    code = 2 if kind is libbpf.ProgType.XDP else -1
    program = struct.pack("=BBhi", 0xB7, 0, 0, code) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    fd = libbpf.prog_load(kind, "foreign", program)
    flags = libbpf.XDP_NATIVE if kind is libbpf.ProgType.XDP else 0
    link = libbpf.link_create(fd, socket.if_nametoindex("tap0"), attach_type, flags)
    try:
        yield libbpf.prog_info(fd).id
    finally:
        os.close(link)
        os.close(fd)


def doctor_row(paths: Paths) -> dict[str, object]:
    return next(row for row in examine(paths) if row["check"] == "others")


def add_filter(side: str, priority: int) -> None:
    run(*f"tc filter add dev tap0 {side} prio {priority} protocol all {MIRROR}".split())


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_nothing_of_others_is_nothing_to_say(
    host: Host, tap: Tap, paths: Paths, hook: Hook
) -> None:
    tap("tap0")
    host.attach(document(), "web01", hook=hook)

    assert row(host)["beside"] == []
    assert doctor_row(paths) == {
        "check": "others",
        "ok": True,
        "detail": "nothing of somebody else runs on a protected interface",
        "fix": None,
    }


@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC], ids=str)
def test_filters_that_redirect_are_said(
    host: Host, tap: Tap, veth: Veth, paths: Paths, hook: Hook
) -> None:
    tap("tap0")
    veth("sink0")
    host.attach(document(), "web01", hook=hook)
    run(*["tc", "qdisc", "add", "dev", "tap0", "clsact"])
    add_filter("ingress", 10)
    add_filter("egress", 1)

    assert row(host)["attached"]
    assert row(host)["beside"] == [
        {"path": "to_vm", "kind": "u32", "id": 1},
        {"path": "from_vm", "kind": "u32", "id": 10},
    ]
    said = doctor_row(paths)
    assert said["ok"]
    assert "tap0 from_vm: u32 10" in str(said["detail"])
    assert said["fix"] is not None
    run(*["tc", "qdisc", "del", "dev", "tap0", "clsact"])
    assert row(host)["beside"] == []


def test_a_filter_below_an_ingress_qdisc_is_said(host: Host, tap: Tap, veth: Veth) -> None:
    tap("tap0")
    veth("sink0")
    host.attach(document(), "web01")
    run(*["tc", "qdisc", "add", "dev", "tap0", "ingress"])
    run(*f"tc filter add dev tap0 parent ffff: prio 3 protocol all {MIRROR}".split())

    assert {"path": "from_vm", "kind": "u32", "id": 3} in row(host)["beside"]


def test_a_program_behind_ours_is_said(host: Host, tap: Tap, paths: Paths) -> None:
    tap("tap0")
    host.attach(document(), "web01", hook=Hook.XDP)

    with foreign_program(libbpf.ProgType.SCHED_CLS, libbpf.AttachType.TCX_INGRESS) as program:
        assert row(host)["beside"] == [{"path": "from_vm", "kind": "tcx", "id": program}]
        assert f"tcx {program}" in str(doctor_row(paths)["detail"])
    assert row(host)["beside"] == []


def test_a_program_ahead_of_ours_is_said_once(host: Host, tap: Tap, paths: Paths) -> None:
    tap("tap0")
    host.attach(document(), "web01", hook=Hook.TC)

    with foreign_program(libbpf.ProgType.XDP, libbpf.AttachType.XDP) as program:
        assert row(host)["from_vm"]["ahead"] == [program]
        assert row(host)["beside"] == []
        assert f"xdp {program}" in str(doctor_row(paths)["detail"])


@pytest.mark.parametrize("prefer_link", [True, False])
def test_our_own_filters_are_none_of_others(tap: Tap, paths: Paths, prefer_link: bool) -> None:
    tap("tap0")
    host = Host(paths, prefer_link=prefer_link)
    host.attach(document(), "web01", hook=Hook.TC)
    assert row(host)["from_vm"]["mode"] == ("tcx" if prefer_link else "clsact")

    ifindex = socket.if_nametoindex("tap0")
    programs = {row(host)[path]["prog_id"] for path in ("from_vm", "to_vm")}
    assert programs_beside(ifindex, programs) == []
    # The control: programs that are not said to be known are those of others.
    found = [each["kind"] for each in programs_beside(ifindex, ())]
    assert found == (["tcx", "tcx"] if prefer_link else [])
