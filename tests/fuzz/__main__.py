# SPDX-License-Identifier: Apache-2.0
"""The command of the fuzzer: `python -m tests.fuzz --help`, as root."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.run import Result, Settings, WorkerDiedError, run
from tests.fuzz.summary import document, problems, progress, text
from vgw import loader
from vgw.cli_output import Progress
from vgw.errors import VgwError
from vgw.policy.model import Hook

_HOOKS = {"xdp": (Hook.XDP,), "tc": (Hook.TC,), "both": (Hook.XDP, Hook.TC)}
_DEFAULT_SECONDS = 60.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Gives the loaded programs and the reference evaluator the same hostile "
        "packets, and prints what they do not agree on as a row for the verdict tables.",
    )
    parser.add_argument("--seconds", type=float, help="how long to look; default 60")
    parser.add_argument("--packets", type=int, help="how many packets to try")
    parser.add_argument("--seed", type=int, help="makes the same packets again; default: another")
    parser.add_argument("--sequence", type=int, help="try only this sequence of the seed")
    parser.add_argument("--jobs", type=int, help="processes; default: one for each CPU")
    parser.add_argument("--hook", choices=tuple(_HOOKS), default="both")
    parser.add_argument(
        "--findings", type=int, default=1, help="stop after disagreements of so many kinds"
    )
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file as well")
    return parser


def _settings(chosen: argparse.Namespace) -> Settings:
    seconds = chosen.seconds
    if seconds is None and chosen.packets is None and chosen.sequence is None:
        seconds = _DEFAULT_SECONDS
    jobs = chosen.jobs or len(os.sched_getaffinity(0))
    return Settings(
        seed=random.SystemRandom().getrandbits(31) if chosen.seed is None else chosen.seed,
        seconds=seconds,
        packets=chosen.packets,
        jobs=1 if chosen.sequence is not None else jobs,
        hooks=_HOOKS[chosen.hook],
        findings=chosen.findings,
        sequence=chosen.sequence,
    )


def _run(settings: Settings) -> Result:
    """Compile the programs and run the fuzzer, with a line that says how far it is."""
    with tempfile.TemporaryDirectory() as directory, Progress() as line:
        line.say("compiling the programs")
        artefact = loader.load_artefact(Path(directory))

        def say(result: Result) -> None:
            line.say(progress(result))

        return run(settings, artefact, say)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; the exit code is 1 when engines disagree or were given too little."""
    chosen = _parser().parse_args(arguments)
    settings = _settings(chosen)
    print(f"seed {settings.seed}", file=sys.stderr)
    try:
        result = _run(settings)
    except (VgwError, WorkerDiedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    made = json.dumps(document(result), indent=2)
    print(made if chosen.output == "json" else text(result))
    if chosen.out is not None:
        chosen.out.write_text(made + "\n")
    return 1 if problems(result) else 0


if __name__ == "__main__":
    sys.exit(main())
