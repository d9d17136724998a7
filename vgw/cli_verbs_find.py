# SPDX-License-Identifier: Apache-2.0
"""The verb that shows the VMs of this host, written or found: vms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from vgw.cli_options import Session, example, output_option, pass_session
from vgw.cli_output import Output, Table, print_rows, warn
from vgw.cli_text import span

Row = Mapping[str, Any]


@click.command(epilog=example("vgw vms -o json"))
@output_option
@pass_session
def vms(session: Session, output: Output) -> None:
    """Show the VMs that files name or that are found on this host.

    For each interface it says what protects it, or why nothing does, and the addresses that it was
    leased. What is looked for, and where, is said by the host's inventory.
    """
    document = session.target().vms()
    table = Table("VM", "FOUND BY", "RUNS", "MATCHES", "INTERFACE", "MAC", "LEARNED", "PROTECTED")
    for row in document["vms"]:
        for interface in row["interfaces"] or [None]:
            table.add(*_cells(row, interface))
    print_rows(output, document, "vms", table, empty="no VM is named by a file or found")
    if output is Output.TABLE:
        for text in document["problems"].values():
            warn(text)


def _cells(vm: Row, interface: Row | None) -> tuple[object, ...]:
    found = vm["source"]
    runs = {None: None, True: "yes", False: "no"}[vm["running"]]
    if interface is None:
        return (vm["vm"], found, runs, _matches(vm), None, None, None, _why(vm["reason"]))
    protected = "yes" if interface["protected"] else _why(vm["reason"] or interface["reason"])
    learned = ",".join(map(_learned, interface["learned"] or ())) or None
    name, mac = interface["name"], interface["mac"]
    return (vm["vm"], found, runs, _matches(vm), name, mac, learned, protected)


def _matches(vm: Row) -> str | None:
    if vm["matches"] is None:
        return None
    return ",".join(vm["policies"]) or "defaults"


def _why(reason: str | None) -> str:
    return "NO" if reason is None else f"NO: {reason}"


def _learned(lease: Row) -> str:
    left = "no end" if lease["seconds"] is None else span(lease["seconds"])
    return f"{lease['address']} ({left})"
