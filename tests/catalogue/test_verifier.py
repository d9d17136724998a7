# SPDX-License-Identifier: Apache-2.0
"""What the programs cost the kernel's verifier, which is most of what an attach takes.

The cost is a count of instructions, the same on a busy machine and a slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from vgw import libbpf, loader
from vgw.controller.stages import STAGES
from vgw.loader import PROGRAMS, Artefact

pytestmark = pytest.mark.bpf

#: The most that each may take: half as much again as the largest of its kind took when this was
#: written (42,000 and 203,000). The kernel allows a million.
MOST_OF_PROGRAM: Final = 63_000
MOST_OF_STAGE: Final = 305_000
#: Programs that look a rule up in a policy of any size, as stages do.
STAGE_LIKE: Final = {stage.program for stage in STAGES.values()} | {"policy_probe"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_catalogue_E22_verifier_cost(
    artefact: Artefact, program: str, record_property: Callable[[str, object], None]
) -> None:
    with loader.instantiate(artefact, [program]) as instance:
        cost = libbpf.prog_info(instance.programs[program]).verified_insns
    print(f"verifier: {program} {cost} instructions")
    record_property("verified_insns", cost)
    assert 0 < cost < (MOST_OF_STAGE if program in STAGE_LIKE else MOST_OF_PROGRAM)
