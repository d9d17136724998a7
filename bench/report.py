# SPDX-License-Identifier: Apache-2.0
"""What measurements print: rows with their spread, the machine they were made on, table or JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final

from vgw import __version__
from vgw.cli_output import Table
from vgw.errors import VgwError

SCHEMA: Final = "vgw-bench/v1"
Fact = str | int | float
#: Members of a row in a document that are not among its facts.
_NO_FACTS: Final = frozenset(
    {"part", "what", "unit", "median", "min", "max", "samples", "ratios", "note"}
)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a part, with all its samples in `unit`; no samples when `note` says why.

    `facts` are the conditions that tell rows of a part apart. `ratios` are by what the figure was
    divided -> the median of the quotients of samples taken in the same round.
    """

    part: str
    what: str
    unit: str
    samples: tuple[float, ...]
    facts: Mapping[str, Fact] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def ratio(samples: Sequence[float], base: Sequence[float]) -> float | None:
    """Return the median quotient of samples taken in pairs; None without pairs."""
    quotients = [one / other for one, other in zip(samples, base, strict=False) if other]
    return statistics.median(quotients) if quotients else None


def machine(vgw: str | None = None) -> dict[str, Fact]:
    """Return what figures depend on: the kernel, the processor and the versions of all sides.

    `vgw` is the command that is measured, None for this installation's.
    """
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        # Work of others during the measurement shows here.
        "load_1min": round(os.getloadavg()[0], 2),
        "vgw": _first_line(vgw, "--version") if vgw else f"{__version__}, {_commit()}",
        "python": platform.python_version(),
        "bcc": _first_line("dpkg-query", "-W", "-f", "${Version}", "python3-bpfcc"),
        "nft": _first_line("nft", "--version"),
        "gcc": _first_line("gcc", "-dumpfullversion"),
    }


def to_json(rows: Sequence[Row], facts: Mapping[str, Fact]) -> str:
    """Return rows and machine as one JSON document."""
    document = {"schema": SCHEMA, "machine": facts, "rows": [_json_row(row) for row in rows]}
    return json.dumps(document, indent=2, ensure_ascii=False)


def to_table(rows: Sequence[Row], facts: Mapping[str, Fact]) -> str:
    """Return the machine and a table for each part, for people."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    for part, members in groupby(rows, lambda row: row.part):
        lines += ["", part, *_part_table(list(members))]
    return "\n".join(lines)


def _part_table(rows: Sequence[Row]) -> list[str]:
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    ratios = list(dict.fromkeys(name for row in rows for name in row.ratios))
    figures = ("MEDIAN", "MIN", "MAX", "SAMPLES")
    quotients = [f"/ {name.upper()}" for name in ratios]
    headers = ["WHAT", *map(str.upper, facts), *figures, "UNIT", *quotients]
    noted = any(row.note for row in rows)
    table = Table(
        *headers, *(["NOTE"] if noted else []), right=(*map(str.upper, facts), *figures, *quotients)
    )
    for row in rows:
        table.add(
            row.what,
            *(row.facts.get(name) for name in facts),
            *_figures(row.samples),
            row.unit,
            *(None if name not in row.ratios else f"{row.ratios[name]:.3f}" for name in ratios),
            *([row.note] if noted else []),
        )
    return table.lines()


def _figures(samples: Sequence[float]) -> Iterator[str | None]:
    values = (
        (statistics.median(samples), min(samples), max(samples)) if samples else (None, None, None)
    )
    for value in values:
        yield None if value is None else figure(value)
    yield str(len(samples))


def figure(value: float) -> str:
    """Return a figure as people read it: with four digits, or all that are before the point."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def from_json(text: str) -> tuple[list[Row], dict[str, Fact]]:
    """Return the rows and the machine of such a document; raises VgwError for another one."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise VgwError(f"the document is no {SCHEMA} but {document['schema']}")
        rows = [
            Row(
                row["part"],
                row["what"],
                row["unit"],
                tuple(row["samples"]),
                {name: value for name, value in row.items() if name not in _NO_FACTS},
                row["ratios"],
                row["note"],
            )
            for row in document["rows"]
        ]
        return rows, document["machine"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VgwError(f"not a document of a measurement: {error!r}") from error


def _json_row(row: Row) -> dict[str, object]:
    samples = row.samples
    return {
        "part": row.part,
        "what": row.what,
        **row.facts,
        "unit": row.unit,
        "median": statistics.median(samples) if samples else None,
        "min": min(samples, default=None),
        "max": max(samples, default=None),
        "samples": list(samples),
        "ratios": dict(row.ratios),
        "note": row.note,
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str:
    root = Path(__file__).parents[1]
    return _first_line("git", "-C", str(root), "describe", "--always", "--dirty")


def _first_line(*command: str) -> str:
    """Return the first line that a command prints; `-` without it."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return run.stdout.strip().partition("\n")[0] or "-"
