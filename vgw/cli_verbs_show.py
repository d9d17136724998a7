# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that show what protected VMs do: status, rules and logs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Table, print_json, print_json_line, print_rows, warn
from vgw.cli_text import ago, size, span

if TYPE_CHECKING:
    from vgw.controller.paths import Paths

Row = Mapping[str, Any]

#: Records that `logs --follow` shows before those to come.
FOLLOW_LINES = 10


@click.command(epilog=example("vgw status --vm web01 -o json"))
@click.option("--vm", metavar="NAME", help="Only this VM.")
@output_option
@pass_session
def status(session: Session, vm: str | None, output: Output) -> None:
    """Show what is really attached, as the kernel says it now."""
    document = session.target().status(vm)
    table = Table(
        *("VM", "INTERFACE", "HOOK", "MODE", "GEN", "RULES", "CONNTRACK", "DROPS", "GUARDS OFF"),
        right=("GEN", "RULES", "CONNTRACK", "DROPS"),
    )
    for row in document["vms"]:
        for interface in row["interfaces"]:
            table.add(*_status_cells(row, interface))
    print_rows(output, document, "vms", table, empty="no VM is attached")
    if output is Output.TABLE:
        for row in document["vms"]:
            for interface in row["interfaces"]:
                for text in _shortcomings(interface):
                    warn(f"{row['vm']} {interface['name']}: {text}")
            if row.get("mode_order") is not None:
                click.echo(_order_text(row))
        policy = document.get("host_policy")
        if policy is not None and (document["vms"] or policy["confirm_seconds"] is not None):
            click.echo(_policy_text(policy))
        for alarm in document.get("alarms") or ():
            click.echo(_alarm_text(alarm))


def _order_text(vm: Row) -> str:
    """Return a line about a mode that was ordered."""
    order = vm["mode_order"]
    since = "" if order["since"] is None else f" since {order['since']}"
    by = "" if order["by"] is None else f" by {order['by']}"
    why = "" if order["reason"] is None else f": {order['reason']}"
    return f"{vm['vm']}: {order['mode']} ordered{since}{by}{why}"


def _policy_text(policy: Row) -> str:
    """Return a line about the policy of the host."""
    text = f"policy {policy['number']}: {policy['event']} by {policy['by']} at {policy['time']}"
    if policy["held"]:
        text += f"; {policy['file']} said something else then and is not in force"
    if policy["confirm_seconds"] is not None:
        text += (
            f"; waits to be confirmed, {policy['confirm_seconds']:.0f} s are left, then "
            f"{policy['confirm_back']} comes back"
        )
    return text


def _alarm_text(alarm: Row) -> str:
    """Return a line about an alarm: its name, whom it concerns, what is wrong, since when."""
    concerned = " ".join(alarm[key] for key in ("vm", "interface") if alarm[key])
    whom = f" {concerned}" if concerned else ""
    return f"ALARM {alarm['alarm']}{whom}: {alarm['text']} (for {span(alarm['seconds'])})"


def _shortcomings(interface: Row) -> Iterator[str]:
    """Yield what is not as it should be with an interface."""
    if interface["reason"]:
        yield interface["reason"]
    for path in ("from_vm", "to_vm"):
        for program in (interface[path] or {}).get("ahead", ()):
            yield (
                f"program {program} runs ahead of its {path} program; `bpftool prog show id "
                f"{program}` says what it is"
            )
    for other in interface["beside"]:
        yield _beside_text(interface["name"], other)
    if interface["pending"]:
        yield interface["pending"]


def _beside_text(interface: str, other: Row) -> str:
    """Return what somebody else runs there, and how to find out what it does."""
    if other["kind"] in {"xdp", "tcx"}:
        what, look = f"program {other['id']}", f"bpftool prog show id {other['id']}"
    else:
        side = "ingress" if other["path"] == "from_vm" else "egress"
        what = f"{other['kind']} filter of priority {other['id']}"
        look = f"tc filter show dev {interface} {side}"
    return (
        f"{what} of somebody else runs beside its {other['path']} program and may redirect "
        f"packets; `{look}` says what it is"
    )


def _status_cells(vm: Row, interface: Row) -> tuple[object, ...]:
    rule_counts, connections = interface["rules"], interface["conntrack"]
    return (
        vm["vm"],
        interface["name"],
        _hook_text(interface),
        _mode_text(vm),
        vm["generation"],
        None if rule_counts is None else f"{rule_counts['ingress']}/{rule_counts['egress']}",
        f"{connections['entries']}/{connections['max']}",
        interface["drops"],
        _guards_text(interface["guards_off"]),
    )


def _mode_text(vm: Row) -> str | None:
    """Return the mode, and that of the policy where another one was ordered."""
    mode, by_policy = vm["mode"], vm["mode_policy"]
    return mode if by_policy in (None, mode) else f"{mode} (policy: {by_policy})"


def _guards_text(off: Row | None) -> str | None:
    """Return which guards are off; `off` None: that is lost."""
    from vgw.abi import Guard

    if off is None:
        return "unknown"
    return "all" if len(off) == len(Guard) else ",".join(off) or None


def _hook_text(interface: Row) -> str:
    """Return how the packets from the VM are caught, or that not all packets are."""
    if not interface["attached"]:
        return "NOT ATTACHED"
    from_vm = interface["from_vm"]
    shield = " behind a shield" if "shield" in from_vm else ""
    return f"{from_vm['hook']}/{from_vm['mode']}{shield}"


@click.command(epilog=example("vgw rules --vm web01"))
@vm_option
@click.option("--never-hit", is_flag=True, help="Only rules that have decided nothing so far.")
@output_option
@pass_session
def rules(session: Session, vm: str, never_hit: bool, output: Output) -> None:
    """Show the rules of a VM and what each has decided.

    Packets of an open connection count for the connection, not for the rule that let it in. Counts
    go on when the policy changes; rules that match no packet of this VM are not listed.
    """
    document = session.target().rules(vm)
    empty = f"{vm} has no rules, only defaults"
    if never_hit:
        if document["rules"]:
            empty = f"every rule of {vm} has decided something"
        document = {**document, "rules": [row for row in document["rules"] if not row["packets"]]}
    table = Table(
        *("DIRECTION", "TIER", "RULE", "ACTION", "PACKETS", "BYTES", "LAST HIT"),
        right=("PACKETS", "BYTES", "LAST HIT"),
    )
    for row in document["rules"]:
        table.add(
            row["direction"],
            row["tier"],
            f"{row['policy']}/{row['rule']}",
            row["action"],
            row["packets"],
            size(row["bytes"]),
            ago(row["last_hit"]),
        )
    print_rows(output, document, "rules", table, empty=empty)


@click.command(epilog=example("vgw logs --vm web01 -f"))
@click.option("--vm", metavar="NAME", help="Only records of this VM, and of what was lost.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    metavar="COUNT",
    help="Only the last COUNT records.  [default: all; with --follow: 10]",
)
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="EVENT",
    help="Only records of this kind: drop, accept, flow_start, flow_end, attach, apply, lost ... "
    "May be given several times.",
)
@output_option
@pass_session
def logs(  # noqa: PLR0913, PLR0917 (the options of the verb)
    session: Session,
    vm: str | None,
    follow: bool,
    lines: int | None,
    events: tuple[str, ...],
    output: Output,
) -> None:
    """Show what was logged: drops, connections, changes.

    The controller writes the log; nothing is logged while it does not run.
    """
    from vgw.controller.log_text import escaped, record_text

    if follow and output is Output.JSON:
        raise click.UsageError("a JSON document has an end: use -o jsonl with --follow")
    paths = session.paths()
    if vm is not None and not is_known(paths, vm):
        warn(f"VM {vm} is neither in the log nor attached; `vgw status` shows which are")
    records = last_records(paths.log_file, vm, follow, lines, events)
    if output is Output.JSON:
        print_json({"records": list(records)})
        return
    for record in records:
        if output is Output.JSONL:
            print_json_line(record)
        else:
            click.echo(f"{escaped(record.get('ts', '-'))}  {record_text(record)}")


def last_records(
    log: Path, vm: str | None, follow: bool, lines: int | None, events: Collection[str]
) -> Iterable[Row]:
    """Return the last records of a log, all without `lines`, and with `follow` those to come."""
    from vgw.controller.events import read_log

    return read_log(log, vm, follow, FOLLOW_LINES if follow and lines is None else lines, events)


def is_known(paths: Paths, vm: str) -> bool:
    """Tell whether a VM is attached or has left a record; True when that cannot be found out."""
    from vgw.controller.events import read_log
    from vgw.controller.pinned import interfaces_of

    try:
        if interfaces_of(paths, vm) or not paths.log_file.exists():
            return True
    except OSError:
        return True
    return any(record.get("vm") == vm for record in read_log(paths.log_file, vm))
