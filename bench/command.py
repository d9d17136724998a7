# SPDX-License-Identifier: Apache-2.0
"""What the commands of the benches share: common options, running parts, ending by signals."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn

from bench.options import Progress
from bench.report import Fact, Row, to_json, to_table
from vgw import cli_output
from vgw.errors import VgwError


def common_parser(module: str, what: str, parts: Collection[str]) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE`: --quick, -o and --only, which fills a list."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"Measure {what}; bench/README.md says what each figure means.",
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--only", action="append", choices=parts, metavar="PART", help=", ".join(parts)
    )
    return parser


def run_parts(
    parts: Mapping[str, Callable[[Progress], list[Row]]],
    facts: Mapping[str, Fact],
    chosen: argparse.Namespace,
) -> int:
    """Run the chosen parts, print their rows below `facts`, and return the exit code."""
    rows: list[Row] = []
    try:
        with cli_output.Progress() as progress:
            for name in chosen.only or parts:
                rows += parts[name](_reporter(progress, name))
    except VgwError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(to_json(rows, facts) if chosen.output == "json" else to_table(rows, facts))
    return 0


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command as a process; a signal ends it as an error does, so the lab is taken down."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())


def _reporter(progress: cli_output.Progress, part: str) -> Progress:
    return lambda text: progress.say(f"{part}: {text}")
