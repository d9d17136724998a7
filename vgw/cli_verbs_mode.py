# SPDX-License-Identifier: Apache-2.0
"""The verbs that switch what a VM's programs do with packets: mode, quarantine and release."""

from __future__ import annotations

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Progress, Table, print_rows


@click.command(epilog=example("vgw mode --vm web01 monitor --reason 'trying rules of ticket 12'"))
@vm_option
@click.argument("name", metavar="MODE", type=click.Choice(["enforce", "monitor", "quarantine"]))
@click.option("--reason", metavar="TEXT", default="", help="Why; `vgw status` shows it.")
@output_option
@pass_session
def mode(session: Session, vm: str, name: str, reason: str, output: Output) -> None:
    """Switch a VM between enforce, monitor and quarantine.

    enforce drops what the policy denies, monitor only counts what it would drop, quarantine drops
    everything. The order holds over policy changes and restarts. `vgw release`, or to order the
    mode that the policy gives to the VM, lifts it.
    """
    _set_mode(session, vm, name, reason, output)


@click.command(epilog=example("vgw quarantine --vm web01 --reason 'sends spam, ticket 4711'"))
@vm_option
@click.option("--reason", metavar="TEXT", required=True, help="Why; `vgw status` shows it.")
@output_option
@pass_session
def quarantine(session: Session, vm: str, reason: str, output: Output) -> None:
    """Drop every packet of a VM, at once.

    Those of open connections, too, in both directions. It holds over policy changes and restarts,
    until `vgw release`.
    """
    _set_mode(session, vm, "quarantine", reason, output)


@click.command(epilog=example("vgw release --vm web01"))
@vm_option
@output_option
@pass_session
def release(session: Session, vm: str, output: Output) -> None:
    """Give a VM the mode of its policy again."""
    _set_mode(session, vm, None, "", output)


def _set_mode(session: Session, vm: str, name: str | None, reason: str, output: Output) -> None:
    with Progress() as progress:
        now = session.target(progress.say).set_mode(vm, name, reason)
    table = Table("VM", "MODE")
    table.add(vm, now)
    print_rows(output, {"vms": [{"vm": vm, "mode": now}]}, "vms", table, empty="")
