# SPDX-License-Identifier: Apache-2.0
"""What the controller's socket interface has in common for its server and its client.

`POST /v1/<verb>` takes a JSON object of parameters and answers `{"ok": true, "result": ...}` or
`{"ok": false, "error": {"message": ..., "exit_code": ...}}`. One request a connection. The socket
is mode 0600, and each side must be root or the user that the other runs as.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, Final

from vgw.errors import (
    CompileError,
    ExitCode,
    ForeignProgramError,
    KernelError,
    PartlyAppliedError,
    PolicyError,
    Problem,
    VerifierError,
    VgwError,
)

#: Before the verb in the path of a request.
PREFIX: Final = "/v1/"
_PLAIN_ERRORS: Final = {kind.__name__: kind for kind in (CompileError, ForeignProgramError)}


def error_document(error: VgwError) -> dict[str, Any]:
    """Return an error as it goes over the socket."""
    document: dict[str, Any] = {
        "message": str(error),
        "exit_code": int(error.exit_code),
        "kind": type(error).__name__,
    }
    if isinstance(error, PolicyError):
        document["problems"] = [astuple(problem) for problem in error.problems]
    if isinstance(error, PartlyAppliedError):
        document["failures"] = error.failures
        document["done"] = list(error.done)
    if isinstance(error, KernelError):
        document["errno"] = error.errno
    if isinstance(error, VerifierError):
        document["log"] = error.log
    return document


def error_from_document(document: Mapping[str, Any]) -> VgwError:
    """Return the error that `error_document` described, with the same exit code."""
    message = str(document.get("message", "the controller gave no reason"))
    exit_code = document.get("exit_code", int(ExitCode.FAILED))
    if "problems" in document:
        return PolicyError([Problem(*fields) for fields in document["problems"]])
    if "failures" in document:
        return PartlyAppliedError(dict(document["failures"]), document.get("done", ()))
    if "log" in document:
        return VerifierError(message, document["errno"], document["log"])
    if "errno" in document:
        return KernelError(message, document["errno"])
    error = _PLAIN_ERRORS.get(str(document.get("kind")), VgwError)(message)
    if exit_code != error.exit_code and exit_code in set(ExitCode):
        error.exit_code = ExitCode(exit_code)
    return error
