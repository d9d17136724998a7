# SPDX-License-Identifier: Apache-2.0
"""Plots of the part `size`: each figure against how many VMs, flows or rules there are."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from bench.lab import BenchError
from bench.report import Row
from bench.size.figures import PART

_INCHES: Final = (4.4, 3.6)
_DOTS_PER_INCH: Final = 80
_COLUMNS: Final = 3
#: Figures that differ by more are drawn on a logarithmic scale, others from 0 on, with some room.
_WIDE: Final = 100
_ROOM: Final = 1.15


def draw(rows: Iterable[Row], directory: Path) -> list[Path]:
    """Write a PNG for each of what there are numbers of; return their paths. Raises BenchError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = [row for row in rows if row.part == PART and row.samples]
        return [
            _picture(of, list(members), directory)
            for of, members in groupby(found, lambda row: str(row.facts["of"]))
        ]
    except OSError as error:
        raise BenchError(f"cannot write plots to {directory}: {error.strerror}") from error


def _picture(of: str, rows: Sequence[Row], directory: Path) -> Path:
    """Draw a plot for each figure that programs differ in and for each unit of the others."""
    # Takes half a second, which runs without plots need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    plots: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        program = str(row.facts.get("program", ""))
        lines = plots.setdefault((row.what if program else "", row.unit), {})
        lines.setdefault(program or row.what, []).append(row)
    columns = min(len(plots), _COLUMNS)
    lines_of_plots = -(-len(plots) // columns)
    size = _INCHES[0] * columns, _INCHES[1] * lines_of_plots
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for number, ((what, unit), lines) in enumerate(plots.items(), 1):
        axes = figure.add_subplot(lines_of_plots, columns, number)
        for name, members in lines.items():
            sizes = [float(row.facts["size"]) for row in members]
            axes.plot(sizes, [statistics.median(row.samples) for row in members], "o-", label=name)
        axes.set_xscale("log")
        medians = [statistics.median(row.samples) for members in lines.values() for row in members]
        if max(medians) > _WIDE * min(medians):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, max(medians) * _ROOM)
        axes.set_title(what, fontsize="medium")
        axes.set_xlabel(of)
        axes.set_ylabel(unit)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    path = directory / f"{of.lower()}.png"
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path
