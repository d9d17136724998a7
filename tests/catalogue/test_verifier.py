# SPDX-License-Identifier: Apache-2.0
"""What the programs cost the kernel's verifier."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vgw import libbpf, loader
from vgw.loader import PROGRAMS, Artefact

pytestmark = pytest.mark.bpf

#: Half of what the kernel allows, so that another kernel's verifier may need twice as much.
MOST_INSTRUCTIONS = 500_000


@pytest.mark.parametrize("program", PROGRAMS)
def test_catalogue_E22_verifier_cost(
    artefact: Artefact, program: str, record_property: Callable[[str, object], None]
) -> None:
    with loader.instantiate(artefact, [program]) as instance:
        cost = libbpf.prog_info(instance.programs[program]).verified_insns
    print(f"verifier: {program} {cost} instructions")
    record_property("verified_insns", cost)
    assert 0 < cost < MOST_INSTRUCTIONS
