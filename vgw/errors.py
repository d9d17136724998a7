# SPDX-License-Identifier: Apache-2.0
"""The errors vgw raises on purpose: each says what went wrong, where, and what to do.

The CLI prints the text on one line and exits with `exit_code`; anything that is not a VgwError
is a bug in vgw.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class ExitCode(enum.IntEnum):
    """Exit codes of every verb of the CLI."""

    OK = 0
    FAILED = 1
    USAGE = 2
    POLICY_INVALID = 3
    CONTROLLER_UNREACHABLE = 4
    PARTLY_APPLIED = 5


class VgwError(Exception):
    """A failure that a user can understand and act on."""

    exit_code = ExitCode.FAILED


class KernelError(VgwError):
    """A kernel call failed; `errno` is its number."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class CompileError(VgwError):
    """The packet programs did not compile; the text names the header and line."""


class VerifierError(KernelError):
    """The kernel refused a program; `log` is the tail of the verifier's log."""

    def __init__(self, message: str, errno: int, log: str) -> None:
        super().__init__(message, errno)
        self.log = log


class ForeignProgramError(VgwError):
    """Somebody else's program sits where vgw would attach."""


class ControllerUnreachableError(VgwError):
    """The controller does not answer on its socket."""

    exit_code = ExitCode.CONTROLLER_UNREACHABLE


class PartlyAppliedError(VgwError):
    """Some VMs were changed and some were not.

    `failures` says of which VM what failed, `done` has what became of the others: the fields of
    reconcile.AttachResult of each.
    """

    exit_code = ExitCode.PARTLY_APPLIED

    def __init__(self, failures: dict[str, str], done: Sequence[Mapping[str, Any]] = ()) -> None:
        lines = "; ".join(f"{vm}: {text}" for vm, text in sorted(failures.items()))
        super().__init__(f"failed for {len(failures)} VM(s): {lines}")
        self.failures = failures
        self.done = tuple(done)


def out_of_memory() -> VgwError:
    """Return the error for what ended for want of memory."""
    return VgwError(
        "out of memory; free some on this host, or raise the memory limit of vgw's control group, "
        "and try again"
    )


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a policy file; line and column count from 1, 0 where there is none."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}"


class PolicyError(VgwError):
    """A policy is invalid; `problems` holds every mistake found, in file order."""

    exit_code = ExitCode.POLICY_INVALID

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)
