# SPDX-License-Identifier: Apache-2.0
"""The command that measures the controller: `python -m bench.controller`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from bench import endurance, many
from bench.command import common_parser, run_command, run_parts
from bench.endurance import Ordeal
from bench.many import Extent
from bench.options import Progress
from bench.report import Row, machine

#: Part -> its function for a full run and for a quick one, in the order in which they run.
PARTS: Final[Mapping[str, tuple[Callable[[Progress], list[Row]], ...]]] = {
    many.PART: (
        partial(many.run_scale, Extent(1000, 5, 60.0)),
        partial(many.run_scale, Extent(8, 1, 0.5)),
    ),
    endurance.PART: (
        partial(endurance.run_endurance, Ordeal(10_000_000, 30_000, 100, 100, 20)),
        partial(endurance.run_endurance, Ordeal(20_000, 10_000, 2, 2, 1)),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print their rows; return the exit code."""
    parser = common_parser("bench.controller", "the controller", PARTS)
    chosen = parser.parse_args(arguments)
    parts = {name: runs[1 if chosen.quick else 0] for name, runs in PARTS.items()}
    return run_parts(parts, machine(), chosen)


if __name__ == "__main__":
    run_command(main)
