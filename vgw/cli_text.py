# SPDX-License-Identifier: Apache-2.0
"""Numbers, packets and rules as words for people, as the tables of the CLI show them."""

from __future__ import annotations

from vgw.words import packet_text, rule_text, side_text

__all__ = ["ago", "counted", "packet_text", "rule_text", "side_text", "size", "span"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def size(value: int) -> str:
    """Return a number of bytes with a unit that keeps it short."""
    amount = float(value)
    for unit in _UNITS[:-1]:
        if amount < 1024:
            return f"{int(amount)} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} {_UNITS[-1]}"


def ago(seconds: float | None) -> str:
    """Return an age in seconds as words; None is `never`."""
    return "never" if seconds is None else f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """Return a duration in seconds in its largest unit."""
    for length, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s" if seconds >= 1 else f"{int(seconds * 1000)} ms"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
