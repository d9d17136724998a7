# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that change what is protected and how: attach, detach, apply and mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from vgw.cli_options import (
    Session,
    example,
    output_option,
    pass_session,
    policy_argument,
    vm_option,
)
from vgw.cli_output import Output, Progress, Table, print_rows, warn
from vgw.cli_target import AttachOrder, Sources
from vgw.cli_text import counted
from vgw.errors import PartlyAppliedError

Row = Mapping[str, Any]

_NOTHING_TO_CHANGE = "no VM is attached, so there is nothing to change"


def _checked_names(
    _context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return names that a policy can give to VMs, each once."""
    from vgw.policy import values

    try:
        return tuple(dict.fromkeys(values.name(name) for name in names))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(epilog=example("vgw attach --vm web01"))
@click.option(
    "--vm",
    "vms",
    multiple=True,
    metavar="NAME",
    callback=_checked_names,
    help="The VM; may be repeated.",
)
@click.option("--all", "every", is_flag=True, help="Every VM of the policy and the inventory.")
@click.option(
    "--policy",
    type=click.Path(readable=False, path_type=Path),
    metavar="PATH",
    help="Policy file or directory, instead of this host's.",
)
@click.option(
    "--interface",
    "interfaces",
    multiple=True,
    metavar="IF",
    help="Interface of a VM that the policy does not name; may be repeated.",
)
@click.option(
    "--hook",
    type=click.Choice(["auto", "xdp", "tc"]),
    help="Where to catch packets from the VM, instead of what the policy says.",
)
@click.option("--force", is_flag=True, help="Replace a program that somebody else attached.")
@output_option
@pass_session
def attach(  # noqa: PLR0913 - one parameter for each option
    session: Session,
    /,
    *,
    vms: tuple[str, ...],
    every: bool,
    policy: Path | None,
    interfaces: tuple[str, ...],
    hook: str | None,
    force: bool,
    output: Output,
) -> None:
    """Protect VMs. One that is attached already gets its policy anew.

    A VM that the policy does not name needs --interface; it gets the defaults of the policy, and
    guards that lack its MAC or addresses are off.
    """
    if every == bool(vms):
        raise click.UsageError("give either --vm NAME, once or more, or --all")
    if interfaces and len(vms) != 1:
        raise click.UsageError("--interface goes with a single --vm")
    with Progress() as progress:
        sources = _read_sources(session, policy, needed=not interfaces)
        names = _all_vms(session, sources) if every else list(vms)
        progress.say(f"protecting {counted(len(names), 'VM')}")
        target = session.target(progress.say)
        order = AttachOrder(names, sources, interfaces, hook, force)
        answer, failure = _attempt(lambda: target.attach(order))
    _print_results(answer, output, failure, empty="the policy names no VM")


def _read_sources(session: Session, policy: Path | None, *, needed: bool) -> Sources | None:
    """Return the texts of a policy, None when this host has none and none is needed.

    One that was named on the command line is always needed.
    """
    from vgw.controller.inventory import read_sources

    path = policy or session.paths().policy
    named = session.policy_named or policy is not None
    if not needed and not named and not path.exists():
        warn(f"there is no policy {path}: new connections in are dropped, those out accepted")
        return None
    return read_sources(path)


def _all_vms(session: Session, sources: Sources | None) -> list[str]:
    from vgw.controller.finding.search import Look
    from vgw.controller.inventory import read_document
    from vgw.controller.overlay import Overlay

    paths = session.paths()
    return list(Overlay(paths, Look().found).laid(read_document(paths, sources)).vms)


def _attempt(change: Callable[[], Row]) -> tuple[Row, PartlyAppliedError | None]:
    """Make a change; return what became of VMs, and the error when some failed."""
    try:
        return change(), None
    except PartlyAppliedError as error:
        return {"vms": error.done, "waiting": {}, "failures": error.failures}, error


def _print_results(
    answer: Row, output: Output, failure: PartlyAppliedError | None, *, empty: str
) -> None:
    """Print what became of VMs, a line each, and what to know of them; then raise `failure`."""
    table = Table("VM", "RESULT", "INTERFACES", "GEN", right=("GEN",))
    for row in answer["vms"]:
        interfaces = ",".join(row["interfaces"]) or None
        table.add(row["vm"], _result_text(row), interfaces, row["generation"])
    print_rows(output, answer, "vms", table, empty="nothing was changed" if failure else empty)
    _warn_of(answer)
    if failure is not None:
        raise failure


def _result_text(row: Row) -> str:
    if not row["interfaces"]:
        return "NOT protected"
    result = "protected" if row["changed"] else "unchanged"
    return f"{result}, programs compiled" if row["compiled"] else result


def _warn_of(answer: Row) -> None:
    """Warn of what VMs do not have, or not yet."""
    strangers = {row["vm"] for row in answer["vms"] if not row["named"]}
    for row in answer["vms"]:
        if row["vm"] in strangers:
            warn(f"{row['vm']}: not named by this policy: it gets the defaults")
        for note in row["pending"]:
            warn(f"{row['vm']}: {note}")
    for vm, interfaces in answer["waiting"].items():
        then = (
            "attach the VM again when it does"
            if vm in strangers
            else "a running controller protects it when it appears"
        )
        warn(f"{vm}: {', '.join(interfaces)} does not exist (yet) and is not protected; {then}")


@click.command(epilog=example("vgw detach --vm web01"))
@click.option("--vm", metavar="NAME", help="The VM.")
@click.option("--all", "every", is_flag=True, help="Every VM that is attached.")
@output_option
@pass_session
def detach(session: Session, vm: str | None, every: bool, output: Output) -> None:
    """Stop protecting a VM.

    Every trace of it is removed; its packets pass unfiltered then.
    """
    if every == (vm is not None):
        raise click.UsageError("give either --vm NAME or --all")
    with Progress() as progress:
        target = session.target(progress.say)
        names = target.detach_all() if vm is None else target.detach(vm)
    table = Table("VM", "RESULT")
    for name in names:
        table.add(name, "no longer protected")
    rows = [{"vm": name} for name in names]
    print_rows(output, {"detached": rows}, "detached", table, empty="no VM was attached")


@click.command(epilog=example("vgw apply /etc/vgw/policy.d --dry-run"))
@policy_argument
@click.option("--dry-run", is_flag=True, help="Say what would change and change nothing.")
@output_option
@pass_session
def apply(session: Session, path: Path | None, dry_run: bool, output: Output) -> None:
    """Apply a policy to all attached VMs.

    PATH is a file or a directory of *.yaml, by default the policy of this host. Each VM goes from
    its old rules to its new ones in one step. A policy with a mistake changes nothing.
    """
    with Progress() as progress:
        sources = _read_sources(session, path, needed=True) or ()
        failure = None
        if dry_run:
            answer = _dry_run(session, sources, progress)
        else:
            progress.say("applying the policy")
            target = session.target(progress.say)
            answer, failure = _attempt(lambda: target.apply(sources))
    if dry_run:
        _print_plan(answer, output)
    else:
        _print_results(answer, output, failure, empty=_NOTHING_TO_CHANGE)


def _dry_run(session: Session, sources: Sources, progress: Progress) -> Row:
    from vgw.cli_plan import plan
    from vgw.controller.inventory import read_document
    from vgw.controller.reconcile import Host

    paths = session.paths()
    return plan(Host(paths, progress=progress.say), read_document(paths, sources))


def _print_plan(answer: Row, output: Output) -> None:
    """Print what would change: a line for each VM, and one for each rule below it."""
    if output is not Output.TABLE:
        print_rows(output, answer, "vms", Table(), empty="")
        return
    for row in answer["vms"]:
        click.echo(f"{row['vm']}: {_plan_summary(row)}")
        for mark, key in (("+", "added"), ("-", "removed"), ("~", "modified")):
            for rule in row[key] or ():
                click.echo(f"  {mark} {rule}")
    if not answer["vms"]:
        click.echo(_NOTHING_TO_CHANGE)
    _warn_of(answer)


def _plan_summary(row: Row) -> str:
    if not row["changed"]:
        return "nothing would change"
    if row["added"] is None:
        return "would change; which rules is not known, as those in force are not remembered"
    parts = [
        f"{counted(len(row[key]), 'rule')} {verb}"
        for key, verb in (("added", "added"), ("removed", "removed"), ("modified", "changed"))
        if row[key]
    ]
    if row["reordered"]:
        parts.append("rules in another order")
    if row["defaults"]:
        parts.append("other defaults")
    return ", ".join(parts) or "other settings of the VM or its interfaces"


@click.command(epilog=example("vgw mode --vm web01 monitor"))
@vm_option
@click.argument("name", metavar="MODE", type=click.Choice(["enforce", "monitor", "quarantine"]))
@output_option
@pass_session
def mode(session: Session, vm: str, name: str, output: Output) -> None:
    """Switch a VM between enforce, monitor and quarantine.

    enforce drops what the policy denies, monitor only counts what it would drop, quarantine drops
    everything. The order holds over policy changes. To lift it, order the mode that the policy
    gives to the VM, which `vgw status` shows beside the ordered one.
    """
    with Progress() as progress:
        session.target(progress.say).set_mode(vm, name)
    table = Table("VM", "MODE")
    table.add(vm, name)
    print_rows(output, {"vms": [{"vm": vm, "mode": name}]}, "vms", table, empty="")
