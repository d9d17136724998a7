# SPDX-License-Identifier: Apache-2.0
"""The command that measures what floods do: `python -m bench.exhaustion`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from bench import tap_floods, under_flood
from bench.options import Progress
from bench.report import Row, machine, to_json, to_table
from bench.scale import FULL, QUICK, Scale
from vgw import cli_output
from vgw.errors import VgwError

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
    chosen = _parser().parse_args(arguments)
    facts = machine()
    rows: list[Row] = []
    try:
        with cli_output.Progress() as progress:
            for name in chosen.only or PARTS:
                rows += PARTS[name](QUICK if chosen.quick else FULL, _reporter(progress, name))
    except VgwError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(to_json(rows, facts) if chosen.output == "json" else to_table(rows, facts))
    return 0


def _reporter(progress: cli_output.Progress, part: str) -> Progress:
    return lambda text: progress.say(f"{part}: {text}")


def _leave(number: int, _frame: object) -> NoReturn:
    """End by a signal as by an error, so that the lab is taken down on the way out."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exhaustion",
        description="Measure what floods do; bench/README.md says what each figure means.",
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    return parser


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, _leave)
    sys.exit(main())
