# SPDX-License-Identifier: Apache-2.0
"""The quick text of a scrape is that of prometheus_client."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vgw.controller import metrics_text
from vgw.controller.metrics_text import CounterFamily, GaugeFamily, render


class Given(Collector):
    """A collector of what it is given."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> tuple[Metric, ...]:
        return self._families


def families() -> tuple[Metric, ...]:
    packets = CounterFamily("vgw_packets", 'a "help"\\\n', labels=("vm", "interface", "b"))
    packets.add_metric(("web01", "tap0", "x"), 7)
    packets.add_metric(('quoted "', "back\\slash", "new\nline"), 0)
    lost = CounterFamily("vgw_lost", "Without labels.")
    lost.add_metric((), 3)
    attached = GaugeFamily("vgw_attached", "Gauge.", labels=("vm",))
    attached.add_metric(("a",), 0.5)
    return packets, lost, attached


def test_text_is_that_of_the_library() -> None:
    registry = CollectorRegistry()
    registry.register(Given(*families()))
    assert render(families()) == generate_latest(registry)


def test_labels_that_are_written_already_get_the_values_of_now() -> None:
    for samples in ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"c": 5}, {"a": 6}):
        for labels in (("vm",), ("interface",)):
            family = GaugeFamily("vgw_seen", "Gauge.", labels=labels)
            for name, value in samples.items():
                family.add_metric((name,), value)
            registry = CollectorRegistry()
            registry.register(Given(family))
            assert render((family,)) == generate_latest(registry)
        assert {*metrics_text._written['vgw_seen{vm="%s"} ']} == {(name,) for name in samples}


def test_families_of_other_kinds_are_in_it() -> None:
    other = GaugeMetricFamily("vgw_other", "Of the library.", value=4)
    text = render((*families(), other)).decode()
    assert text.endswith("# TYPE vgw_other gauge\nvgw_other 4.0\n")


@pytest.mark.parametrize("values", [(), ("web01",), ("web01", "tap0", "x", "y")])
def test_a_sample_with_other_labels_is_noticed_by_the_library(values: tuple[str, ...]) -> None:
    packets = CounterFamily("vgw_packets", "help", labels=("vm", "interface", "b"))
    packets.add_metric(values, 1)
    with pytest.raises((ValueError, IndexError)):
        render((packets,)) and packets.samples
