# SPDX-License-Identifier: Apache-2.0
"""Monitor mode between two guests: what would be dropped arrives, and the log says why."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.frames import OUT, PEER4, TCP, UDP, VM4, ethernet, ipv4, tcp, udp
from tests.lab.devices import NO_GRACE, Devices, document
from tests.lab.taps import IFF_VNET_HDR, NEEDS_CSUM, VnetHeader
from vgw import abi, libbpf
from vgw.abi import Reason, Verdict
from vgw.controller.event_decoder import decode

pytestmark = pytest.mark.lab

OTHER_MAC = bytes.fromhex("525400000099")
DROPPING = "{ingress: drop, egress: drop}"
PLAIN = ipv4(udp(4000, 53), UDP, VM4, PEER4)
#: Frame, what is asked for of its checksum, and what it would be dropped for.
WOULD_BE_DROPPED = (
    (OUT.wrap4(udp(4000, 53), UDP), None, Reason.DEFAULT),
    (OUT.wrap4(udp(4000, 53), UDP), (34, 2), Reason.CHECKSUM_REQUEST),
    (OUT.wrap4(tcp(4000, 443, "A"), TCP), None, Reason.NO_STATE),
    (OUT.wrap4(tcp(4000, 443, "SF"), TCP), None, Reason.TCP_FLAGS),
    (ethernet(PLAIN, 0x0800, source=OTHER_MAC), None, Reason.SPOOF_MAC),
    (ethernet(PLAIN[:15], 0x0800), None, Reason.TRUNCATED),
)


def events(fd: int) -> Iterator[list[tuple[int, int]]]:
    """Yield again and again which verdicts and reasons were logged since the last time."""
    taken: list[tuple[int, int]] = []

    def take(_: int, data: bytes) -> None:
        event = decode(data)
        assert isinstance(event, abi.Event)
        taken.append((event.verdict, event.reason))

    with libbpf.PerfReader(fd, take, lambda *_: None, wakeup_events=1) as reader:
        while True:
            reader.consume()
            yield list(taken)
            taken.clear()


def test_what_would_be_dropped_arrives(devices: Devices) -> None:
    vm = devices.queue("tap0", IFF_VNET_HDR)
    outside = devices.queue("net0")
    devices.bridge("tap0", "net0")
    guarded = devices.protect(document(defaults=DROPPING, settings=f"{NO_GRACE}mode: monitor, "))
    logged = events(libbpf.get_pinned(devices.host.paths.events))
    assert next(logged) == []

    for frame, place, reason in WOULD_BE_DROPPED:
        header = None if place is None else VnetHeader(NEEDS_CSUM, 0, 0, 0, *place)
        send = partial(vm.send, frame) if header is None else partial(vm.send, frame, header)
        assert guarded.reason(send) == (Verdict.WOULD_DROP, reason)
        assert next(logged) == [(Verdict.WOULD_DROP, reason)]
        assert len(outside.received()) == 1

    # The control: enforced, none of them arrives.
    guarded = devices.protect(document(defaults=DROPPING))
    for frame, _, reason in WOULD_BE_DROPPED:
        assert guarded.reason(partial(vm.send, frame))[0] is Verdict.DROP, reason
    assert outside.received() == []
