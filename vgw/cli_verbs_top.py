# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verb keep the start of the command fast
"""The verb `top`: a live screen of what VMs send and get, or one sample of it."""

from __future__ import annotations

import sys
from typing import Any

import click

from vgw.cli_options import Session, example, output_option, pass_session
from vgw.cli_output import Output, Table, print_rows


@click.command(epilog=example("vgw top --once -o json"))
@click.option("--vm", metavar="NAME", help="Begin with this VM opened, or only sample it.")
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between samples, over which rates are taken.",
)
@click.option("--once", is_flag=True, help="Print the rates of one interval and end.")
@output_option
@pass_session
def top(session: Session, vm: str | None, interval: float, once: bool, output: Output) -> None:
    """Show the rates of accepted and dropped packets, live.

    Keys: up and down select a VM, enter opens it, esc goes back, s and r sort, q ends. Without a
    terminal it prints one sample, as with --once.
    """
    from vgw.cli_top_looks import Looker
    from vgw.errors import VgwError

    looker = Looker(session.target)
    if not once and output is Output.TABLE and sys.stdin.isatty() and sys.stdout.isatty():
        from vgw.cli_top_terminal import show
        from vgw.cli_top_view import State

        show(looker, interval, State(selected=vm, opened=vm is not None))
        return
    look, seconds = looker.over(interval, vm)
    rows = [row for row in look.vms if vm in (None, row["vm"])]
    if vm is not None and not rows:
        raise VgwError(f"VM {vm} is not attached; attach it by `vgw attach --vm {vm}`")
    if vm is not None:
        rows[0] |= {"talkers": look.talkers, "talkers_complete": look.complete, "rules": look.rules}
    document = {"seconds": round(seconds, 3), "vms": rows}
    print_rows(output, document, "vms", _table(rows), empty="no VM is attached")


def _table(rows: list[dict[str, Any]]) -> Table:
    from vgw.cli_top_rates import columns
    from vgw.cli_top_view import short

    numbers = ("IN/s", "IN bit/s", "OUT/s", "OUT bit/s", "DROP/s", "DROP bit/s", "CONN")
    table = Table("VM", "MODE", *numbers, "MOST DROPPED FOR", right=numbers)
    for row in rows:
        most = row["reasons"][0] if row["reasons"] else None
        table.add(
            row["vm"],
            row["mode"] if row["attached"] else "UNPROTECTED",
            *map(short, columns(row["rates"])),
            row["connections"],
            None if most is None else f"{most['reason']} ({most['direction']})",
        )
    return table
