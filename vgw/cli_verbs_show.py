# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that show what protected VMs do: status, rules, logs and conntrack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Table, print_json, print_json_line, print_rows, warn
from vgw.cli_text import ago, packet_text, rule_text, side_text, size, span

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
        for alarm in document.get("alarms") or ():
            click.echo(_alarm_text(alarm))


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
    return f"{interface['from_vm']['hook']}/{interface['from_vm']['mode']}"


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
@output_option
@pass_session
def logs(session: Session, vm: str | None, follow: bool, lines: int | None, output: Output) -> None:
    """Show what was logged: drops, and rules with `log: true`.

    The controller writes the log; nothing is logged while it does not run.
    """
    if follow and output is Output.JSON:
        raise click.UsageError("a JSON document has an end: use -o jsonl with --follow")
    paths = session.paths()
    if vm is not None and not is_known(paths, vm):
        warn(f"VM {vm} is neither in the log nor attached; `vgw status` shows which are")
    records = last_records(paths.log_file, vm, follow, lines)
    if output is Output.JSON:
        print_json({"records": list(records)})
        return
    for record in records:
        if output is Output.JSONL:
            print_json_line(record)
        else:
            click.echo(record_text(record))


def last_records(log: Path, vm: str | None, follow: bool, lines: int | None) -> Iterable[Row]:
    """Return the last records of a log, all without `lines`, and with `follow` those to come."""
    from vgw.controller.events import read_log

    return read_log(log, vm, follow, FOLLOW_LINES if follow and lines is None else lines)


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


def record_text(record: Row) -> str:
    """Return a log record as a line for people: when, who, what and why, which packet."""
    where = "/".join(record[key] for key in ("vm", "interface") if key in record)
    parts = [record.get("ts", "-"), where]
    if "verdict" in record:
        parts += [record["direction"], record["verdict"], record["reason"]]
        if "rule" in record:
            parts.append(f"{record['tier']}/{record['policy']}/{record['rule']}")
        parts.append(packet_text(record))
    else:
        known = {"ts", "vm", "interface", "event"}
        rest = [f"{key}={value}" for key, value in record.items() if key not in known]
        parts += [record.get("event", "-"), *rest]
    return "  ".join(part for part in parts if part)


@click.group()
def conntrack() -> None:
    """List or forget the connections of a VM."""


@conntrack.command("list", epilog=example("vgw conntrack list --vm web01"))
@vm_option
@output_option
@pass_session
def list_flows(session: Session, vm: str, output: Output) -> None:
    """Show the open connections of a VM, and which rule let each in."""
    document = session.target().conntrack(vm)
    table = Table(
        *("PROTO", "STATE", "DIRECTION", "LOCAL", "REMOTE", "PACKETS", "AGE", "ENDS IN", "RULE"),
        right=("PACKETS", "AGE", "ENDS IN"),
    )
    for row in document["flows"]:
        packets = row["packets"]
        table.add(
            row["proto"],
            row["state"],
            row["direction"],
            side_text(row["local"], row["local_port"]),
            side_text(row["remote"], row["remote_port"]),
            f"{packets['ingress']}/{packets['egress']}",
            span(row["age"]),
            span(row["expires_in"]),
            rule_text(row),
        )
    print_rows(output, document, "flows", table, empty=f"{vm} has no open connections")


@conntrack.command(epilog=example("vgw conntrack flush --vm web01"))
@vm_option
@output_option
@pass_session
def flush(session: Session, vm: str, output: Output) -> None:
    """Forget every connection of a VM; the next packet of each is judged as a new one."""
    entries = session.target().flush(vm)
    table = Table("VM", "FORGOTTEN", right=("FORGOTTEN",))
    table.add(vm, entries)
    print_rows(output, {"vms": [{"vm": vm, "entries": entries}]}, "vms", table, empty="")
