# SPDX-License-Identifier: Apache-2.0
"""Answers to rejected packets between two VMs: the sender's own vgw must let them come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.conftest import unprotect
from tests.lab.refusals import FAMILIES, PROTOCOLS, REJECT_INGRESS, assert_refused
from tests.lab.topology import Lab, policy

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module", params=["xdp", "tc"])
def both_protected(checksums: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two VMs that may send everything and take only what belongs to a flow of theirs."""
    checksums.write_policy(policy(REJECT_INGRESS))
    checksums.vgw("attach", "--vm", "web01", "--hook", request.param)
    checksums.attach("db01")
    yield checksums
    unprotect(checksums)


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("names", [("web01", "db01"), ("db01", "web01")], ids="-to-".join)
def test_catalogue_H12_the_answer_belongs_to_the_flow(
    both_protected: Lab, names: tuple[str, str], protocol: str, family: int
) -> None:
    near, far = (both_protected.nodes[name] for name in names)
    assert_refused(near, far, protocol, family)
