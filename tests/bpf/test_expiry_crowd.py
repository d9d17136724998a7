# SPDX-License-Identifier: Apache-2.0
"""A table in which flows come and go by the thousand has room for them, whatever else is in it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path as File

import pytest

from bench.endpoints import make_endpoint
from bench.paths import packets
from bench.paths.checked import BY_RULE, CONNTRACK_MAX, Checked, Trial, interface
from bench.paths.policy import policy
from tests.frames import UDP
from vgw import loader
from vgw.abi import Path

pytestmark = pytest.mark.bpf

PROGRAMS = ("tc_from_vm", "tc_to_vm")


@pytest.mark.parametrize("lasting", [10_000, CONNTRACK_MAX // 2])
def test_flows_that_die_make_room_among_live_ones(
    artefact: loader.Artefact, tmp_path: File, lasting: int
) -> None:
    """Twice as many flows come and go as the table holds, while some stay; none is refused.

    Those that stay lie in a row in the expiry queue. SYNs that nobody answers are over with the
    next tick here.
    """
    syn = packets.packet(Path.FROM_VM, 4, "tcp", Path.FROM_VM, "S")
    with ExitStack() as stack:
        facts = interface(4, brief=True)
        endpoint = make_endpoint(artefact, PROGRAMS, policy(4, 10, "acl"), facts, stack)
        checked = Checked.load(tmp_path, stack)
        checked.open(endpoint, 4, "udp", lasting)
        checked.run(Trial(endpoint, "tc_from_vm", syn, BY_RULE), 2 * CONNTRACK_MAX)
        kept = sum(key.protocol == UDP for key, _ in endpoint.maps.flows())
    assert kept == lasting
