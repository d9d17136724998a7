# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements as tables in Markdown, for a README: a table for each part.

Rows that differ in nothing but the program and the number of rules stand side by side, as columns
of medians; of other rows MIN and MAX are shown too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from bench.report import Fact, Row, figure

#: Conditions that are columns, where rows have both.
_ACROSS: Final = ("program", "rules")


def to_markdown(rows: Sequence[Row], facts: Mapping[str, Fact]) -> str:
    """Return the machine and the tables."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())]
    for part, members in groupby(rows, lambda row: row.part):
        part_rows = list(members)
        wide = all(name in row.facts for row in part_rows for name in _ACROSS)
        lines += ["", f"`{part}`", "", *(_wide(part_rows) if wide else _long(part_rows))]
    return "\n".join(lines)


def _long(rows: Sequence[Row]) -> Iterator[str]:
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    ratios = list(dict.fromkeys(name for row in rows for name in row.ratios))
    noted = any(row.note for row in rows)
    headers = ("what", *facts, "unit", "median", "min", "max", *(f"/ {name}" for name in ratios))
    yield from _header((*headers, *(("note",) if noted else ())), 1)
    for row in rows:
        samples = row.samples
        spread = (
            (statistics.median(samples), min(samples), max(samples)) if samples else (None,) * 3
        )
        yield _line(
            (
                row.what,
                *(str(row.facts.get(name, "")) for name in facts),
                row.unit,
                *("" if value is None else figure(value) for value in spread),
                *(f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in ratios),
                *((row.note,) if noted else ()),
            )
        )


def _wide(rows: Sequence[Row]) -> Iterator[str]:
    facts = [name for name in rows[0].facts if name not in _ACROSS]
    columns = list(dict.fromkeys(_values(row, _ACROSS) for row in rows))
    cells: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for row in rows:
        line = cells.setdefault((row.what, *_values(row, facts), row.unit), {})
        line[_values(row, _ACROSS)] = figure(statistics.median(row.samples)) if row.samples else ""
    names = (f"{program}, {rules} rules" for program, rules in columns)
    yield from _header(("what", *facts, "unit", *names), 1)
    for key, line in cells.items():
        yield _line((*key, *(line.get(column, "") for column in columns)))


def _values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row.facts.get(name, "")) for name in names)


def _header(names: Sequence[str], texts: int) -> Iterator[str]:
    """Yield the header of a table whose first columns are texts."""
    yield _line(names)
    yield _line(["---"] * texts + ["---:"] * (len(names) - texts))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
