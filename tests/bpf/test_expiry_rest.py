# SPDX-License-Identifier: Apache-2.0
"""How much of the expiry queue new flows look at: little where all flows live, enough where not.

Flows are opened by the thousand within a test run, as many as a tick of the clock sees in a flood.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path as File

import pytest

from bench.endpoints import Endpoint, make_endpoint
from bench.paths import packets
from bench.paths.checked import BY_RULE, CONNTRACK_MAX, Checked, Trial, interface
from bench.paths.policy import policy
from tests.frames import UDP
from vgw import loader
from vgw.abi import Path

pytestmark = pytest.mark.bpf

PROGRAMS = ("tc_from_vm", "tc_to_vm")


@contextmanager
def flooded(
    artefact: loader.Artefact, directory: File, *, brief: bool
) -> Iterator[tuple[Endpoint, Checked]]:
    """Yield an endpoint with the largest table, and what opens flows in it by the thousand.

    With `brief` SYNs that nobody answers are over with the next tick, else nothing is.
    """
    with ExitStack() as stack:
        facts = interface(4, brief=brief)
        endpoint = make_endpoint(artefact, PROGRAMS, policy(4, 10, "acl"), facts, stack)
        yield endpoint, Checked.load(directory, stack)


def test_live_flows_are_hardly_looked_at(artefact: loader.Artefact, tmp_path: File) -> None:
    """Looking at a batch for every other new flow would take as many batches as half the flows."""
    syn = packets.packet(Path.FROM_VM, 4, "tcp", Path.FROM_VM, "S")
    with flooded(artefact, tmp_path, brief=False) as (endpoint, checked):
        checked.run(Trial(endpoint, "tc_from_vm", syn, BY_RULE), 20_000)
        meta = endpoint.maps.meta()
    assert meta.entries == 20_000
    assert 0 < meta.head < 20_000 // 4


def test_flows_that_die_make_room_among_live_ones(
    artefact: loader.Artefact, tmp_path: File
) -> None:
    """Twice as many flows come and go as the table holds, while some stay; none is refused."""
    lasting = 10_000
    syn = packets.packet(Path.FROM_VM, 4, "tcp", Path.FROM_VM, "S")
    with flooded(artefact, tmp_path, brief=True) as (endpoint, checked):
        checked.open(endpoint, 4, "udp", lasting)
        checked.run(Trial(endpoint, "tc_from_vm", syn, BY_RULE), 2 * CONNTRACK_MAX)
        entries = endpoint.maps.meta().entries
        kept = sum(key.protocol == UDP for key, _ in endpoint.maps.flows())
    assert kept == lasting
    assert entries < CONNTRACK_MAX
