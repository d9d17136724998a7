# SPDX-License-Identifier: Apache-2.0
"""The text of a scrape, made quickly: a host with 1,000 endpoints has some 20,000 samples.

prometheus_client makes an object with a dictionary of each sample, and formats its labels anew.
The families here keep values as they come and write the labels of a series once, for as long as it
is there. They are prometheus_client's families too: registries and its own formatters can be given
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.samples import Sample


class _Written(dict[tuple[str, ...], str]):
    """The series of a metric, written, by the values of their labels."""

    def __init__(self, series: str, order: Sequence[int]) -> None:
        """Write by a format, which has the labels in this order."""
        super().__init__()
        self._series = series
        self._order = order

    def __missing__(self, values: tuple[str, ...]) -> str:
        text = self[values] = self._series % tuple(_escaped(values[at]) for at in self._order)
        return text

    def keep_only(self, those: Iterable[tuple[str, ...]]) -> None:
        """Forget all others."""
        for values in self.keys() - set(those):
            del self[values]


#: By the format of a metric's series: those of its last text.
_written: dict[str, _Written] = {}

#: What `render` makes: the text format that every Prometheus reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Family(Metric):
    """A metric whose samples differ by their labels."""

    suffix = ""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        """Name a metric; `labels` are the names of its labels."""
        super().__init__(name, documentation, self.kind)
        self._labels = tuple(labels)
        self._rows: list[tuple[tuple[str, ...], float]] = []

    kind = "unknown"

    def add_metric(self, values: Sequence[str], value: float) -> None:
        """Add a sample: the values of the labels, in their order, and the sample's own."""
        self._rows.append((tuple(values), value))

    def text(self) -> str:
        """Return the family in the text format."""
        name = f"{self.name}{self.suffix}"
        order = sorted(range(len(self._labels)), key=self._labels.__getitem__)
        labels = ",".join(f'{self._labels[place]}="%s"' for place in order)
        series = f"{name}{{{labels}}} " if labels else f"{name} "
        written = _written.setdefault(series, _Written(series, order))
        head = f"# HELP {name} {_one_line(self.documentation)}\n# TYPE {name} {self.kind}"
        lines = [f"{written[values]}{float(value)!r}" for values, value in self._rows]
        if len(written) > len(lines):  # some of the last text are not in this one
            written.keep_only(values for values, _ in self._rows)
        return "\n".join((head, *lines))

    @property
    def samples(self) -> list[Sample]:
        """The samples as prometheus_client wants them."""
        name = f"{self.name}{self.suffix}"
        return [
            Sample(name, dict(zip(self._labels, values, strict=True)), value)
            for values, value in self._rows
        ]

    @samples.setter
    def samples(self, _: list[Sample]) -> None:
        """Metric begins with none."""


def keep(family: Metric, most: int) -> tuple[int, int]:
    """Leave at most so many samples to a family; return how many it has and how many it lost."""
    rows = family._rows if isinstance(family, _Family) else family.samples
    count = len(rows)
    del rows[most:]
    return len(rows), count - len(rows)


class CounterFamily(_Family):
    """Counters: their samples end in _total."""

    kind = "counter"
    suffix = "_total"


class GaugeFamily(_Family):
    """Gauges."""

    kind = "gauge"


class _Others:
    """What generate_latest takes for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(families: Iterable[Metric]) -> bytes:
    """Return families in the text format, those of other kinds by prometheus_client."""
    parts: list[str] = []
    others: list[Metric] = []
    for family in families:
        if isinstance(family, _Family):
            parts.append(family.text())
        else:
            others.append(family)
    rest = generate_latest(_Others(others)) if others else b""
    return "".join(f"{part}\n" for part in parts).encode() + rest


def _escaped(value: str) -> str:
    """Return the value of a label between its quotes."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _one_line(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")
