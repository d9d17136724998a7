# SPDX-License-Identifier: Apache-2.0
"""The rows of the part `size`: figures against how many there are of something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bench.report import Fact, Row

PART: Final = "size"
#: Units of the figures.
NS, KIB, SECONDS, MS_PER_VM = "ns net", "KiB", "s", "ms/VM"
#: Of what there is a number.
VMS, FLOWS, RULES = "VMs", "flows", "rules"


def row(  # noqa: PLR0913, PLR0917 - what a figure is
    what: str,
    unit: str,
    of: str,
    size: int,
    samples: Iterable[float],
    program: str = "",
    note: str = "",
) -> Row:
    """Return a figure for a number of VMs, flows or rules; `program` where it is of one."""
    facts: dict[str, Fact] = {"of": of, "size": size}
    if program:
        facts["program"] = program
    return Row(PART, what, unit, tuple(samples), facts, note=note)
