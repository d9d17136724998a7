# SPDX-License-Identifier: Apache-2.0
"""VM names that are paths, commands or control characters, all the way to the host and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.core import Metric

from vgw.controller.events import LogWriter, control_record
from vgw.controller.metrics import ApplyTimes, HostCollector
from vgw.controller.metrics_text import render
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
NAMES = ("../../etc", "line\nbreak \x1b[31m", "%n%s%41 w\u0435b\u202e", 'quote"\\ nul\0')
REFUSED = ("", "x" * 65536, "\ud800")


def files_of(directory: Path) -> set[str]:
    return {str(path) for path in directory.rglob("*") if "bpffs" not in path.parts}


def test_catalogue_N6_a_name_stays_within_vgws_places_and_goes_with_the_vm(
    host: Host, tap: Tap
) -> None:
    """A name on the command line need not be in a policy, so it can be anything."""
    tap("tap0")
    root = host.paths.run_dir.parent
    before = files_of(root)
    log = LogWriter(host.paths.log_file)
    for name in NAMES:
        host.attach(None, name, interfaces=["tap0"])
        assert host.attached() == [name]
        assert host.paths.vm_dir(name).parent == host.paths.pins
        (reading,) = read_endpoints(host)
        assert reading.vm == name
        text = render(_families(host)).decode()
        assert all(line.startswith(("#", "vgw_")) for line in text.splitlines())
        log.add(control_record("attach", vm=name))
        host.detach(name)
        assert host.attached() == []
    log.close()
    lines = host.paths.log_file.read_text().split("\n")
    assert [json.loads(line)["vm"] for line in lines if line] == list(NAMES)
    assert all(line.isprintable() for line in lines)
    assert files_of(root) - before <= {str(host.paths.log_file), str(host.paths.state_dir)}


def _families(host: Host) -> list[Metric]:
    return list(HostCollector(lambda: read_endpoints(host), dict, ApplyTimes()).collect())


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name[:8]))
def test_catalogue_N6_a_name_that_no_file_can_have_is_refused(
    host: Host, tap: Tap, name: str
) -> None:
    tap("tap0")
    with pytest.raises(VgwError, match="is no name for a VM") as raised:
        host.attach(None, name, interfaces=["tap0"])
    assert len(str(raised.value)) < 200
    assert str(raised.value).isprintable()
    assert host.attached() == []
