# SPDX-License-Identifier: Apache-2.0
"""The command that measures what the firewall costs, side by side: `python -m bench`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from bench import plots
from bench.command import common_parser, run_command, run_parts
from bench.cost import denied, matrix
from bench.options import Options, Progress
from bench.paths import part as paths
from bench.report import Row, machine
from bench.size import figures as size_figures
from bench.size import part as size

_CACHE: Final = "VGW_CACHE_DIR"
Part = Callable[[Options, Progress], list[Row]]

#: The parts in the order in which they run and are printed.
PARTS: Final[Mapping[str, Part]] = {
    "traffic": matrix.run,
    denied.PART: denied.run,
    paths.PART: paths.run,
    size_figures.PART: size.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and print their rows; return the exit code."""
    parser = common_parser("bench", "what the firewall costs", PARTS)
    parser.add_argument(
        "--plots", type=Path, metavar="DIRECTORY", help="write the plots of the part size there"
    )
    chosen = parser.parse_args(arguments)
    options = _options(chosen)
    parts = {name: partial(run, options) for name, run in PARTS.items()}

    def draw(rows: list[Row]) -> None:
        if chosen.plots is not None:
            plots.draw(rows, chosen.plots)

    with _compiled_once():
        return run_parts(parts, machine(), chosen, draw)


@contextmanager
def _compiled_once() -> Iterator[None]:
    """Have all parts find what one of them has compiled: where VGW_CACHE_DIR says, or for a run."""
    if _CACHE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ[_CACHE] = directory
        try:
            yield
        finally:
            del os.environ[_CACHE]


def _options(chosen: argparse.Namespace) -> Options:
    quick = chosen.quick
    return Options(
        quick=quick,
        rules=(),
        shape="acl",
        version=4,
        seconds=0.2 if quick else 0.25,
        rounds=1 if quick else 5,
    )


if __name__ == "__main__":
    run_command(main)
