# SPDX-License-Identifier: Apache-2.0
"""Whoever sends what a policy rejects learns of it at once: real sockets, on every way there is.

Each way is gone with checksums left to cards and with checksums that the kernel fills in on the way
and the receiver verifies, with web01's card as plain as a TAP can be and as a virtio card.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.conftest import unprotect
from tests.lab.refusals import (
    FAMILIES,
    PROTOCOLS,
    REJECT_ALL,
    answers,
    assert_refused,
)
from tests.lab.topology import Lab, policy

pytestmark = pytest.mark.lab

#: VM and the hook on which the packets that it sends are judged.
SETUPS = [("web01", "xdp"), ("web01", "tc"), ("db01", "tc")]


@pytest.fixture(scope="module", params=SETUPS, ids="-".join)
def rejecting(checksums: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    """One VM on one hook under REJECT_ALL."""
    vm, hook = request.param
    checksums.write_policy(policy(REJECT_ALL))
    checksums.vgw("attach", "--vm", vm, "--hook", hook)
    yield checksums, vm
    unprotect(checksums)


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
    """Nothing but what was sent comes of the packets above, of which each got an answer."""
    lab, vm = rejecting
    assert_refused(lab.nodes["client"], lab.nodes[vm], "tcp", 4)
    counts = answers(lab, vm)
    assert counts.pop("sent") > 0
    assert counts == {"suppressed": 0, "failed": 0}
