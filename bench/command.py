# SPDX-License-Identifier: Apache-2.0
"""What the commands of the benches share: common options, running parts, ending by signals."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, NoReturn

from bench.markdown import to_markdown
from bench.options import Progress
from bench.report import Fact, Row, from_json, to_json, to_table
from vgw import cli_output
from vgw.errors import VgwError

#: How rows can be printed.
_FORMATS: Final = {"table": to_table, "json": to_json, "markdown": to_markdown}


def common_parser(module: str, what: str, parts: Collection[str]) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE`: --quick, -o, --from, and --only, a list."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"Measure {what}; bench/README.md says what each figure means.",
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    parser.add_argument("-o", dest="output", choices=tuple(_FORMATS), default="table")
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="measure nothing: print what a run with `-o json` has written",
    )
    parser.add_argument(
        "--only", action="append", choices=parts, metavar="PART", help=", ".join(parts)
    )
    return parser


def run_parts(
    parts: Mapping[str, Callable[[Progress], list[Row]]],
    facts: Mapping[str, Fact],
    chosen: argparse.Namespace,
    draw: Callable[[list[Row]], None] = lambda _rows: None,
) -> int:
    """Run the chosen parts, print their rows below `facts`, and return the exit code.

    `draw` is called with the rows before they are printed.
    """
    rows: list[Row] = []
    try:
        if chosen.earlier is not None:
            rows, facts = from_json(_read(chosen.earlier))
        else:
            with cli_output.Progress() as progress:
                for name in chosen.only or parts:
                    rows += parts[name](_reporter(progress, name))
        draw(rows)
    except VgwError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(_FORMATS[chosen.output](rows, facts))
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise VgwError(f"cannot read {path}: {error}") from error


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command as a process; a signal ends it as an error does, so the lab is taken down."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())


def _reporter(progress: cli_output.Progress, part: str) -> Progress:
    return lambda text: progress.say(f"{part}: {text}")
