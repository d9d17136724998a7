# SPDX-License-Identifier: Apache-2.0
"""The watch over the kernel's log notices what it is for; conftest.py keeps it over every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.kernel_log import KernelLog, is_alarm

pytestmark = pytest.mark.lab


@pytest.mark.parametrize(
    ("record", "alarming"),
    [
        ("4,812,5140900,-;WARNING: CPU: 0 PID: 71 at net/core/dev.c:3224 skb_warn_bad", True),
        ("1,812,5140900,-;BUG: kernel NULL pointer dereference, address: 0000000000000000", True),
        ("4,812,5140900,-;Oops: Oops: 0000 [#1] SMP", True),
        ("6,812,5140900,-;br0: port 1(veth-db01) entered forwarding state", False),
        ("12,812,5140900,-;WARNING: said by a process", False),
    ],
)
def test_what_is_an_alarm(record: str, alarming: bool) -> None:
    assert is_alarm(record) is alarming


def test_records_since_the_mark_are_read() -> None:
    Path("/dev/kmsg").write_text("<12>vgw test: before the mark\n")
    log = KernelLog()
    try:
        Path("/dev/kmsg").write_text("<12>vgw test: WARNING: behind the mark\n")
        lines = log.records()
        assert any("behind the mark" in line for line in lines)
        assert not any("before the mark" in line for line in lines)
        assert log.alarms() == []
    finally:
        log.close()
