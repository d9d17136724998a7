# SPDX-License-Identifier: Apache-2.0
"""What all tests share: when bpf and lab tests are skipped, that CI skips none, the programs."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from bench.flood import Flooder
from bench.native import build
from tests.patience import PATIENCE
from vgw import loader

# An example that takes long on a busy host is no mistake.
hypothesis.settings.register_profile("vgw", deadline=None)
hypothesis.settings.load_profile("vgw")

#: Tests with these markers need more than Python, so they are the ones that get skipped unnoticed.
GUARDED_MARKERS = ("bpf", "lab")
LAB_COMMANDS = ("ip", "nsenter", "ping", "busybox", "prometheus", "promtool")
CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF = 12, 21, 39


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail a test that leaves a thread: it would hold files, time and locks of those to come.

    Libvirt's loop of events is one for the process and cannot be ended; threads that `threading`
    has not started end with their work.
    """
    before = set(threading.enumerate())
    yield
    began = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name != "libvirt" and not isinstance(thread, threading._DummyThread)
    ]
    for thread in began:
        thread.join(PATIENCE)
    assert [thread.name for thread in began if thread.is_alive()] == []


@pytest.fixture(scope="session")
def flooder(tmp_path_factory: pytest.TempPathFactory) -> Flooder:
    """What sends floods of frames, compiled once."""
    return Flooder(build("flood", tmp_path_factory.mktemp("flood")))


def skips_are_failures() -> bool:
    """Return whether this run has to prove that nothing was skipped."""
    return os.environ.get("VGW_CI") == "1" or os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are kept, so that a run compiles them once."""
    return tmp_path_factory.mktemp("programs")


@functools.cache
def missing_for(marker: str) -> str | None:
    """Return what this host lacks for tests with `marker`, None if nothing."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    for bit in (CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF):
        if not effective >> bit & 1:
            return "needs root (loading BPF programs, mounting bpffs)"
    if marker == "lab":
        absent = [command for command in LAB_COMMANDS if shutil.which(command) is None]
        if absent:
            return f"needs {', '.join(absent)}: run scripts/setup.sh --dev"
        if not Path("/dev/net/tun").exists():
            return "needs /dev/net/tun: run modprobe tun"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in GUARDED_MARKERS:
        if item.get_closest_marker(marker) is not None:
            lack = missing_for(marker)
            if lack is not None:
                pytest.skip(lack)


def fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn the report of a skip into that of a failure, keeping its reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    report.outcome = "failed"
    report.longrepr = f"skipped, which this run counts as a failure (CI or VGW_CI is set): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    guarded = any(item.get_closest_marker(marker) for marker in GUARDED_MARKERS)
    if guarded and report.skipped and not hasattr(report, "wasxfail") and skips_are_failures():
        fail_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    # A whole file that skips itself shows no markers; here that is a failure whatever it holds.
    if report.outcome == "skipped" and skips_are_failures():
        fail_skipped(report)
    return report


@pytest.fixture(scope="session")
def artefact(program_cache: Path) -> loader.Artefact:
    """The packet programs, compiled once."""
    return loader.load_artefact(program_cache)
