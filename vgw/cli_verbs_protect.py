# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that change what is protected and by which policy: attach, detach and apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vgw.cli_options import (
    Duration,
    Session,
    example,
    output_option,
    pass_session,
    policy_argument,
)
from vgw.cli_output import Output, Progress, Table, print_rows, warn
from vgw.cli_target import ApplyOptions, AttachOrder
from vgw.cli_text import counted
from vgw.errors import PartlyAppliedError, VgwError

if TYPE_CHECKING:
    from vgw.policy.model import PolicyDocument
    from vgw.policy.parse import Sources

Row = Mapping[str, Any]

NOTHING_TO_CHANGE = "no VM is attached, so there is nothing to change"


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
@click.option(
    "--force",
    is_flag=True,
    help="Replace a program that somebody else attached; give up connections in tables of another "
    "version that cannot be taken over.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for interfaces that do not exist yet; fail if one is still missing.",
)
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
    wait: float,
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
        asked = sources if every or wait else None
        document = _document(session, asked)
        names = _all_vms(session, document) if every else list(vms)
        awaited = [*_listed(document, names), *interfaces] if wait else []
        missing = _awaited(awaited, wait, progress) if wait else []
        progress.say(f"protecting {counted(len(names), 'VM')}")
        target = session.target(progress.say)
        own = policy is None and not session.policy_named
        parsed = None if asked is None else document
        order = AttachOrder(names, sources, interfaces, hook, force, own, document=parsed)
        answer, failure = attempt(lambda: target.attach(order))
    print_results(answer, output, failure, empty="the policy names no VM")
    if missing:
        raise VgwError(
            f"interface {missing[0]} did not appear within {wait:g} s; what is there is protected, "
            "attach again when the rest is"
        )


def _document(session: Session, sources: Sources | None) -> PolicyDocument:
    """Return what this host is to enforce by its files, nothing without a policy."""
    from vgw.controller.inventory import read_document
    from vgw.policy.model import PolicyDocument

    return PolicyDocument() if sources is None else read_document(session.paths(), sources)


def _listed(document: PolicyDocument, vms: list[str]) -> list[str]:
    """Return the interfaces that files list of VMs."""
    known = document.vms
    written = [each for vm in vms if vm in known for each in known[vm].interfaces]
    return [each.name for each in written if each.name]


def _awaited(interfaces: list[str], seconds: float, progress: Progress) -> list[str]:
    """Wait for interfaces; return those that are missing when the time is over."""
    from vgw.controller.interfaces import wait_for

    progress.say(f"waiting for {counted(len(interfaces), 'interface')}")
    return wait_for(interfaces, seconds)


def _read_sources(session: Session, policy: Path | None, *, needed: bool) -> Sources | None:
    """Return the texts of a policy, None when this host has none and none is needed.

    One that was named on the command line is always needed.
    """
    from vgw.controller.policy_source import read_steadily

    path = policy or session.paths().policy
    named = session.policy_named or policy is not None
    if not needed and not named and not path.exists():
        warn(f"there is no policy {path}: new connections in are dropped, those out accepted")
        return None
    return read_steadily(path)


def _all_vms(session: Session, document: PolicyDocument) -> list[str]:
    from vgw.controller.looking import looking_host

    host, _ = looking_host(session.paths())
    return list(host.overlay.laid(document).vms)


def attempt(change: Callable[[], Row]) -> tuple[Row, PartlyAppliedError | None]:
    """Make a change; return what became of VMs, and the error when some failed."""
    try:
        return change(), None
    except PartlyAppliedError as error:
        return {"vms": error.done, "waiting": {}, "failures": error.failures}, error


def print_results(
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
        if row["kept"]:
            warn(
                f"{row['vm']}: not in this policy any more: it keeps its last one; `vgw detach` "
                "ends that"
            )
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
    failure: PartlyAppliedError | None = None
    with Progress() as progress:
        target = session.target(progress.say)
        try:
            names = target.detach_all() if vm is None else target.detach(vm)
        except PartlyAppliedError as error:
            failure, names = error, [row["vm"] for row in error.done]
    table = Table("VM", "RESULT")
    for name in names:
        table.add(name, "no longer protected")
    answer: dict[str, Any] = {"detached": [{"vm": name} for name in names]}
    if failure is not None:
        answer["failures"] = failure.failures
    print_rows(output, answer, "detached", table, empty="no VM was detached")
    if failure is not None:
        raise failure


@click.command(epilog=example("vgw apply /etc/vgw/policy.d --confirm-within 60s"))
@policy_argument
@click.option("--dry-run", is_flag=True, help="Say what would change and change nothing.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    metavar="N",
    help="Changes of rules that --dry-run lists; 0 is all.",
)
@click.option(
    "--confirm-within",
    "confirm_seconds",
    type=Duration(),
    metavar="TIME",
    help="Go back by itself unless `vgw confirm` follows in time, for example 60s or 5m.",
)
@click.option(
    "--supersede",
    is_flag=True,
    help="Even if another policy waits to be confirmed; the one before both is gone back to.",
)
@click.option("--force", is_flag=True, help="Even if it is for another host, or older by revision.")
@output_option
@pass_session
def apply(  # noqa: PLR0913 - one parameter for each option
    session: Session,
    /,
    *,
    path: Path | None,
    dry_run: bool,
    limit: int,
    confirm_seconds: float | None,
    supersede: bool,
    force: bool,
    output: Output,
) -> None:
    """Apply a policy to all attached VMs.

    PATH is a file or a directory of *.yaml, by default the policy of this host. Each VM goes from
    its old rules to its new ones in one step. A policy with a mistake changes nothing. `vgw
    history` and `vgw rollback` know what was applied before.
    """
    with Progress() as progress:
        sources = _read_sources(session, path, needed=True) or ()
        failure = None
        if dry_run:
            answer = _dry_run(session, sources, progress, limit, force)
        else:
            progress.say("applying the policy")
            target = session.target(progress.say)
            options = ApplyOptions(force, confirm_seconds, supersede)
            answer, failure = attempt(lambda: target.apply(sources, options))
    if dry_run:
        _print_plan(answer, output)
        return
    if confirm_seconds is not None:
        warn(f"`vgw confirm` within {confirm_seconds:g} s, or the policy before comes back")
    print_results(answer, output, failure, empty=NOTHING_TO_CHANGE)


def _dry_run(
    session: Session, sources: Sources, progress: Progress, limit: int, force: bool
) -> Row:
    """Return what would change; nobody is asked to change anything, so it is found out here."""
    from vgw.controller.diff import plan
    from vgw.controller.inventory import read_document
    from vgw.controller.looking import looking_host
    from vgw.controller.policy_keeper import PolicyKeeper, logging_to

    host, _ = looking_host(session.paths(), progress.say)
    document = read_document(host.paths, sources)
    PolicyKeeper(host, logging_to(host.paths.log_file)).admit(document, force=force)
    return plan(host, document, limit or None)


def _print_plan(answer: Row, output: Output) -> None:
    """Print what would change; raise PartlyAppliedError when it would fail for some VMs."""
    from vgw.cli_diff import print_plan

    if output is not Output.TABLE:
        print_rows(output, answer, "vms", Table(), empty="")
    elif answer["vms"] or answer["failures"]:
        print_plan(answer)
    else:
        click.echo(NOTHING_TO_CHANGE)
    if output is Output.TABLE:
        _warn_of(answer)
    if answer["failures"]:
        raise PartlyAppliedError(answer["failures"])
