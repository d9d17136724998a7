# SPDX-License-Identifier: Apache-2.0
"""The `vgw` command: its global options, its verbs, and the one place that reports failures.

Nothing heavy is imported here: `vgw --help` must start fast, so each verb imports what it needs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from vgw import __version__
from vgw.cli_environment import require_own_code
from vgw.cli_options import Session, example
from vgw.cli_text import counted
from vgw.cli_verbs_conntrack import conntrack
from vgw.cli_verbs_history import confirm, history, rollback
from vgw.cli_verbs_host import controller, doctor
from vgw.cli_verbs_mode import mode, quarantine, release
from vgw.cli_verbs_policy import check, compile_rules
from vgw.cli_verbs_protect import apply, attach, detach
from vgw.cli_verbs_show import logs, rules, status
from vgw.cli_verbs_simulate import simulate
from vgw.cli_verbs_top import top
from vgw.errors import ExitCode, PolicyError, VerifierError, VgwError

#: What a shell expects of a command that Ctrl-C stopped: 128 + SIGINT.
EXIT_INTERRUPTED = 130

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Cli(click.Group):
    """A group that turns every failure into one line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in the order in which a user meets them, not by the alphabet."""
        return list(self.commands)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit; with `standalone_mode` False errors are raised instead."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            sys.exit(report(error))
        sys.exit(code if isinstance(code, int) else ExitCode.OK)


def report(error: Exception) -> int:
    """Say on stderr what went wrong and return the exit code.

    An error that is none of vgw's own is a bug. VGW_DEBUG=1 shows the traceback of any error.
    """
    if os.environ.get("VGW_DEBUG") == "1":
        traceback.print_exception(error)
    code = (
        error.exit_code if isinstance(error, click.ClickException | VgwError) else ExitCode.FAILED
    )
    match error:
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
        case click.UsageError():
            asked = error.ctx.command_path if error.ctx else "vgw"
            _say(f"{error.format_message().rstrip('.')} (see '{asked} --help')")
        case click.ClickException():
            _say(error.format_message())
        case PolicyError():
            click.echo(str(error), err=True)
            _say(f"{counted(len(error.problems), 'problem')} in the policy, nothing was changed")
        case VerifierError():
            _say(str(error))
            click.echo(error.log.rstrip(), err=True)
        case VgwError():
            _say(str(error))
        case OSError() if error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            advice = "; run vgw as root" if isinstance(error, PermissionError) else ""
            _say(f"{where}{error.strerror}{advice}")
        case _:
            _say(
                f"this is a bug: {type(error).__name__}: {error}; "
                "please report it with what VGW_DEBUG=1 shows"
            )
    return int(code)


def _say(text: str) -> None:
    """Print one line of an error, whatever line breaks its parts brought along."""
    parts = (part.strip() for part in text.splitlines())
    click.echo(f"vgw: {'; '.join(part for part in parts if part)}", err=True)


def _path_option(
    name: str, variable: str, default: str, text: str
) -> Callable[[_Function], _Function]:
    return click.option(
        name,
        envvar=variable,
        type=click.Path(readable=False, path_type=Path),
        metavar="PATH",
        help=f"{text}  [variable: {variable}; default: {default}]",
    )


@click.group(
    "vgw",
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 policy invalid, 4 controller not reachable, "
    "5 partly applied.\n\n" + example("vgw --policy policy.yaml attach --vm web01"),
)
@click.version_option(__version__, prog_name="vgw", message="%(prog)s %(version)s")
@_path_option("--policy", "VGW_POLICY", "/etc/vgw/policy.d", "Policy file or directory.")
@_path_option("--run-dir", "VGW_RUN_DIR", "/run/vgw", "Lock and socket of the controller.")
@_path_option("--state-dir", "VGW_STATE_DIR", "/var/lib/vgw", "What vgw remembers of each VM.")
@_path_option("--bpffs", "VGW_BPFFS", "/sys/fs/bpf/vgw", "Where programs and maps are pinned.")
@_path_option("--cache-dir", "VGW_CACHE_DIR", "/var/cache/vgw", "Compiled packet programs.")
@_path_option("--log", "VGW_LOG", "/var/log/vgw/events.jsonl", "Log file of the controller.")
@click.pass_context
def cli(ctx: click.Context, /, **paths: Path | None) -> None:
    """Firewall for virtual machines, in the host's kernel.

    Write a policy, check it, attach VMs to protect them, and see in status, rules and logs what
    it does.
    """
    if os.geteuid() == 0:
        require_own_code(os.environ)
    source = ctx.get_parameter_source("policy")
    ctx.obj = Session.from_options(paths, policy_named=source is ParameterSource.COMMANDLINE)


for _verb in (
    attach,
    detach,
    status,
    check,
    compile_rules,
    apply,
    confirm,
    rollback,
    history,
    simulate,
    rules,
    logs,
    top,
    conntrack,
    mode,
    quarantine,
    release,
    controller,
    doctor,
):
    cli.add_command(_verb)


def main() -> None:
    """Run the `vgw` command; the entry point of the package."""
    cli.main(prog_name="vgw")
