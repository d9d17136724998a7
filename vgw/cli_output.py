# SPDX-License-Identifier: Apache-2.0
"""How the CLI prints: tables for people, JSON and JSON lines for programs, progress on a terminal.

Results go to stdout; warnings and progress go to stderr, so that a pipe sees results only.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import click

SCHEMA = "vgw/v1"


class Output(enum.StrEnum):
    """The formats of `-o`."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


class Table:
    """Rows under headers, each column as wide as its widest cell; numbers stand right."""

    def __init__(self, *headers: str, right: Iterable[str] = ()) -> None:
        self._headers = headers
        self._right = frozenset(right)
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: object) -> None:
        """Append a row with one cell for each header; None shows as `-`."""
        if len(cells) != len(self._headers):
            raise ValueError(f"{len(cells)} cells under {len(self._headers)} headers")
        self._rows.append(tuple("-" if cell is None else str(cell) for cell in cells))

    def lines(self) -> list[str]:
        """Return the header line and the rows, without trailing blanks."""
        columns = zip(self._headers, *self._rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        return [
            "  ".join(
                cell.rjust(width) if header in self._right else cell.ljust(width)
                for cell, width, header in zip(row, widths, self._headers, strict=True)
            ).rstrip()
            for row in (self._headers, *self._rows)
        ]


def print_rows(
    output: Output, document: Mapping[str, object], key: str, table: Table, *, empty: str
) -> None:
    """Print a document whose rows are in `document[key]`.

    JSON is the whole document with its schema, JSON lines are its rows, the table is what the
    caller made of them; `empty` is said instead of a table without rows.
    """
    rows = document[key]
    if not isinstance(rows, Sequence):
        raise TypeError(f"{key} is not a list")
    if output is Output.JSON:
        print_json(document)
    elif output is Output.JSONL:
        for row in rows:
            print_json_line(row)
    elif rows:
        click.echo("\n".join(table.lines()))
    else:
        click.echo(empty)


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document; the schema comes first."""
    click.echo(json.dumps({"schema": SCHEMA, **document}, indent=2, ensure_ascii=False))


def print_json_line(row: object) -> None:
    """Print one row as a line of JSON."""
    click.echo(json.dumps(row, separators=(",", ":"), ensure_ascii=False))


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(f"warning: {text}", err=True)


class Progress:
    """A line on stderr that says what takes long; silent when stderr is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()

    def say(self, text: str) -> None:
        """Replace the line by another."""
        if self._on:
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
            self._shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._shown = False
