# SPDX-License-Identifier: Apache-2.0
"""The rule that CI skips no bpf or lab test, tried on test files of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MARKERS = "[pytest]\nmarkers =\n  bpf: x\n  lab: x\n"
SKIPPING = """
import pytest

@pytest.mark.{marker}
def test_one():
    pytest.skip("no such device")
"""


def outcome(directory: Path, text: str, **environment: str) -> tuple[int, str]:
    """Run pytest on one test file beside a copy of conftest.py."""
    conftest = Path(__file__).with_name("conftest.py").read_text()
    # What this host lacks is not the subject: only the tests' own skips are.
    directory.joinpath("conftest.py").write_text(
        conftest + "\n\nmissing_for = lambda marker: None\n"
    )
    directory.joinpath("pytest.ini").write_text(MARKERS)
    directory.joinpath("test_file.py").write_text(text)
    clean = {k: v for k, v in os.environ.items() if k not in {"CI", "VGW_CI"}}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(directory)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout


@pytest.mark.parametrize("marker", ["bpf", "lab"])
@pytest.mark.parametrize("environment", [{"VGW_CI": "1"}, {"CI": "true"}])
def test_a_skip_fails_in_ci(tmp_path: Path, marker: str, environment: dict[str, str]) -> None:
    code, output = outcome(tmp_path, SKIPPING.format(marker=marker), **environment)
    assert code == 1
    assert "1 failed" in output
    assert "no such device" in output


def test_a_skip_elsewhere_is_a_skip(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, SKIPPING.format(marker="lab"))
    assert code == 0
    assert "1 skipped" in output


def test_other_skips_stay_skips_in_ci(tmp_path: Path) -> None:
    text = SKIPPING.replace("@pytest.mark.{marker}\n", "")
    code, output = outcome(tmp_path, text, VGW_CI="1")
    assert code == 0
    assert "1 skipped" in output


def test_a_file_that_skips_itself_fails_in_ci(tmp_path: Path) -> None:
    text = "import pytest\n\npytest.skip('not here', allow_module_level=True)\n"
    assert outcome(tmp_path, text)[0] == 5
    code, output = outcome(tmp_path, text, VGW_CI="1")
    assert code == 2
    assert "not here" in output
