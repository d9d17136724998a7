# SPDX-License-Identifier: Apache-2.0
"""The pictures of `vgw top`: all VMs, or one of them, as lines that fit a terminal of any size.

Only ASCII is drawn, for terminals that know no more; what is wrong stands out by a word, and by
colour besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rich.text import Text

from vgw.cli_top_looks import Look
from vgw.cli_top_rates import (
    DIRECTIONS,
    OUTCOMES,
    SORTS,
    Row,
    bits_of,
    columns,
    in_order,
    merged_reasons,
    passed,
    stopped,
    total_rates,
)

_HEAD: Final = "reverse"
_BAD: Final = "bold red"
_NAME: Final = 14
_WIDE_NAME: Final = 30
#: Headers of the numbers of a VM, and the column of SORTS that they belong to.
_NUMBERS: Final = (
    ("IN/s", None),
    ("INbit", "in"),
    ("OUT/s", None),
    ("OUTbit", "out"),
    ("DROP/s", "drop"),
    ("DROPbit", None),
)
_WORDS: Final = {"ingress": "in", "egress": "out"}
_SIDES: Final = {"ingress": "toward VM", "egress": "from VM"}
_KEYS: Final = "up/down select  enter open  s sort  r reverse  q quit"
_VM_KEYS: Final = "esc back  q quit"


@dataclass(frozen=True)
class State:
    """What the user has chosen: a sort of SORTS, a selected VM, whether it is opened."""

    sort: str = "in"
    reverse: bool = False
    selected: str | None = None
    opened: bool = False

    def pressed(self, key: str, look: Look) -> State:
        """Return the state after a key of the terminal."""
        names = [row["vm"] for row in self.rows(look)]
        if key in ("back", "left") and self.opened:
            return replace(self, opened=False)
        if key in ("enter", "right") and names:
            return replace(self, selected=self.focus(look), opened=True)
        if self.opened:
            return self
        if key == "s":
            following = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
            return replace(self, sort=following, reverse=False)
        if key == "r":
            return replace(self, reverse=not self.reverse)
        return self._moved(key, names, look)

    def _moved(self, key: str, names: Sequence[str], look: Look) -> State:
        steps = {"up": -1, "down": 1, "page up": -10, "page down": 10}
        steps |= {"home": -len(names), "end": len(names)}
        focus = self.focus(look)
        if key not in steps or focus is None:
            return self
        place = min(max(names.index(focus) + steps[key], 0), len(names) - 1)
        return replace(self, selected=names[place])

    def rows(self, look: Look) -> list[Row]:
        """Return the VMs in the order that was chosen."""
        return in_order(look.vms, self.sort, reverse=self.reverse)

    def focus(self, look: Look) -> str | None:
        """Return the VM that the user has selected, the first one when it is not there."""
        names = [row["vm"] for row in self.rows(look)]
        if self.selected in names:
            return self.selected
        return names[0] if names else None


def short(value: float | None) -> str:
    """Return a number in at most six characters, with k, M, G or T; a dash for none."""
    if value is None:
        return "-"
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if unit == "" or value >= 99.5 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def printable(text: str, width: int) -> str:
    """Return a text of exactly this width in which nothing commands the terminal."""
    safe = "".join(char if " " <= char <= "~" else "?" for char in text)
    return safe.ljust(width) if len(safe) <= width else f"{safe[: width - 1]}~"


def picture(look: Look, state: State, width: int, height: int) -> Text:
    """Return what the terminal shows: `height` lines of `width` columns."""
    row = next((row for row in look.vms if row["vm"] == state.focus(look)), None)
    one = state.opened and row is not None
    body = list(_vm_lines(row, look, width, height - 2)) if one and row else None
    if body is None:
        body = _list_lines(look, state, width, height - 2)
    error = Text(printable(f"! {look.error}", width), _BAD) if look.error else Text("")
    body = body[: max(height - 2, 0)]
    body += [Text("")] * (height - 2 - len(body))
    keys = Text(printable(_VM_KEYS if one else _KEYS, width), "dim")
    lines = [*body, error, keys][-height:]
    for line in lines:
        line.truncate(width, pad=True)  # over what was there
    return Text("\n", end="").join(lines)


# --- all VMs ------------------------------------------------------------------------------------


def _list_lines(look: Look, state: State, width: int, height: int) -> list[Text]:
    rows, focus = state.rows(look), state.focus(look)
    names = [row["vm"] for row in rows]
    room = max(height - 4, 1)
    first = 0
    if focus is not None:
        first = min(max(names.index(focus) - room // 2, 0), max(len(rows) - room, 0))
    name = _WIDE_NAME if width >= 80 + _WIDE_NAME - _NAME else _NAME
    lines = [Text(printable(_summary(rows, look), width), "bold"), _header(state, name, width)]
    lines += [
        _vm_line(row, name, width, selected=row["vm"] == focus)
        for row in rows[first : first + room]
    ]
    lines += [Text("")] * (2 + room - len(lines))
    reasons = merged_reasons(rows)[:4]
    lines.append(Text(printable(f"drops    {_reasons_text(reasons)}", width)))
    lines.append(Text(printable(_talkers_text(look, focus), width)))
    return lines


def _summary(rows: Sequence[Row], look: Look) -> str:
    rates = total_rates(rows)
    many = f"vgw top  {len(rows)} VM{'' if len(rows) == 1 else 's'}"
    if rates is None:
        return f"{many}  {'measuring' if look.number else 'reading'} ..."
    parts = [
        f"{_WORDS[each]} {short(passed(rates, each)['packets'])}/s "
        f"{short(passed(rates, each)['bits'])}bit/s"
        for each in DIRECTIONS
    ]
    parts.append(f"dropped {short(stopped(rates)['packets'])}/s")
    parts.append(f"conn {short(sum(row['connections'] for row in rows))}")
    return "  ".join([many, *parts])


def _header(state: State, name: int, width: int) -> Text:
    def mark(sort: str | None) -> str:
        if sort != state.sort:
            return ""
        return "v" if (sort == "vm") == state.reverse else "^"

    cells = [("VM" + mark("vm")).ljust(name), "MODE".ljust(10)]
    cells += [(text + mark(sort)).rjust(7) for text, sort in _NUMBERS]
    cells.append(("CONN" + mark("connections")).rjust(6))
    return Text(" ".join(cells).ljust(width), _HEAD)


def _vm_line(row: Row, name: int, width: int, *, selected: bool) -> Text:
    trouble = _trouble(row)
    cells = [printable(row["vm"], name), printable(trouble or row["mode"] or "-", 10)]
    cells += [short(number).rjust(7) for number in columns(row["rates"])]
    cells.append(short(row["connections"]).rjust(6))
    line = Text(" ".join(cells).ljust(width))
    if trouble:
        line.stylize(_BAD, name + 1, name + 11)
    if selected:
        line.stylize("bold reverse" if not trouble else "reverse")
    return line


def _trouble(row: Row) -> str | None:
    """Return in ten characters what is wrong with a VM."""
    if not row["attached"]:
        return "UNPROTECTD"
    return f"!{row['alarms'][0]}" if row["alarms"] else None


def _reasons_text(reasons: Sequence[Row]) -> str:
    texts = (
        f"{each['reason']} {_WORDS[each['direction']]} {short(each['packets'])}/s"
        for each in reasons
    )
    return ", ".join(texts) or "none"


def _talkers_text(look: Look, focus: str | None) -> str:
    if focus is None or look.focus != focus:
        return "talkers"
    texts = (f"{each['address']} {short(bits_of(each['bits']))}bit/s" for each in look.talkers[:3])
    return f"talkers  {focus}: {', '.join(texts) or 'none'}"


# --- one VM -------------------------------------------------------------------------------------


def _vm_lines(row: Row, look: Look, width: int, height: int) -> Iterator[Text]:
    trouble = _trouble(row)
    words = [row["vm"], row["mode"] or "-", f"generation {row['generation']}"]
    words.append(f"connections {row['connections']}/{row['connections_max']}")
    words += ["UNPROTECTED"] if not row["attached"] else []
    words += [f"alarm {name}" for name in row["alarms"]]
    yield Text(printable("  ".join(words), width), _BAD if trouble else "bold")
    yield _columns(
        ("INTERFACE", "HOOK", "CONN", "HALF", "IN/s", "OUT/s", "DROP/s"), width, head=True
    )
    interfaces = row["interfaces"][:4]
    for each in interfaces:
        yield _columns(_interface_cells(each), width, bad=not each["attached"])
    yield Text("")
    titles = ("", "ACCEPT/s", "bit/s", "DROP/s", "bit/s", "WOULD/s", "bit/s")
    yield _columns(titles, width, head=True)
    for direction in DIRECTIONS:
        yield _columns((_SIDES[direction], *_outcomes(row["rates"], direction)), width)
    yield Text("")
    yield from _side_by_side(row, look, width, height - 7 - len(interfaces))


def _interface_cells(each: Row) -> tuple[str, ...]:
    return (
        each["name"],
        each["hook"] if each["attached"] else "NONE",
        short(each["connections"]),
        short(each["half_open"]),
        *map(short, columns(each["rates"])[::2]),
    )


def _outcomes(rates: Mapping[str, Any] | None, direction: str) -> Iterator[str]:
    for outcome in OUTCOMES:
        for unit in ("packets", "bits"):
            yield short(None if rates is None else rates[direction][outcome][unit])


def _columns(cells: Sequence[str], width: int, *, head: bool = False, bad: bool = False) -> Text:
    """Return a wide first cell and numbers at the right of columns of nine."""
    name = max(width - 10 * (len(cells) - 1), 16)
    texts = [printable(cells[0], name), *(cell.rjust(9) for cell in cells[1:])]
    return Text(" ".join(texts).ljust(width), _HEAD if head else _BAD if bad else "")


def _side_by_side(row: Row, look: Look, width: int, room: int) -> Iterator[Text]:
    """Yield reasons above rules at the left, and talkers at the right."""
    left_width = width // 2
    right_width = width - left_width - 1
    half = max((room - 2) // 2, 1)
    reasons = [
        _pair(f"{_WORDS[each['direction']]} {each['reason']}", f"{short(each['packets'])}/s")
        for each in row["reasons"][:half]
    ]
    known = look.focus == row["vm"]
    rules = [
        _pair(
            f"{_WORDS[each['direction']]} {each['policy']}/{each['rule']}",
            f"{short(each['rate'])}/s {short(each['packets'])}",
        )
        for each in (look.rules if known else [])
    ]
    talkers = [
        _pair(each["address"], f"{short(bits_of(each['bits']))}bit/s {each['connections']}")
        for each in (look.talkers if known else [])
    ]
    left = [("DROPPED FOR", "rate", True), *(reasons or [_pair("nothing", "")])]
    left += [("RULE", "rate packets", True), *(rules or [_pair("none was hit", "")])]
    more = "" if look.complete else ", of some"
    right = [(f"TALKER{more}", "rate connections", True), *(talkers or [_pair("nobody", "")])]
    for number in range(min(max(len(left), len(right)), max(room, 0))):
        line = Text()
        for part, part_width in ((left, left_width), (right, right_width)):
            line.append_text(_cell(part[number] if number < len(part) else None, part_width))
            line.append(" ")
        yield line


def _pair(name: str, value: str) -> tuple[str, str, bool]:
    return name, value, False


def _cell(pair: tuple[str, str, bool] | None, width: int) -> Text:
    if pair is None:
        return Text(" " * width)
    name, value, head = pair
    text = printable(name, width - len(value) - 1) + " " + value
    return Text(text, _HEAD if head else "")
