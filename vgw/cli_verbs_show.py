# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that show what protected VMs do: status, rules, logs and conntrack."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Table, print_json, print_json_line, print_rows, warn
from vgw.cli_text import ago, packet_text, rule_text, side_text, size, span

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
                if interface["reason"]:
                    warn(f"{row['vm']} {interface['name']}: {interface['reason']}")


def _status_cells(vm: Row, interface: Row) -> tuple[object, ...]:
    from vgw.abi import Guard

    rule_counts, connections = interface["rules"], interface["conntrack"]
    off = interface["guards_off"]
    return (
        vm["vm"],
        interface["name"],
        _hook_text(interface),
        vm["mode"],
        vm["generation"],
        f"{rule_counts['ingress']}/{rule_counts['egress']}",
        f"{connections['entries']}/{connections['max']}",
        interface["drops"],
        "all" if len(off) == len(Guard) else ",".join(off) or None,
    )


def _hook_text(interface: Row) -> str:
    """Return how the packets from the VM are caught, or that not all packets are."""
    if not interface["attached"]:
        return "NOT ATTACHED"
    return f"{interface['from_vm']['hook']}/{interface['from_vm']['mode']}"


@click.command(epilog=example("vgw rules --vm web01"))
@vm_option
@output_option
@pass_session
def rules(session: Session, vm: str, output: Output) -> None:
    """Show the rules of a VM and what each has decided.

    Packets of an open connection count for the connection, not for the rule that let it in.
    """
    document = session.target().rules(vm)
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
    print_rows(output, document, "rules", table, empty=f"{vm} has no rules, only defaults")


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
    records = last_records(session.paths().log_file, vm, follow, lines)
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

    if not follow:
        return read_log(log, vm) if lines is None else deque(read_log(log, vm), maxlen=lines)
    shown = FOLLOW_LINES if lines is None else lines
    written = sum(1 for _ in read_log(log, vm)) if log.exists() else 0
    return itertools.islice(read_log(log, vm, follow=True), max(0, written - shown), None)


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
