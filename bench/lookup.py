# SPDX-License-Identifier: Apache-2.0
"""The command that measures what many rules cost: `python -m bench.lookup`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from bench import connections, established, lookup_times
from bench.command import common_parser, run_command, run_parts
from bench.options import Options, Progress
from bench.report import Row, machine
from bench.rulesets import SHAPES

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
    options = _options(chosen)
    parts = {name: partial(run, options) for name, run in PARTS.items()}
    return run_parts(parts, machine(chosen.vgw), chosen)


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
    parser = common_parser("bench.lookup", "what many rules cost", PARTS)
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
    run_command(main)
