# SPDX-License-Identifier: Apache-2.0
"""The part `size` takes samples of what it says, and of nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bench.lab import BenchError
from bench.options import Options
from bench.paths.checked import Checked
from bench.paths.vary import Frame
from bench.size import vms
from vgw import abi

pytestmark = pytest.mark.lab

OPTIONS = Options(quick=True, rules=(), shape="acl", version=4, seconds=0.1, rounds=1)


def test_packets_of_one_vm_are_no_sample_of_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Negative control: all but one VM refuse these, which costs them less."""

    def of_the_first(path: abi.Path) -> Frame:
        return replace(real(path), shift=63, half_mask=0)

    real = vms._frame
    monkeypatch.setattr(vms, "_frame", of_the_first)
    with ExitStack() as stack:
        checked = Checked.load(tmp_path, stack)
        with pytest.raises(BenchError, match="not every VM had 1000 packets"):
            vms.measure_vms(OPTIONS, lambda _: None, checked)
