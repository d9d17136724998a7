# SPDX-License-Identifier: Apache-2.0
"""The command: `python -m tests.fuzz.inputs --target policy`; as root for the socket."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.inputs.hunt import Finding, Result, hunt
from tests.fuzz.inputs.targets import TARGETS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.inputs",
        description="Gives the controller's readers hostile inputs, and keeps those that an "
        "exception escapes on, or that take too much time or memory.",
    )
    parser.add_argument("--target", required=True, choices=tuple(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to look; default 60")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="how many to try at most")
    parser.add_argument("--seed", type=int, help="makes the same inputs again; default: another")
    parser.add_argument("--findings", type=int, default=1, help="stop after so many kinds")
    parser.add_argument("--replay", type=Path, help="give it this file alone")
    parser.add_argument("--out", type=Path, default=Path(), help="where findings are put")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; the exit code is 1 when something is wrong with an input."""
    chosen = _parser().parse_args(arguments)
    target = TARGETS[chosen.target]()
    if chosen.replay is not None:
        with target.running():
            print(target.give(chosen.replay.read_bytes()))
        return 0
    seed = random.SystemRandom().getrandbits(31) if chosen.seed is None else chosen.seed
    result = hunt(
        target, seed, seconds=chosen.seconds, inputs=chosen.inputs, findings=chosen.findings
    )
    print(json.dumps({"target": chosen.target, "seed": seed, **_document(result)}))
    for finding in result.findings.values():
        print(_kept(chosen.target, finding, chosen.out), file=sys.stderr)
    return 1 if result.findings else 0


def _document(result: Result) -> dict[str, object]:
    return {
        "inputs": result.inputs,
        "outcomes": len(result.outcomes),
        "lines": len(result.lines),
        "corpus": result.corpus,
        "slowest_seconds": round(result.slowest, 3),
        "memory_mib": result.memory >> 20,
        "findings": list(result.findings),
    }


def _kept(target: str, finding: Finding, directory: Path) -> str:
    """Write a finding to a file and return what to say about it."""
    name = f"{target}-{hashlib.sha256(finding.data).hexdigest()[:16]}.bin"
    file = directory / name
    file.write_bytes(finding.data)
    return (
        f"{finding.details}\n{finding.what}\ninput: {finding.data[:400]!a}\n"
        f"again: python -m tests.fuzz.inputs --target {target} --replay {file}\n"
        "mend it, and put the input into tests/fuzz/inputs/rows.py"
    )


if __name__ == "__main__":
    sys.exit(main())
