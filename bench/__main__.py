# SPDX-License-Identifier: Apache-2.0
"""The command that measures what the firewall costs, side by side: `python -m bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from bench.command import common_parser, run_command, run_parts
from bench.cost import denied, matrix
from bench.options import Options, Progress
from bench.report import Row, machine

Part = Callable[[Options, Progress], list[Row]]

#: The parts in the order in which they run and are printed.
PARTS: Final[Mapping[str, Part]] = {"traffic": matrix.run, denied.PART: denied.run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print their rows; return the exit code."""
    chosen = common_parser("bench", "what the firewall costs", PARTS).parse_args(arguments)
    options = _options(chosen)
    parts = {name: partial(run, options) for name, run in PARTS.items()}
    return run_parts(parts, machine(), chosen)


def _options(chosen: argparse.Namespace) -> Options:
    quick = chosen.quick
    return Options(
        quick=quick,
        rules=(),
        shape="acl",
        version=4,
        seconds=0.2 if quick else 0.5,
        rounds=1 if quick else 5,
    )


if __name__ == "__main__":
    run_command(main)
