# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
# ruff: noqa: PLR0913 - one parameter for each option of the verb
"""The verb simulate: what the loaded program and the reference model say of given packets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from vgw.cli_options import Session, example, output_option, pass_session, vm_option
from vgw.cli_output import Output, Table, print_json, print_json_line
from vgw.cli_text import packet_text, rule_text
from vgw.errors import ExitCode, VgwError

Row = Mapping[str, Any]
#: A packet to simulate: its description, or the frame itself.
PacketInput = Mapping[str, Any] | bytes

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog=example(
        "vgw simulate --vm web01 --direction ingress --proto tcp "
        "--src 192.0.2.7 --dst 10.20.0.11 --dport 443"
    )
)
@vm_option
@click.option(
    "--direction",
    required=True,
    type=click.Choice(["ingress", "egress"]),
    help="ingress: towards the VM; egress: from the VM.",
)
@click.option("--proto", metavar="P", help="tcp, udp, sctp, icmp, icmpv6 or a number.")
@click.option("--src", metavar="ADDRESS", help="Source address.")
@click.option("--dst", metavar="ADDRESS", help="Destination address.")
@click.option("--sport", type=int, metavar="PORT", help="Source port.  [default: 40000]")
@click.option("--dport", type=int, metavar="PORT", help="Destination port.")
@click.option("--flags", metavar="LETTERS", help="TCP flags, of SFRPAU.  [default: S]")
@click.option("--icmp-type", metavar="TYPE", help="Number or name.  [default: echo-request]")
@click.option("--icmp-code", type=int, metavar="CODE", help="ICMP code.  [default: 0]")
@click.option("--packets", type=_FILE, metavar="FILE", help="JSON lines, one packet each.")
@click.option("--pcap", type=_FILE, metavar="FILE", help="A capture with Ethernet frames.")
@click.option("--interface", metavar="IF", help="Which interface, if the VM has several.")
@click.option("--hook", type=click.Choice(["xdp", "tc"]), help="Program to run, for egress.")
@click.option("--stateful", is_flag=True, help="One sequence with connections, not each alone.")
@click.option(
    "--policy",
    type=click.Path(readable=False, path_type=Path),
    metavar="PATH",
    help="Simulate under this policy, which needs no attached VM.",
)
@output_option
@pass_session
def simulate(
    session: Session,
    /,
    *,
    vm: str,
    direction: str,
    packets: Path | None,
    pcap: Path | None,
    interface: str | None,
    hook: str | None,
    stateful: bool,
    policy: Path | None,
    output: Output,
    **fields: str | int | None,
) -> int:
    """Ask what would happen to a packet, without sending it.

    The packet runs through the program that protects the VM, on scratch copies of its state, and
    through the reference model; both answers are shown. Exit code 1 when they differ, or when the
    kernel cannot tell.

    A line of --packets is {"src": "10.0.0.1", "dst": "10.20.0.11", "proto": "tcp",
    "sport": 40000, "dport": 443, "flags": "S"}, or has icmp_type and icmp_code.
    """
    from vgw.controller.inventory import read_document
    from vgw.controller.policy_files import read_sources
    from vgw.controller.reconcile import Host
    from vgw.controller.simulate import PacketError
    from vgw.controller.simulate import simulate as run
    from vgw.policy.model import Direction, Hook

    description = {name: value for name, value in fields.items() if value is not None}
    inputs = _inputs(description, packets, pcap)
    paths = session.paths()
    results = run(
        Host(paths),
        vm,
        Direction(direction),
        inputs,
        hook=None if hook is None else Hook(hook),
        stateful=stateful,
        interface=interface,
        document=None if policy is None else read_document(paths, read_sources(policy)),
    )
    try:
        agreed = _print_results(results, output, vm, direction, description)
    except PacketError as error:
        if not isinstance(inputs, PacketFile):
            raise
        raise VgwError(f"{inputs.path}:{inputs.line}: {error.problem}") from error
    return ExitCode.OK if agreed else ExitCode.FAILED


def _inputs(
    description: Mapping[str, Any], packets: Path | None, pcap: Path | None
) -> Iterable[PacketInput]:
    """Return the packets of the one way by which they were given."""
    if sum((bool(description), packets is not None, pcap is not None)) != 1:
        raise click.UsageError("give a packet (--proto, --src, --dst), or --packets, or --pcap")
    if packets is not None:
        return PacketFile(packets)
    if pcap is not None:
        from vgw.controller.pcap import read_pcap

        return read_pcap(pcap)
    missing = [f"--{name}" for name in ("proto", "src", "dst") if name not in description]
    if missing:
        raise click.UsageError(f"a packet needs {', '.join(missing)} too")
    _check_options(description)
    return [description]


def _check_options(description: Mapping[str, Any]) -> None:
    """Raise a usage error that names the option with a wrong value."""
    from vgw.policy.frame import FieldError, build_frame

    try:
        build_frame(description, source_mac=bytes(6), destination_mac=bytes(6))
    except FieldError as error:
        raise click.UsageError(f"--{error.field.replace('_', '-')}: {error.problem}") from error


class PacketFile:
    """The packet descriptions of a file of JSON lines; blank lines are passed over.

    `line` is the number of the line that was read last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        with self.path.open("rb") as file:
            for self.line, text in enumerate(file, start=1):
                if text.strip():
                    yield self._description(text)

    def _description(self, text: bytes) -> Mapping[str, Any]:
        where = f"{self.path}:{self.line}"
        try:
            description = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise VgwError(f"{where}: not a line of JSON: {error}") from error
        if not isinstance(description, dict):
            raise VgwError(f"{where}: not a JSON object that describes a packet")
        return description


def _print_results(
    results: Iterable[Row], output: Output, vm: str, direction: str, description: Row
) -> bool:
    """Print the results; return whether the program answered each as the model does."""
    agreed = True
    rows = []
    for row in results:
        agreed &= row["verdict"] is not None and not _differs(row)
        if output is Output.JSONL:
            print_json_line(row)
        else:
            rows.append(row)
    if output is Output.JSON:
        print_json({"vm": vm, "direction": direction, "results": rows})
    elif output is Output.TABLE and description:
        for row in rows:
            click.echo(f"{vm} {direction} {packet_text(description)}: {_sentence(row)}")
    elif output is Output.TABLE:
        click.echo("\n".join(_table(rows).lines()))
    return agreed


def _differs(row: Row) -> bool:
    """Tell whether both the program and the model answered, and not the same."""
    if row["verdict"] is None or row["model"] is None:
        return False
    return bool(row["verdict"] != row["model"] or row["reason"] != row["model_reason"])


def _sentence(row: Row) -> str:
    if row["verdict"] is None:
        return f"no answer: {row['error']}"
    rule = rule_text(row)
    answer = f"{row['verdict']}, reason {row['reason']}"
    if rule is not None:
        answer += f", rule {rule}"
    if row["model"] is None:
        return f"{answer}; there is no answer of the model, apply the policy again to have one"
    if not _differs(row):
        return f"{answer}; the model agrees"
    model = f"{row['model']}, reason {row['model_reason']}"
    return f"{answer}; BUT the model says {model}: please report this"


def _table(rows: Iterable[Row]) -> Table:
    table = Table("INDEX", "VERDICT", "REASON", "RULE", "MODEL", "", right=("INDEX",))
    for row in rows:
        model, note = row["model"], ""
        if row["verdict"] is None:
            note = f"no answer: {row['error']}"
        elif _differs(row):
            model, note = f"{row['model']} {row['model_reason']}", "DIFFERS"
        table.add(row["index"], row["verdict"], row["reason"], rule_text(row), model, note)
    return table
