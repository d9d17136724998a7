# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs about a VM's connections: list, flush, and export and import for a VM that moves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Table, print_rows, warn
from vgw.cli_text import counted, rule_text, side_text, size, span
from vgw.errors import VgwError

_Verb = TypeVar("_Verb", bound=Callable[..., Any])


@click.group()
def conntrack() -> None:
    """List, forget, export or import connections."""


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


def _file_argument(verb: _Verb) -> _Verb:
    """Add an optional FILE; `-`, the default, is stdin or stdout."""
    kind = click.Path(dir_okay=False, readable=False, allow_dash=True, path_type=Path)
    return click.argument("file", metavar="[FILE]", default="-", type=kind)(verb)


@conntrack.command(epilog=example("vgw conntrack export --vm web01 web01.flows"))
@vm_option
@_file_argument
@click.option("--full", is_flag=True, help="All connections; the default.")
@click.option(
    "--delta-since",
    "token",
    metavar="TOKEN",
    help="Only what has changed since the export that ended with this token.",
)
@output_option
@pass_session
def export(  # noqa: PLR0913 - one parameter for each option
    session: Session,
    /,
    *,
    vm: str,
    file: Path,
    full: bool,
    token: str | None,
    output: Output,
) -> None:
    """Write the connections of a VM to FILE, by default stdout, for `vgw conntrack import`.

    While the VM still runs, export all; once it is paused, only what has changed since, by the
    token of the export before. Nothing is changed here: `vgw detach` cleans up.
    """
    if full and token is not None:
        raise click.UsageError("give either --full or --delta-since TOKEN")
    from vgw.controller.flow_export import Token, export_flows
    from vgw.controller.reconcile import Host

    since = None if token is None else Token.parse(token)
    with _written(file) as out:
        answer = export_flows(Host(session.paths()), vm, out, since)
    table = Table(*("VM", "INTERFACE", "KIND", "FLOWS", "UNCHANGED"), right=("FLOWS", "UNCHANGED"))
    for row in answer["interfaces"]:
        table.add(vm, row["interface"], answer["kind"], row["flows"], row["unchanged"])
    if file == Path("-"):
        total = sum(row["flows"] for row in answer["interfaces"])
        click.echo(f"{counted(total, 'flow')}, {size(answer['bytes'])}", err=True)
        click.echo(f"token: {answer['token']}", err=True)
        return
    print_rows(output, answer, "interfaces", table, empty="")
    if output is Output.TABLE:
        click.echo(f"token: {answer['token']}")


@contextlib.contextmanager
def _written(file: Path) -> Iterator[IO[bytes]]:
    """Give what to write a file by, which appears as a whole or not at all; `-` is stdout."""
    if file == Path("-"):
        if sys.stdout.isatty():
            raise click.UsageError("connections are no text for a terminal: name a FILE")
        yield sys.stdout.buffer
        return
    draft = file.with_name(f".{file.name}.tmp")
    try:
        with draft.open("xb") as out:
            draft.chmod(0o600)
            yield out
        draft.rename(file)
    except FileExistsError:
        raise VgwError(f"{draft} is there: another export writes it, or was killed") from None
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@conntrack.command("import", epilog=example("vgw conntrack import --vm web01 web01.flows"))
@vm_option
@_file_argument
@click.option("--from-vm", metavar="NAME", help="The VM's name where the connections come from.")
@output_option
@pass_session
def import_(session: Session, vm: str, file: Path, from_vm: str | None, output: Output) -> None:
    """Take the connections in FILE, by default stdin, to a VM that is attached here.

    A file that is damaged, or of another VM, is refused as a whole. The policy of this host judges
    each connection anew at its next packet. Importing again changes nothing.
    """
    from vgw.controller.flow_file import spooled
    from vgw.controller.flow_import import import_flows
    from vgw.controller.reconcile import Host

    target = session.target()
    with _read(file) as source, spooled(source) as whole:
        answer = import_flows(Host(session.paths()), vm, whole, target.put_flows, from_vm)
    columns = ("FLOWS", "ADDED", "REPLACED", "KEPT", "ENDED")
    table = Table("VM", "INTERFACE", *columns, right=columns)
    for row in answer["interfaces"]:
        table.add(vm, row["interface"], *(row[column.lower()] for column in columns))
    print_rows(output, answer, "interfaces", table, empty="")
    for row in answer["interfaces"]:
        if row["unknown"]:
            warn(f"{row['interface']}: this version does not know the state of {row['unknown']}")
    lost = {row["interface"]: row["full"] for row in answer["interfaces"] if row["full"]}
    if lost:
        name, count = next(iter(lost.items()))
        raise VgwError(
            f"{counted(count, 'flow')} found no room in {name}: raise its conntrack_max, attach "
            "the VM anew and import again"
        )


@contextlib.contextmanager
def _read(file: Path) -> Iterator[IO[bytes]]:
    if file == Path("-"):
        yield sys.stdin.buffer
    else:
        with file.open("rb") as source:
            yield source
