# SPDX-License-Identifier: Apache-2.0
"""What the verbs of the CLI share: their session (paths and target) and their common options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vgw.cli_output import Output
from vgw.cli_target import Target, connect

if TYPE_CHECKING:
    from vgw.controller.paths import Paths

_Verb = TypeVar("_Verb", bound=Callable[..., Any])

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 6 * 86400

#: Global option -> the field of Paths that it sets.
_FIELDS = {"log": "log_file"}


@dataclass(frozen=True)
class Session:
    """One run of the command: the paths it was given.

    `policy_named` tells whether the policy was named on the command line, not by the environment.
    """

    overrides: Mapping[str, Path] = field(default_factory=dict)
    policy_named: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Path | None], *, policy_named: bool) -> Session:
        """Return the session for the global options; those not given keep their defaults."""
        given = {_FIELDS.get(name, name): path for name, path in options.items() if path}
        return cls(given, policy_named)

    def paths(self) -> Paths:
        """Return where everything lives."""
        from vgw.controller.paths import Paths  # noqa: PLC0415 - see cli.py: a fast start

        return Paths.from_environment(None, **self.overrides)

    def target(self, progress: Callable[[str], None] | None = None) -> Target:
        """Return who does the work: the running controller, or else this process.

        `progress` is told what takes long.
        """
        return connect(self.paths(), progress)


class Duration(click.ParamType[float]):
    """A time such as 500ms, 60s, 5m, 2h or 1h30m; its value is in seconds."""

    name = "TIME"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        text = str(value)
        parts = re.findall(r"([0-9]{1,9})(ms|s|m|h|d)", text)
        seconds = sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts)
        if "".join(number + unit for number, unit in parts) != text or not 0 < seconds <= _LONGEST:
            self.fail(f"{text!r} is not a time of at most 6d, such as 60s or 5m", param, ctx)
        return float(seconds)


pass_session = click.make_pass_decorator(Session)


def output_option(verb: _Verb) -> _Verb:
    """Add `-o table|json|jsonl`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice([output.value for output in Output]),
        callback=lambda _context, _parameter, value: Output(value),
        default=Output.TABLE.value,
        show_default=True,
        help="A table, one JSON document, or one JSON line for each row.",
    )(verb)


def example(command: str) -> str:
    """Return the example at the end of a verb's help, in a paragraph that click does not fill."""
    return f"\b\nExample:\n  {command}"


def vm_option(verb: _Verb) -> _Verb:
    """Add a required `--vm NAME`."""
    return click.option("--vm", required=True, metavar="NAME", help="The VM.")(verb)


def policy_argument(verb: _Verb) -> _Verb:
    """Add an optional PATH of a policy, which otherwise is that of the global options."""
    return click.argument(
        "path", required=False, metavar="[PATH]", type=click.Path(readable=False, path_type=Path)
    )(verb)
