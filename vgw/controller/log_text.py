# SPDX-License-Identifier: Apache-2.0
"""Log records as a line of text for people, whatever the names and bytes in them.

One record is one line of printable characters: what would begin another one, or tell a terminal
something, is shown as an escape. A backslash is doubled, so that nothing looks like an escape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vgw.words import packet_text, rule_text

Record = Mapping[str, Any]

#: Characters of one text that are kept; the longest names and addresses have far less.
LONGEST_TEXT: Final = 8192
_CUT: Final = "..."
_NOT_LISTED: Final = frozenset({"ts", "vm", "interface", "event"})


def escaped(value: object) -> str:
    """Return a value as printable text without line ends, cut where it is too long."""
    text = cut(str(value))
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape, text))


def cut(text: str) -> str:
    """Return a text, or the beginning of one that is longer than LONGEST_TEXT."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - len(_CUT)] + _CUT


def _escape(char: str) -> str:
    if char != "\\" and char.isprintable():
        return char
    return char.encode("unicode_escape").decode()


def record_text(record: Record) -> str:
    """Return a log record as a line: who, what and why, which packet or connection.

    The time is not in it. Whatever the record holds, this raises nothing.
    """
    try:
        parts = list(_parts(record))
    except (KeyError, TypeError, AttributeError):  # a line of the file that we did not write
        parts = [f"{key}={value}" for key, value in record.items()]
    return "  ".join(escaped(part) for part in parts if part)


def _parts(record: Record) -> list[object]:
    where = "/".join(str(record[key]) for key in ("vm", "interface") if key in record)
    event = str(record.get("event", "-"))
    if "verdict" not in record:
        rest = (f"{key}={value}" for key, value in record.items() if key not in _NOT_LISTED)
        return [where, event, *rest]
    parts = [where, record["direction"], record["verdict"], record["reason"], rule_text(record)]
    if event.startswith("flow_"):
        parts = [where, event, record["direction"], rule_text(record)]
    parts.append(packet_text(record))
    if "ended" in record:
        parts.append(
            f"{record['ended']} after {record['duration_ms']} ms, {record['packets']} packets, "
            f"{record['bytes']} bytes"
        )
    return parts
