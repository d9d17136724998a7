# SPDX-License-Identifier: Apache-2.0
"""Rates of `vgw top`: the difference of two samples of counters, for each VM, as plain values.

Bits are those of whole frames. A VM or interface that one sample lacks has no rates yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

Row = dict[str, Any]
Sample = Mapping[str, Any]

DIRECTIONS: Final = ("ingress", "egress")
OUTCOMES: Final = ("accepted", "dropped", "would_drop")
_SECOND_NS: Final = 1_000_000_000
#: Columns by which VMs can be sorted, in the order of the screen.
SORTS: Final = ("vm", "in", "out", "drop", "connections")


def seconds_between(old: Sample, new: Sample) -> float:
    """Return the time from one sample to the next, never 0."""
    return max(int(new["at_ns"]) - int(old["at_ns"]), 1) / _SECOND_NS


def vm_rates(old: Sample | None, new: Sample) -> list[Row]:
    """Return a row for each VM of the new sample; rates are null without an old one of it.

    {"vm", "mode", "generation", "attached", "alarms", "connections", "connections_max", "rates":
    {direction: {outcome: {"packets", "bits"}}}, "reasons": [{"direction", "reason", "packets"}],
    "interfaces": [the same of each]}, everything a second.
    """
    seconds = 1.0 if old is None else seconds_between(old, new)
    before = {} if old is None else {row["vm"]: row for row in old["vms"]}
    alarms: dict[str | None, list[str]] = {}
    for alarm in new.get("alarms", ()):
        alarms.setdefault(alarm["vm"], []).append(alarm["alarm"])
    return [
        _vm(row, before.get(row["vm"]), seconds, alarms.get(row["vm"], [])) for row in new["vms"]
    ]


def _vm(row: Sample, old: Sample | None, seconds: float, alarms: list[str]) -> Row:
    before = {} if old is None else {each["name"]: each for each in old["interfaces"]}
    interfaces = [_interface(each, before.get(each["name"]), seconds) for each in row["interfaces"]]
    return {
        "vm": row["vm"],
        "mode": row["mode"],
        "generation": row["generation"],
        "attached": all(each["attached"] for each in interfaces),
        "alarms": alarms,
        "connections": sum(each["connections"] for each in interfaces),
        "connections_max": sum(each["connections_max"] for each in interfaces),
        "rates": _sum_of_rates([each["rates"] for each in interfaces]),
        "reasons": merged_reasons(interfaces),
        "interfaces": interfaces,
    }


def _interface(row: Sample, old: Sample | None, seconds: float) -> Row:
    kept = ("name", "attached", "hook", "connections", "connections_max", "half_open")
    found: Row = {name: row[name] for name in kept}
    found["rates"] = None
    found["reasons"] = []
    if old is None:
        return found
    found["rates"] = {
        direction: {
            outcome: _rate(
                row["counters"][direction][outcome], old["counters"][direction][outcome], seconds
            )
            for outcome in OUTCOMES
        }
        for direction in DIRECTIONS
    }
    found["reasons"] = sorted(_reasons(row, old, seconds), key=lambda each: -each["packets"])
    return found


def _rate(new: Sequence[int], old: Sequence[int], seconds: float) -> dict[str, float]:
    """Return packets and bits a second; an endpoint that was made anew counts from 0 again."""
    packets, octets = (max(now - then, 0) / seconds for now, then in zip(new, old, strict=True))
    return {"packets": packets, "bits": 8 * octets}


def _reasons(row: Sample, old: Sample, seconds: float) -> Iterator[Row]:
    for direction in DIRECTIONS:
        for reason, count in row["reasons"][direction].items():
            packets = (count - old["reasons"][direction].get(reason, 0)) / seconds
            if packets > 0:
                yield {"direction": direction, "reason": reason, "packets": packets}


def _sum_of_rates(rates: Sequence[Mapping[str, Any] | None]) -> Row | None:
    """Return the sum over interfaces; null while none has rates."""
    known = [each for each in rates if each is not None]
    if not known:
        return None
    return {
        direction: {
            outcome: {
                unit: sum(each[direction][outcome][unit] for each in known)
                for unit in ("packets", "bits")
            }
            for outcome in OUTCOMES
        }
        for direction in DIRECTIONS
    }


def total_rates(vms: Sequence[Sample]) -> Row | None:
    """Return the rates of all VMs together."""
    return _sum_of_rates([row["rates"] for row in vms])


def merged_reasons(rows: Sequence[Sample]) -> list[Row]:
    """Return the reasons of several VMs or interfaces together, the most frequent first."""
    sums: dict[tuple[str, str], float] = {}
    for row in rows:
        for each in row["reasons"]:
            key = each["direction"], each["reason"]
            sums[key] = sums.get(key, 0.0) + each["packets"]
    return [
        {"direction": direction, "reason": reason, "packets": packets}
        for (direction, reason), packets in sorted(sums.items(), key=lambda item: -item[1])
    ]


def talker_rates(old: Sample | None, new: Sample) -> list[Row]:
    """Return addresses with bits a second in both directions, null without an old look at them.

    {"address", "connections", "bits": {direction: rate}}; who has more comes first.
    """
    before = {} if old is None else {row["address"]: row["bytes"] for row in old["talkers"]}
    seconds = 1.0 if old is None else seconds_between(old, new)
    rows = []
    for row in new["talkers"]:
        then = before.get(row["address"], None if old is None else dict.fromkeys(DIRECTIONS, 0))
        bits = (
            None
            if then is None
            else {
                each: 8 * max(row["bytes"][each] - then[each], 0) / seconds for each in DIRECTIONS
            }
        )
        rows.append({"address": row["address"], "connections": row["connections"], "bits": bits})
    return sorted(rows, key=lambda row: -(bits_of(row["bits"]) or 0.0))


def bits_of(bits: Mapping[str, float] | None) -> float | None:
    """Return the sum of both directions, None when it is not known yet."""
    return None if bits is None else sum(bits.values())


def rule_rates(old: Sample | None, new: Sample, seconds: float) -> list[Row]:
    """Return the rules that have decided something, those of now first.

    `old` and `new` are answers of `rules`: {"direction", "policy", "rule", "packets", "rate"}.
    """
    before = {} if old is None else {_rule_key(row): row["packets"] for row in old["rules"]}
    rows = [
        {
            **{name: row[name] for name in ("direction", "policy", "rule", "action", "packets")},
            "rate": None
            if old is None
            else max(row["packets"] - before.get(_rule_key(row), 0), 0) / seconds,
        }
        for row in new["rules"]
        if row["packets"]
    ]
    return sorted(rows, key=lambda row: (-(row["rate"] or 0), -row["packets"]))


def _rule_key(row: Sample) -> tuple[str, str, str]:
    return row["direction"], row["policy"], row["rule"]


def in_order(vms: Sequence[Row], sort: str, *, reverse: bool) -> list[Row]:
    """Return VMs sorted by a column of SORTS: names from a on, numbers from the greatest on."""
    if sort == "vm":
        return sorted(vms, key=lambda row: row["vm"], reverse=reverse)
    by_name = sorted(vms, key=lambda row: row["vm"])
    return sorted(by_name, key=lambda row: _number(row, sort), reverse=not reverse)


def _number(row: Row, sort: str) -> float:
    if sort == "connections":
        return float(row["connections"])
    rates = row["rates"]
    if rates is None:
        return 0.0
    if sort == "drop":
        return float(sum(rates[each]["dropped"]["packets"] for each in DIRECTIONS))
    return float(passed(rates, "ingress" if sort == "in" else "egress")["bits"])


def passed(rates: Mapping[str, Any], direction: str) -> dict[str, float]:
    """Return what passed in a direction: accepted, or in monitor mode what would be dropped."""
    both = rates[direction]["accepted"], rates[direction]["would_drop"]
    return {unit: sum(each[unit] for each in both) for unit in ("packets", "bits")}


def columns(rates: Mapping[str, Any] | None) -> list[float | None]:
    """Return what passed in, passed out and was dropped, each in packets and bits."""
    if rates is None:
        return [None] * 6
    parts = (*(passed(rates, each) for each in DIRECTIONS), stopped(rates))
    return [part[unit] for part in parts for unit in ("packets", "bits")]


def stopped(rates: Mapping[str, Any]) -> dict[str, float]:
    """Return what was dropped in both directions."""
    both = [rates[direction]["dropped"] for direction in DIRECTIONS]
    return {unit: sum(each[unit] for each in both) for unit in ("packets", "bits")}
