# SPDX-License-Identifier: Apache-2.0
"""The command that measures what many rules cost: `python -m bench.lookup`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from bench import connections, established, lookup_times
from bench.options import Options, Progress
from bench.report import Row, machine, to_json, to_table
from bench.rulesets import SHAPES
from vgw import cli_output
from vgw.errors import VgwError

Part = Callable[[Options, Progress], list[Row]]

#: The parts in the order in which they run and are printed.
PARTS: Final[Mapping[str, Part]] = {
    lookup_times.PART: lookup_times.run,
    established.PART: established.run,
    connections.PART: connections.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print their rows; return the exit code."""
    chosen = _parser().parse_args(arguments)
    facts = machine(chosen.vgw)
    rows: list[Row] = []
    try:
        with cli_output.Progress() as progress:
            for name in chosen.only or PARTS:
                rows += PARTS[name](_options(chosen), _reporter(progress, name))
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


def _options(chosen: argparse.Namespace) -> Options:
    quick = chosen.quick
    return Options(
        quick=quick,
        rules=tuple(sorted(chosen.rules or ())),
        shape=chosen.shape,
        version=chosen.ip,
        seconds=chosen.seconds or (0.3 if quick else 1.0),
        rounds=chosen.rounds or (1 if quick else 9),
        vgw=chosen.vgw,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lookup",
        description="Measure what many rules cost; bench/README.md says what each figure means.",
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see it work")
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--rules", type=_rules, metavar="N,N", help="sizes of rule sets; each part has its own"
    )
    parser.add_argument("--shape", choices=SHAPES, default="acl", help="default: acl")
    parser.add_argument("--ip", type=int, choices=(4, 6), default=4, help="default: 4")
    parser.add_argument("--seconds", type=_seconds, help="length of one sample of traffic")
    parser.add_argument("--rounds", type=_rounds, help="samples of each figure")
    parser.add_argument("--vgw", metavar="COMMAND", help="measure this vgw instead of one's own")
    return parser


def _rules(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_whole(word, 10, 50_000) for word in text.split(",")))


def _rounds(text: str) -> int:
    return _whole(text, 1, 100)


def _whole(text: str, low: int, high: int) -> int:
    value = int(text) if text.isascii() and text.isdigit() else low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not a time from 0.1 to 60 seconds")
    return value


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, _leave)
    sys.exit(main())
