# SPDX-License-Identifier: Apache-2.0
"""Kill changes at every step: `python -m tests.crash [--every N] [SCENARIO ...]`, as root."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.faults import fail_at_steps
from tests.crash.run import every, kill_at_steps
from tests.crash.scenarios import SCENARIOS
from tests.crash.world import world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], metavar="SCENARIO")
    parser.add_argument("--every", type=int, default=1, help="kill at every so manieth step only")
    parser.add_argument("--cache", help="where compiled programs are kept, for the next run")
    parser.add_argument("--fail", action="store_true", help="let the steps fail instead of killing")
    parser.add_argument("--steps", action="store_true", help="name the steps")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="vgw-crash-") as name:
        cache = Path(options.cache or name, "cache")
        for scenario in options.scenarios or SCENARIOS:
            chosen = SCENARIOS[scenario]
            directory = Path(name, scenario)
            directory.mkdir()
            started = time.monotonic()
            with world(directory, cache, prefer_link=chosen.prefer_link) as made:
                if options.fail:
                    result = fail_at_steps(made, chosen, every(options.every), all_errnos=True)
                else:
                    result = kill_at_steps(made, chosen, every(options.every))
            print(f"{result}, {time.monotonic() - started:.1f} s", flush=True)
            for step in result.steps if options.steps else ():
                print(f"  {step}")
            for line in sorted({*result.errors}) if options.steps else ():
                print(f"  {line}")
            for line in result.problems:
                print(f"  {line}", flush=True)
            failed += len(result.problems)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
