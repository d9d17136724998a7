# SPDX-License-Identifier: Apache-2.0
"""One lab for all lab tests of a run; each test finds it with nothing attached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab import wire
from tests.lab.devices import Devices, devices_in
from tests.lab.kernel_log import KernelLog
from tests.lab.topology import Lab, remove_leftovers, run_script

PREFIX, VIRTIO_PREFIX = "vgw-t", "vgw-v"


@pytest.fixture(scope="session")
def kernel_log() -> Iterator[KernelLog]:
    """The kernel's log from the start of the run."""
    log = KernelLog()
    yield log
    log.close()


@pytest.fixture(autouse=True)
def _quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """No test makes the kernel warn of itself."""
    yield
    alarms = kernel_log.alarms()
    assert not alarms, "the kernel's log:\n" + "\n".join(alarms)


@pytest.fixture
def devices(tmp_path: Path, program_cache: Path) -> Iterator[Devices]:
    """A host of its own for one test, which is in its network namespace."""
    with devices_in(tmp_path, program_cache) as made:
        yield made


@pytest.fixture(scope="session")
def built_lab() -> Iterator[Lab]:
    """Build the lab, and remove it whatever happens."""
    remove_leftovers(PREFIX)
    name = f"{PREFIX}{os.getpid()}"
    run_script(name, "up")
    lab = Lab(name)
    remove_policy(lab)
    yield lab
    run_script(name, "down")


@pytest.fixture(scope="session")
def virtio_lab() -> Iterator[Lab]:
    """Build a lab in which web01 leaves out checksums and segmentation, and remove it."""
    remove_leftovers(VIRTIO_PREFIX)
    name = f"{VIRTIO_PREFIX}{os.getpid()}"
    run_script(name, "up", offload=True)
    lab = Lab(name)
    remove_policy(lab)
    yield lab
    run_script(name, "down")


@pytest.fixture(scope="module", params=["built_lab", "virtio_lab"])
def cards(request: pytest.FixtureRequest) -> Lab:
    """Either lab in turn."""
    lab: Lab = request.getfixturevalue(request.param)
    return lab


@pytest.fixture(scope="module", params=[True, False], ids=["left-out", "filled-in"])
def checksums(cards: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Either lab, its host leaving checksums to receivers or filling them in on the way out."""
    interfaces = ("tap-web01", "veth-db01", "veth-client")
    for name in interfaces:
        wire.leave_checksums(cards.host, name, to_card=request.param)
    yield cards
    for name in interfaces:
        wire.leave_checksums(cards.host, name, to_card=True)


def remove_policy(lab: Lab) -> None:
    """Make room for a test's own policy."""
    for path in lab.policy_dir.iterdir():
        path.unlink()


def unprotect(lab: Lab) -> None:
    """Leave nothing of a test behind."""
    lab.vgw("detach", "--all")
    remove_policy(lab)


def left_as_found(lab: Lab) -> Iterator[Lab]:
    """Unprotect a lab after its use, and see that its nodes are what they were."""
    before = lab.addressing()
    yield lab
    unprotect(lab)
    assert lab.addressing() == before


@pytest.fixture
def lab(built_lab: Lab) -> Iterator[Lab]:
    """The lab with nothing attached, for one test."""
    yield from left_as_found(built_lab)


@pytest.fixture(scope="module")
def module_lab(built_lab: Lab) -> Iterator[Lab]:
    """The lab for all tests of a module, which share what they attach."""
    yield from left_as_found(built_lab)
