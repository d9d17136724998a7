# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verbs that are about this host: controller and doctor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vgw.cli_options import Session, example, output_option, pass_session
from vgw.cli_output import Output, Progress, Table, print_rows
from vgw.errors import ExitCode, VgwError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Endpoint(click.ParamType[tuple[str, int]]):
    """HOST:PORT, with brackets around an IPv6 address."""

    name = "HOST:PORT"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Return host and port."""
        host, colon, port = str(value).rpartition(":")
        if not host or not colon or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is not HOST:PORT, for example 127.0.0.1:9477", param, ctx)
        return host.strip("[]"), int(port)


def _file_option(name: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(name, type=click.Path(path_type=Path), metavar="FILE", help=text)


def checked_sinks(sinks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of sinks; raises click.BadParameter where one names none."""
    from vgw.controller.log_choice import check_sink

    for text in sinks:
        if text == "file":
            continue  # the default, which needs no import
        try:
            check_sink(text)
        except VgwError as error:
            raise click.BadParameter(str(error)) from error
    return sinks


@click.command(epilog=example("vgw controller --listen 127.0.0.1:9477"))
@click.option(
    "--listen",
    type=Endpoint(),
    default="127.0.0.1:9477",
    show_default=True,
    help="Where Prometheus gets the metrics.",
)
@click.option(
    "--log-to",
    "sinks",
    multiple=True,
    default=("file",),
    show_default=True,
    metavar="SINK",
    callback=lambda _context, _parameter, value: checked_sinks(value),
    help="Where the log goes: file[:PATH] (JSON lines, without PATH that of --log), "
    "journal[:SOCKET], syslog[:SOCKET], syslog:udp:HOST:PORT. May be given several times.",
)
@click.option(
    "--log-max-bytes",
    type=click.IntRange(min=0),
    default=100 << 20,
    show_default=True,
    metavar="BYTES",
    help="Rotate log files before they are longer; 0: leave that to others, who send SIGHUP.",
)
@click.option(
    "--log-keep",
    type=click.IntRange(min=0, max=1000),
    default=5,
    show_default=True,
    metavar="COUNT",
    help="So many rotated log files stay.",
)
@click.option("--rule-metrics", is_flag=True, help="Count for each rule too: many series.")
@_file_option("--metrics-cert", "Certificate (PEM) to serve the metrics with by TLS.")
@_file_option("--metrics-key", "Key (PEM) of that certificate.")
@_file_option("--metrics-client-ca", "Who signs certificates (PEM) that clients must have.")
@pass_session
def controller(  # noqa: PLR0913, PLR0917 (the options of the verb)
    session: Session,
    /,
    listen: tuple[str, int],
    sinks: tuple[str, ...],
    log_max_bytes: int,
    log_keep: int,
    rule_metrics: bool,
    metrics_cert: Path | None,
    metrics_key: Path | None,
    metrics_client_ca: Path | None,
) -> None:
    """Run the controller in the foreground.

    It writes the log, serves the metrics, and protects VMs as their interfaces appear, until
    SIGTERM or Ctrl-C; SIGHUP has it read the policy again. Protection does not depend on it: VMs
    stay protected when it stops.
    """
    from vgw.controller.daemon import run
    from vgw.controller.log_choice import LogOptions
    from vgw.controller.metrics_server import Tls

    if (metrics_cert is None) != (metrics_key is None):
        raise click.UsageError("--metrics-cert and --metrics-key need each other")
    if metrics_cert is None and metrics_client_ca is not None:
        raise click.UsageError("--metrics-client-ca needs --metrics-cert and --metrics-key")
    tls = None
    if metrics_cert is not None and metrics_key is not None:
        tls = Tls(metrics_cert, metrics_key, metrics_client_ca)
    log_options = LogOptions(sinks, log_max_bytes, log_keep)
    run(session.paths(), listen, log_options=log_options, rule_metrics=rule_metrics, tls=tls)


@click.command(epilog=example("vgw doctor"))
@output_option
@pass_session
def doctor(session: Session, output: Output) -> int:
    """Check whether this host is fit for vgw.

    Each check says what to do where it fails. Exit code 1 when something is missing that vgw needs.
    """
    from vgw.controller.doctor import examine

    with Progress() as progress:
        progress.say("checking this host")
        rows = examine(session.paths())
    table = Table("CHECK", "RESULT", "FOUND", "WHAT TO DO")
    for row in rows:
        result = ("warning" if row["fix"] else "ok") if row["ok"] else "FAILED"
        table.add(row["check"], result, row["detail"], row["fix"])
    print_rows(output, {"checks": rows}, "checks", table, empty="")
    return ExitCode.OK if all(row["ok"] for row in rows) else ExitCode.FAILED
