# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that read a policy file and touch nothing: check and compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vgw.cli_options import (
    Session,
    example,
    output_option,
    pass_session,
    policy_argument,
    vm_option,
)
from vgw.cli_output import (
    Output,
    Progress,
    Table,
    print_json,
    print_json_line,
    print_rows,
    warn,
)
from vgw.cli_text import counted
from vgw.errors import ExitCode, PolicyError, Problem, VgwError

if TYPE_CHECKING:
    from vgw.policy.model import EffectivePolicy, EffectiveRule, Network, PolicyDocument

#: How many peers or services of a rule a table shows before it counts the rest.
SHOWN = 3


@click.command(epilog=example("vgw check /etc/vgw/policy.d"))
@policy_argument
@output_option
@pass_session
def check(session: Session, path: Path | None, output: Output) -> int:
    """Validate a policy and list all its mistakes at once.

    PATH is a file or a directory of *.yaml, by default the policy of this host. Nothing is
    changed. Exit code 3 when there is a mistake; warnings alone leave it 0.
    """
    from vgw.controller.inventory import read_policy
    from vgw.policy.shadow import shadowed_rules

    source = path or session.paths().policy
    problems: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()
    try:
        document = read_policy(source)
        _compile_all(document, source)
    except PolicyError as error:
        if output is Output.TABLE:
            raise
        problems = error.problems
    else:
        warnings = (*document.warnings, *shadowed_rules(document))
    if output is Output.TABLE:
        for warning in warnings:
            warn(str(warning))
        click.echo(f"{source}: valid: {_summary(document)}")
        return ExitCode.OK
    _print_findings(output, problems, warnings)
    return ExitCode.POLICY_INVALID if problems else ExitCode.OK


def _compile_all(document: PolicyDocument, source: Path) -> None:
    """Make the tables of every VM; raises PolicyError for those whose rules do not fit."""
    from vgw.policy.quotas import PolicyTooLargeError

    problems = []
    with Progress() as progress:
        for number, name in enumerate(document.vms, start=1):
            progress.say(f"compiling {name} ({number} of {len(document.vms)})")
            try:
                _compiled(document, name, progress.say)
            except PolicyTooLargeError as error:
                problems.append(Problem(str(source), 0, 0, f"vms.{name}", str(error)))
    if problems:
        raise PolicyError(problems)


def _compiled(
    document: PolicyDocument, vm: str, say: Callable[[str], None] | None = None
) -> tuple[EffectivePolicy, int]:
    """Return the policy of one VM and the bytes of its tables."""
    from vgw.controller.desired import sources_of
    from vgw.policy.compile import compile_policy
    from vgw.policy.resolve import effective_policy

    effective = effective_policy(document, vm)
    sources = sources_of(document.vms[vm].interfaces)
    images = compile_policy(effective, sources=sources, progress=say)
    return effective, sum(len(image.data) for image in images.values())


def _summary(document: PolicyDocument) -> str:
    rules = sum(len(policy.ingress) + len(policy.egress) for policy in document.policies)
    parts = (
        counted(len(document.vms), "VM"),
        counted(len(document.policies), "policy"),
        counted(rules, "rule"),
    )
    return ", ".join(parts)


def _print_findings(
    output: Output, problems: Sequence[Problem], warnings: Sequence[Problem]
) -> None:
    if output is Output.JSON:
        found = {
            "valid": not problems,
            "problems": [asdict(problem) for problem in problems],
            "warnings": [asdict(warning) for warning in warnings],
        }
        print_json(found)
        return
    for severity, findings in (("problem", problems), ("warning", warnings)):
        for finding in findings:
            print_json_line({"severity": severity, **asdict(finding)})


@click.command("compile", epilog=example("vgw compile policy.yaml --vm web01"))
@policy_argument
@vm_option
@output_option
@pass_session
def compile_rules(session: Session, path: Path | None, vm: str, output: Output) -> None:
    """Show the rules of one VM in the order in which they are tried.

    Groups and services are resolved to addresses and ports, and each rule is shown with the file
    and line that it comes from. Nothing is changed.
    """
    from vgw.controller.inventory import read_policy
    from vgw.policy.model import Direction

    source = path or session.paths().policy
    document = read_policy(source)
    if vm not in document.vms:
        raise VgwError(
            f"policy {source} does not name VM {vm}; "
            f"it names {_shortened(sorted(document.vms)) or 'none'}"
        )
    effective, image_bytes = _compiled(document, vm)
    rows = [
        _rule_row(number, rule)
        for direction in Direction
        for number, rule in enumerate(effective.rules(direction), start=1)
    ]
    defaults = {d.value: effective.defaults.action(d).name.lower() for d in Direction}
    found = {"vm": vm, "defaults": defaults, "image_bytes": image_bytes, "rules": rows}
    print_rows(output, found, "rules", _rule_table(effective), empty=f"{vm} has no rules")
    if output is Output.TABLE:
        click.echo("then: " + ", ".join(f"{side} {action}" for side, action in defaults.items()))


def _rule_row(number: int, rule: EffectiveRule) -> dict[str, object]:
    """Return a rule as JSON; `number` counts from 1 in its direction."""
    from vgw.policy.services import range_text, service_text

    return {
        "number": number,
        "direction": rule.direction.value,
        "tier": rule.tier.value,
        "policy": rule.policy,
        "rule": rule.name,
        "action": rule.action.name.lower(),
        "peers": [str(network) for network in rule.peers],
        "local": [str(network) for network in rule.local],
        "services": [service_text(service) for service in rule.services],
        "source_ports": [range_text(ports) for ports in rule.source_ports],
        "log": rule.log,
        "comment": rule.comment,
        "file": rule.file,
        "line": rule.line,
    }


def _rule_table(effective: EffectivePolicy) -> Table:
    from vgw.policy.model import Direction
    from vgw.policy.services import range_text, service_text

    table = Table(
        "#", "DIRECTION", "TIER", "RULE", "ACTION", "PEERS", "SERVICES", "ORIGIN", right="#"
    )
    for direction in Direction:
        for number, rule in enumerate(effective.rules(direction), start=1):
            services = _shortened([service_text(service) for service in rule.services])
            if rule.source_ports:
                services += f" from {_shortened([range_text(p) for p in rule.source_ports])}"
            peers = _networks_text(rule.peers)
            if (local := _networks_text(rule.local)) != "any":
                peers += f" (local {local})"
            table.add(
                number,
                rule.direction,
                rule.tier,
                f"{rule.policy}/{rule.name}",
                rule.action.name.lower() + (" +log" if rule.log else ""),
                peers,
                services,
                f"{rule.file}:{rule.line}",
            )
    return table


def _networks_text(networks: Sequence[Network]) -> str:
    from vgw.policy.model import ANYWHERE

    if tuple(networks) == ANYWHERE:
        return "any"
    texts = [
        str(network.network_address) if network.num_addresses == 1 else str(network)
        for network in networks
    ]
    return _shortened(texts) or "nothing"


def _shortened(texts: Sequence[str]) -> str:
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
