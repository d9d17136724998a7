# SPDX-License-Identifier: Apache-2.0
"""The controller's log as a whole: from a packet to each of its sinks, whatever those do."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller.policies import from_vm, interface
from tests.controller.process import Controller, eventually
from tests.controller.receivers import Receiver, parse_journal, parse_syslog
from vgw import libbpf
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.libbpf import ProgType

pytestmark = pytest.mark.bpf

POLICY = f"""
schema: vgw/v1
vms: {{web01: {interface("tap0", vm="log: {flows: true},")}}}
policies:
  - name: out
    tier: vm
    applies_to: {{all: true}}
    egress: [{{name: dns, action: drop, services: [udp/53], log: true}}]
defaults: {{ingress: drop, egress: accept}}
"""
_INSN = struct.Struct("=BBhi")


@pytest.fixture
def receivers(tmp_path: Path) -> Iterator[dict[str, Receiver]]:
    made = {
        "journal": Receiver(tmp_path / "journal", parse_journal),
        "syslog": Receiver(tmp_path / "syslog", parse_syslog),
    }
    yield made
    for receiver in made.values():
        receiver.close()


@pytest.fixture
def controller(
    paths: Paths,
    receivers: dict[str, Receiver],
    tap: Callable[[str], int],  # noqa: ARG001 (its interfaces go after the controller)
) -> Iterator[Controller]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    paths.policy.write_text(POLICY)
    log_to = ("file", *(f"{kind}:{receiver.path}" for kind, receiver in receivers.items()))
    running = Controller(paths, 9477, log_to=log_to)
    yield running
    if running.process.poll() is None:
        running.end()
    with contextlib.suppress(VgwError):
        Host(paths).detach_all()


def next_of(receiver: Receiver, event: str) -> dict[str, Any]:
    """Wait for a record of an event and return its fields; others before it are passed over."""
    while True:
        message = receiver.get()
        fields: dict[str, Any] = message if isinstance(message, dict) else message.parameters
        if event in (fields.get("VGW_EVENT"), fields.get("event")):
            return fields


def protected(controller: Controller, tap: Callable[[str], int]) -> int:
    vm = tap("tap0")
    eventually("protected", lambda: controller.attached() == {"web01": 1})
    return vm


def test_a_packet_is_told_to_every_sink(
    controller: Controller, receivers: dict[str, Receiver], tap: Callable[[str], int]
) -> None:
    vm = protected(controller, tap)
    os.write(vm, from_vm(proto="udp", sport=4000, dport=53))
    in_journal, in_syslog = (next_of(receivers[kind], "drop") for kind in ("journal", "syslog"))
    (in_file,) = eventually("in the file", lambda: controller.records("drop"))

    assert in_file["rule"] == in_journal["VGW_RULE"] == in_syslog["rule"] == "dns"
    assert "vm/out/dns" in in_journal["MESSAGE"]
    os.write(vm, from_vm(proto="udp", sport=4000, dport=123))
    assert next_of(receivers["journal"], "flow_start")["VGW_DPORT"] == "123"
    assert controller.client.detach("web01") == {"detached": ["web01"]}
    assert next_of(receivers["syslog"], "flow_end")["ended"] == "detached"
    assert controller.metric("vgw_events_lost_total{") == 0


def test_without_its_receivers_the_log_goes_on_and_they_miss_nothing(
    controller: Controller, receivers: dict[str, Receiver], tap: Callable[[str], int]
) -> None:
    vm = protected(controller, tap)
    for kind, receiver in receivers.items():
        next_of(receiver, "attach")
        receiver.close()
        assert not receiver.path.exists(), kind
    os.write(vm, from_vm(proto="udp", sport=4000, dport=53))
    eventually("in the file", lambda: controller.records("drop"))
    for kind, decode in (("journal", parse_journal), ("syslog", parse_syslog)):
        receivers[kind] = Receiver(receivers[kind].path, decode)
        next_of(receivers[kind], "drop")


def forge(events_fd: int, data: bytes) -> None:
    """Put a record into the host's events map, as any program of root may."""
    size = -(-len(data) // 8) * 8
    words = struct.unpack(f"={size // 4}i", data.ljust(size, b"\0"))
    code = [_INSN.pack(0x62, 10, 4 * n - size, word) for n, word in enumerate(words)]
    code += [
        _INSN.pack(0x18, 0x12, 0, events_fd),  # r2 = the map
        _INSN.pack(0, 0, 0, 0),
        _INSN.pack(0xB4, 3, 0, -1),  # r3 = BPF_F_CURRENT_CPU
        _INSN.pack(0xBF, 0xA4, 0, 0),  # r4 = the data on the stack
        _INSN.pack(0x07, 4, 0, -size),
        _INSN.pack(0xB7, 5, 0, len(data)),
        _INSN.pack(0x85, 0, 0, 25),  # bpf_perf_event_output
        _INSN.pack(0xB7, 0, 0, 0),
        _INSN.pack(0x95, 0, 0, 0),
    ]
    program = libbpf.prog_load(ProgType.SCHED_CLS, "forger", b"".join(code))
    try:
        libbpf.prog_test_run(program, bytes(64))
    finally:
        os.close(program)


def test_catalogue_N13_what_another_program_forges_is_counted_and_told_to_nobody(
    controller: Controller, paths: Paths, tap: Callable[[str], int]
) -> None:
    vm = protected(controller, tap)
    fd = libbpf.get_pinned(paths.events)
    try:
        for data in (b"\0" * 8, b"\0" * 96, b"\xff" * 96, b"A" * 200, b'{"event":"accept"}\n'):
            forge(fd, data)
    finally:
        os.close(fd)
    malformed = 'vgw_events_lost_total{cause="malformed"}'
    eventually("all are counted", lambda: controller.metric(malformed) == 5)
    os.write(vm, from_vm(proto="udp", sport=4000, dport=53))
    eventually("the log goes on", lambda: controller.records("drop"))

    told = {json.loads(line)["event"] for line in paths.log_file.read_bytes().splitlines()}
    assert told <= {"start", "attach", "drop", "lost", "flow_start"}
