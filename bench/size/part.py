# SPDX-License-Identifier: Apache-2.0
"""The part `size`: what the firewall costs by the number of VMs, of flows and of rules."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.endpoints import PROGRAMS, compile_endpoint
from bench.options import Options, Progress
from bench.paths.checked import Checked
from bench.paths.stats import require_off
from bench.report import Row
from bench.size.flows import measure_flows
from bench.size.rules import measure_rules
from bench.size.vms import measure_vms


def run(options: Options, progress: Progress) -> list[Row]:
    """Return all rows. Raises VgwError."""
    require_off()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checked = Checked.load(directory, stack)
        artefact = compile_endpoint(directory, tuple(PROGRAMS))
        return [
            *measure_vms(options, progress, checked),
            *measure_flows(options, progress, checked, artefact),
            *measure_rules(options, progress, checked, artefact),
        ]
