# SPDX-License-Identifier: Apache-2.0
"""The command that measures what floods do: `python -m bench.exhaustion`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from bench import tap_floods, under_flood
from bench.command import common_parser, run_command, run_parts
from bench.options import Progress
from bench.report import Row, machine
from bench.scale import FULL, QUICK, Scale

Part = Callable[[Scale, Progress], list[Row]]

#: The parts in the order in which they run and are printed.
PARTS: Final[Mapping[str, Part]] = {
    under_flood.FLOOD_PART: under_flood.run_flood,
    under_flood.FULL_PART: under_flood.run_full,
    tap_floods.LOG_PART: tap_floods.run_log,
    tap_floods.EXPIRY_PART: tap_floods.run_expiry,
    tap_floods.LEFTOVERS_PART: tap_floods.run_leftovers,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print their rows; return the exit code."""
    chosen = common_parser("bench.exhaustion", "what floods do", PARTS).parse_args(arguments)
    scale = QUICK if chosen.quick else FULL
    parts = {name: partial(run, scale) for name, run in PARTS.items()}
    return run_parts(parts, machine(), chosen)


if __name__ == "__main__":
    run_command(main)
