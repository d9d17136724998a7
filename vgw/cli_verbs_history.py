# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs about policies that were applied: history, confirm and rollback."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vgw.cli_options import Session, example, output_option, pass_session
from vgw.cli_output import Output, Progress, Table, print_json, print_json_line, print_rows
from vgw.cli_text import counted
from vgw.cli_verbs_protect import NOTHING_TO_CHANGE, attempt, print_results
from vgw.errors import VgwError

if TYPE_CHECKING:
    from vgw.controller.history import Entry, History


@click.command(epilog=example("vgw history show 7"))
@click.argument("what", required=False, metavar="[show N]", type=click.Choice(["show"]))
@click.argument("number", required=False, metavar="", type=click.IntRange(min=1))
@click.option(
    "--diff",
    nargs=2,
    type=click.IntRange(min=1),
    metavar="N M",
    help="Show how the texts of two policies differ.",
)
@output_option
@pass_session
def history(
    session: Session,
    what: str | None,
    number: int | None,
    diff: tuple[int, int] | None,
    output: Output,
) -> None:
    """List the policies that were applied, or show one.

    Each has a number, when it was applied, by whom and from where, and what became of the VMs.
    """
    from vgw.controller.history import History

    if (what is None) != (number is None) or (diff and what):
        raise click.UsageError("give nothing, `show N`, or --diff N M")
    known = History(session.paths())
    if os.geteuid() != 0 and known.numbers():
        raise VgwError("the history is root's alone; run vgw as root")
    if diff:
        _print_diff(known, diff, output)
    elif number is not None:
        _print_sources(known, number, output)
    else:
        _print_list(known, output)


def _print_list(known: History, output: Output) -> None:
    entries = known.entries()
    current = known.current()
    table = Table("", "N", "TIME", "EVENT", "WHO", "FROM", "VMS", "NOTE", right=("N",))
    for entry in entries:
        mark = "*" if current is not None and entry.number == current.number else ""
        source = entry.names[0] if len(entry.names) == 1 else counted(len(entry.names), "file")
        who = f"{entry.who.text()} ({entry.who.via})"
        table.add(
            *(mark, entry.number, entry.time, entry.event, who, source),
            *(_outcome_text(entry), _note_text(entry) or None),
        )
    damaged = sorted(set(known.numbers()).difference(entry.number for entry in entries))
    document: Mapping[str, object] = {
        "current": None if current is None else current.number,
        "policies": [_row(entry) for entry in entries],
        "damaged": damaged,
    }
    print_rows(output, document, "policies", table, empty="no policy was applied yet")
    if damaged and output is Output.TABLE:
        click.echo(f"damaged, and cannot be used: {', '.join(map(str, damaged))}")


def _row(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON."""
    return {"number": entry.number, "time": entry.time, **asdict(entry), "held": entry.is_held}


def _outcome_text(entry: Entry) -> str:
    outcome = entry.outcome
    if outcome is None:
        return "interrupted"
    parts = [f"{outcome.changed} changed"]
    parts += [f"{outcome.failed} FAILED"] if outcome.failed else []
    parts += [f"{len(outcome.kept)} kept theirs"] if outcome.kept else []
    return ", ".join(parts)


def _note_text(entry: Entry) -> str:
    parts = []
    if entry.event == "rollback":
        parts.append(f"back to {entry.back}")
    if entry.confirm is not None:
        parts.append(entry.confirm.replace("_", " "))
    if entry.revision is not None:
        parts.append(f"revision {entry.revision}")
    if entry.vms is not None:
        parts.append(f"only {', '.join(entry.vms[:3])}{' ...' if len(entry.vms) > 3 else ''}")
    return ", ".join(parts)


def _print_sources(known: History, number: int, output: Output) -> None:
    entry = known.get(number)
    files = [{"name": name, "text": text} for name, text in known.sources(entry)]
    if output is Output.JSON:
        print_json({"policy": _row(entry), "files": files})
        return
    for file in files:
        if output is Output.JSONL:
            print_json_line(file)
        else:
            click.echo(f"# {file['name']}")
            click.echo(file["text"], nl=not file["text"].endswith("\n"))


def _print_diff(known: History, numbers: tuple[int, int], output: Output) -> None:
    before, after = (dict(known.sources(known.get(number))) for number in numbers)
    lines: list[str] = []
    for name in sorted({*before, *after}):
        old, new = (texts.get(name, "").splitlines() for texts in (before, after))
        first, second = (f"{name} ({number})" for number in numbers)
        lines += difflib.unified_diff(old, new, first, second, lineterm="")
    if output is Output.TABLE:
        click.echo("\n".join(lines) if lines else "the texts are the same")
    elif output is Output.JSON:
        print_json({"policies": list(numbers), "lines": lines})
    else:
        for line in lines:
            print_json_line({"line": line})


@click.command(epilog=example("vgw confirm"))
@output_option
@pass_session
def confirm(session: Session, output: Output) -> None:
    """Keep the policy that `apply --confirm-within` applied.

    Without it the policy before comes back when the time is over.
    """
    with Progress() as progress:
        number = session.target(progress.say).confirm()
    if output is Output.TABLE:
        click.echo(f"policy {number} is confirmed")
    else:
        printed = {"policy": number, "confirm": "confirmed"}
        print_json(printed) if output is Output.JSON else print_json_line(printed)


@click.command(epilog=example("vgw rollback 7"))
@click.argument("number", required=False, metavar="[N]", type=click.IntRange(min=1))
@output_option
@pass_session
def rollback(session: Session, number: int | None, output: Output) -> None:
    """Apply an earlier policy to all attached VMs.

    `vgw history` lists them; without N it is the one before. It stays in force until the policy
    file of this host changes, or a policy is applied.
    """
    with Progress() as progress:
        progress.say("applying the earlier policy")
        target = session.target(progress.say)
        answer, failure = attempt(lambda: target.rollback(number))
    print_results(answer, output, failure, empty=NOTHING_TO_CHANGE)
    if output is Output.TABLE:
        click.echo(f"policy {answer['back']} is in force again, as number {answer['policy']}")
