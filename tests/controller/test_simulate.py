# SPDX-License-Identifier: Apache-2.0
"""Simulation: the loaded program and the model on the same packets, and live state untouched."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.observe import send_to_vm
from tests.controller.policies import PEER_ADDRESS, VM_ADDRESS, document, from_vm, interface, to_vm
from vgw.abi import Mode, Reason
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.interfaces import choose_hook
from vgw.controller.pcap import read_pcap
from vgw.controller.reconcile import Host
from vgw.controller.simulate import PacketError, simulate
from vgw.errors import VgwError
from vgw.policy.model import Direction, Hook

RULES = """[
  {name: http, action: accept, services: [tcp/80]},
  {name: web, action: reject, services: [tcp/8080]},
  {name: ping, action: accept, services: [icmp/echo-request]}]"""
INGRESS = {"src": PEER_ADDRESS, "dst": VM_ADDRESS}
EGRESS = {"src": VM_ADDRESS, "dst": PEER_ADDRESS}
Tap = Callable[[str], int]


def answers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return verdict, reason and rule of each row, after checking that the model agrees."""
    for row in rows:
        assert (row["model"], row["model_reason"]) == (row["verdict"], row["reason"]), row
        if row["reason"] == "RULE":
            assert row["model_rule"] == row["rule"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return [(row["verdict"], row["reason"], row["rule"]) for row in rows]


def state(endpoint: OpenEndpoint) -> tuple[object, ...]:
    """Return what an endpoint counts and remembers, but for what the host sends by itself."""
    maps = endpoint.maps
    own = (Reason.ND, Reason.MEMBERSHIP)
    stats = {label: count for label, count in maps.stats().items() if label[2] not in own}
    return stats, bytes(maps.meta()), len(list(maps.flows()))


@pytest.mark.bpf
@pytest.mark.parametrize("attached", [True, False])
def test_each_packet_is_judged_alone(host: Host, tap: Tap, attached: bool) -> None:
    tap("tap0")
    policy = document(RULES, vms={"web01": interface("tap0", vm="conntrack: {grace: 0s},")})
    if attached:
        host.attach(policy, "web01")
    packets: list[Any] = [
        {**INGRESS, "proto": "tcp", "dport": 80},
        {**INGRESS, "proto": "tcp", "dport": 80, "flags": "A"},
        {**INGRESS, "proto": "tcp", "dport": 8080},
        {**INGRESS, "proto": "udp", "dport": 53},
        {**INGRESS, "proto": "icmp"},
        {**INGRESS, "proto": 47},
        to_vm(dport=80),
    ]

    rows = list(
        simulate(host, "web01", Direction.INGRESS, packets, document=None if attached else policy)
    )

    assert answers(rows) == [
        ("accept", "RULE", "http"),
        ("drop", "NO_STATE", None),
        ("reject", "RULE", "web"),
        ("drop", "DEFAULT", None),
        ("accept", "RULE", "ping"),
        ("drop", "PROTOCOL", None),
        ("accept", "RULE", "http"),
    ]
    assert (rows[0]["tier"], rows[0]["policy"]) == ("vm", "base")


@pytest.mark.bpf
def test_connections_are_taken_over_as_the_endpoint_does_it(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    late = {**INGRESS, "proto": "tcp", "dport": 80, "flags": "A"}

    assert answers(list(simulate(host, "web01", Direction.INGRESS, [late]))) == [
        ("accept", "RULE", "http")
    ]
    host.flush("web01")
    assert answers(list(simulate(host, "web01", Direction.INGRESS, [late]))) == [
        ("drop", "NO_STATE", None)
    ]


@pytest.mark.bpf
def test_a_sequence_keeps_its_state(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    syn = {**INGRESS, "proto": "tcp", "dport": 80}
    answer = {**EGRESS, "proto": "tcp", "sport": 80, "dport": 40000, "flags": "SA"}
    packets = [answer | {"direction": "egress"}, syn, answer | {"direction": "egress"}, syn]

    alone = list(simulate(host, "web01", Direction.INGRESS, packets))
    together = list(simulate(host, "web01", Direction.INGRESS, packets, stateful=True))

    assert [answer[1] for answer in answers(alone)] == ["NO_STATE", "RULE", "NO_STATE", "RULE"]
    assert [answer[1] for answer in answers(together)] == [
        "NO_STATE",
        "RULE",
        "CT_ESTABLISHED",
        "CT_ESTABLISHED",
    ]


@pytest.mark.bpf
def test_both_hooks_say_the_same(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    packets: list[Any] = [
        from_vm(),
        from_vm(src="10.20.0.12"),
        {**EGRESS, "proto": "udp", "dport": 53},
    ]

    by_hook = {
        hook: list(simulate(host, "web01", Direction.EGRESS, packets, hook=hook))
        for hook in (Hook.XDP, Hook.TC)
    }

    expected = [
        ("accept", "DEFAULT", None),
        ("drop", "SPOOF_ADDRESS", None),
        ("accept", "DEFAULT", None),
    ]
    for hook, rows in by_hook.items():
        assert answers(rows) == expected
        assert {row["hook"] for row in rows} == {hook}


@pytest.mark.bpf
def test_a_planned_endpoint_has_the_hook_that_an_attach_gives_it(host: Host, tap: Tap) -> None:
    tap("tap0")

    def planned(hook: str) -> str:
        policy = document(RULES, vms={"web01": interface("tap0", f", hook: {hook}")})
        (row,) = simulate(host, "web01", Direction.EGRESS, [from_vm()], document=policy)
        return str(row["hook"])

    assert {hook: planned(hook) for hook in Hook} == {hook: choose_hook(hook) for hook in Hook}
    host.attach(document(RULES), "web01", hook=Hook.XDP)
    assert [planned(hook) for hook in Hook] == [Hook.XDP] * len(Hook), "what was ordered holds"
    host.attach(document(RULES), "web01", hook=Hook.AUTO)
    assert planned("auto") == Hook.TC


@pytest.mark.bpf
def test_live_state_is_not_touched(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    send_to_vm("tap0", to_vm())
    (endpoint,) = host.endpoints()
    with endpoint:
        before = state(endpoint)
        list(simulate(host, "web01", Direction.INGRESS, [to_vm(sport=n) for n in range(1, 50)]))
        after = state(endpoint)

    assert before == after
    assert [rule["packets"] for rule in host.rules("web01")["rules"]] == [1, 0, 0]


@pytest.mark.bpf
def test_the_mode_in_force_is_simulated(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    packet = {**INGRESS, "proto": "tcp", "dport": 81}

    host.set_mode("web01", Mode.MONITOR)
    monitored = list(simulate(host, "web01", Direction.INGRESS, [packet]))
    host.set_mode("web01", Mode.QUARANTINE)
    quarantined = list(simulate(host, "web01", Direction.INGRESS, [packet]))

    assert answers(monitored) == [("would_drop", "DEFAULT", None)]
    assert answers(quarantined) == [("drop", "QUARANTINE", None)]


@pytest.mark.bpf
def test_a_frame_that_the_kernel_cannot_run_is_said_so(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")

    (row,) = simulate(host, "web01", Direction.INGRESS, [b"short"])

    assert row["verdict"] is None
    assert "frame of 5 bytes" in row["error"]
    assert row["model_reason"] == "TRUNCATED"


@pytest.mark.bpf
@pytest.mark.parametrize("hook", [Hook.XDP, Hook.TC])
def test_a_frame_longer_than_a_test_run_takes_has_no_answer(
    host: Host, tap: Tap, hook: Hook
) -> None:
    """An XDP program would be given only the beginning of the frame, and judge that."""
    tap("tap0")
    host.attach(document(RULES), "web01")
    frame = from_vm()
    lengths = (3520, 3800)

    longest, longer = simulate(
        host,
        "web01",
        Direction.EGRESS,
        [frame + bytes(length - len(frame)) for length in lengths],
        hook=hook,
    )

    assert answers([longest]) == [("accept", "DEFAULT", None)]
    assert longer["verdict"] is None
    assert "cannot test-run programs on a frame of 3800 bytes" in longer["error"]
    assert longer["model"] == "accept"


@pytest.mark.bpf
def test_a_wrong_packet_is_named(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    good = {**INGRESS, "proto": "tcp", "dport": 80}

    with pytest.raises(VgwError, match=r"packet 1: .*dport: 70000 is wrong"):
        list(simulate(host, "web01", Direction.INGRESS, [good, good | {"dport": 70000}]))
    with pytest.raises(PacketError, match=r"packet 0: .*direction: 'up' is neither"):
        list(simulate(host, "web01", Direction.INGRESS, [good | {"direction": "up"}]))


@pytest.mark.bpf
def test_which_vm_and_interface(host: Host, tap: Tap) -> None:
    for name in ("tap0", "tap1"):
        tap(name)
    two = document(RULES, vms={"web01": "{interfaces: [{name: tap0}, {name: tap1}]}"})
    packet = {**INGRESS, "proto": "tcp", "dport": 80}

    with pytest.raises(VgwError, match="VM web01 is not attached"):
        list(simulate(host, "web01", Direction.INGRESS, [packet]))
    host.attach(two, "web01")
    with pytest.raises(VgwError, match="interfaces tap0, tap1: say which by --interface"):
        list(simulate(host, "web01", Direction.INGRESS, [packet]))
    for given in (None, two):
        with pytest.raises(VgwError, match="no interface tap7: name tap0 or tap1 by --interface"):
            list(
                simulate(
                    host, "web01", Direction.INGRESS, [packet], interface="tap7", document=given
                )
            )

    assert list(simulate(host, "web01", Direction.INGRESS, [packet], interface="tap1"))


@pytest.mark.bpf
def test_no_descriptors_are_left_open(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(document(RULES), "web01")
    before = len(list(Path("/proc/self/fd").iterdir()))

    list(simulate(host, "web01", Direction.INGRESS, [to_vm()]))
    list(simulate(host, "web01", Direction.INGRESS, [to_vm()], document=document(RULES)))

    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- captures -------------------------------------------------------------------------------


def capture(order: str, magic: int, frames: list[bytes], link_type: int = 1, cut: int = 0) -> bytes:
    header = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, link_type)
    records = (
        struct.pack(f"{order}IIII", 1, 2, len(frame) - cut, len(frame)) + frame[: len(frame) - cut]
        for frame in frames
    )
    return header + b"".join(records)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("magic", [0xA1B2C3D4, 0xA1B23C4D])
def test_frames_of_a_capture(tmp_path: Path, order: str, magic: int) -> None:
    frames = [to_vm(), from_vm(), b""]
    file = tmp_path / "x.pcap"
    file.write_bytes(capture(order, magic, frames))

    assert list(read_pcap(file)) == frames


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a pcap file"),
        (b"plain text, and more than a header is long", "is not a pcap file"),
        (capture("<", 0xA1B2C3D4, [], link_type=113), "link type 113, not of Ethernet"),
        (capture("<", 0xA1B2C3D4, [to_vm()], cut=4), "only 50 of the 54 bytes of frame 1"),
        (capture("<", 0xA1B2C3D4, [to_vm()])[:-1], "damaged at frame 1"),
        (capture("<", 0xA1B2C3D4, [to_vm(), to_vm()])[:-60], "damaged at frame 2"),
        (capture("<", 0xA1B2C3D4, [])[:24] + b"\xff" * 16, "damaged at frame 1"),
        (struct.pack("<I", 0x0A0D0D0A) + bytes(40), "pcapng file; convert it"),
    ],
)
def test_what_is_no_capture_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.pcap"
    file.write_bytes(content)

    with pytest.raises(VgwError, match=message):
        list(read_pcap(file))


def test_a_capture_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match=r"cannot read the capture .*No such file"):
        list(read_pcap(tmp_path / "nope"))
