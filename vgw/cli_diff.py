# SPDX-License-Identifier: Apache-2.0
"""What applying a policy would change, as lines for people: `+` comes, `-` goes, `~` differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from vgw.cli_text import counted

Row = Mapping[str, Any]

_VERBS = {"added": "added", "removed": "removed", "modified": "changed", "moved": "moved"}


def print_plan(answer: Row) -> None:
    """Print the plan of vgw.controller.diff: a line for each VM, and those of its changes below."""
    for row in answer["vms"]:
        click.echo(f"{row['vm']}: {_summary(row)}")
        for line in _lines(row):
            click.echo(f"  {line}")
    for vm, text in answer["failures"].items():
        click.echo(f"{vm}: would FAIL: {text}")


def _summary(row: Row) -> str:
    if row["kept"]:
        return "not in this policy; it keeps what it has"
    if not row["changed"]:
        return "nothing would change"
    if row["counts"] is None:
        return "would change; which rules is not known, as those in force are not remembered"
    parts = [
        f"{counted(row['counts'][kind], 'rule')} {verb}"
        for kind, verb in _VERBS.items()
        if row["counts"][kind]
    ]
    parts += [f"other {name}" for name in ("defaults", "settings", "interfaces") if row[name]]
    return ", ".join(parts) or "programs or tables are made anew"


def _lines(row: Row) -> Iterator[str]:
    """Yield the changes of a VM, indented ones belong to the one above."""
    for name, change in {**row["settings"], **(row["defaults"] or {})}.items():
        what = name if name in row["settings"] else f"default {name}"
        yield f"~ {what}: {_values(change)}"
    for name, change in row["interfaces"].items():
        if isinstance(change, str):
            yield f"{'+' if change == 'added' else '-'} interface {name}"
            continue
        for field, values in change.items():
            yield f"~ interface {name}: {field}: {_values(values)}"
    for group in row["groups"] or ():
        yield f"~ group {group['group']}: {_set_change(group)}"
    yield from _rule_lines(row)


def _rule_lines(row: Row) -> Iterator[str]:
    for mark, kind in (("-", "removed"), ("+", "added")):
        for rule in row[kind] or ():
            yield f"{mark} {rule['place']:>5} {rule['rule']}: {_rule(rule)}"
    for rule in row["modified"] or ():
        yield f"~       {rule['rule']}"
        for field, change in rule["fields"].items():
            text = _values(change) if "old" in change else _set_change(change)
            yield f"          {field}: {text}"
    for rule in row["moved"] or ():
        yield f"~ {rule['old']:>5} {rule['rule']}: moved to {rule['new']}"
    if row["omitted"]:
        yield f"... and {row['omitted']} more; --limit shows more of them"


def _rule(rule: Row) -> str:
    parts = [rule["action"] + (" +log" if rule["log"] else "")]
    for name in ("peers", "local", "services", "source_ports"):
        listed = rule[name]
        if listed["first"] not in ([], ["any"], ["0.0.0.0/0", "::/0"]):
            parts.append(f"{name} {_listed(listed)}")
    return ", ".join(parts)


def _values(change: Row) -> str:
    return f"{_value(change['old'])} -> {_value(change['new'])}"


def _value(value: object) -> str:
    """Return a value that differs; of a mapping only what is not empty."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _set_change(change: Row) -> str:
    parts = [
        f"{mark}{_listed(change[kind])}"
        for mark, kind in (("+", "added"), ("-", "removed"))
        if change[kind]["count"]
    ]
    return "  ".join(parts) or "in another order"


def _listed(listed: Row) -> str:
    rest = listed["count"] - len(listed["first"])
    return "[" + ", ".join(listed["first"]) + (f" and {rest} more]" if rest else "]")
