# SPDX-License-Identifier: Apache-2.0
"""Where things live, and that no name of a VM leaves its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from vgw.abi import ABI_VERSION
from vgw.controller.paths import Paths, pin_name, unpin_name
from vgw.errors import VgwError

ODD_NAMES = [
    "web01",
    "tap-web_01",
    "../../etc",
    "a/b",
    ".",
    "%41",
    "100%",
    "line\nbreak",
    "\x1b[31m",
    "münchen",
    "events",
    "images",
    "eth0.100",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_catalogue_N6_a_name_becomes_one_component_of_a_path_and_back(name: str) -> None:
    pinned = pin_name(name)

    assert not set(pinned) & set("./\n\x1b")
    assert pinned not in ("", "events", "images")
    assert unpin_name(pinned) == name


def test_catalogue_N6_names_differ_when_pinned() -> None:
    assert len({pin_name(name) for name in ODD_NAMES}) == len(ODD_NAMES)


@pytest.mark.parametrize("name", ["", "x" * 65536, "/" * 80, "a\ud800"])
def test_catalogue_N6_a_name_that_no_file_can_have_is_refused_in_one_short_line(name: str) -> None:
    with pytest.raises(VgwError, match=r"no name for a VM .* 1 to 63 letters") as caught:
        pin_name(name)

    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("pinned", ["events", "images", "%4", "%zz", "a.b", "", "%41", "%ff"])
def test_what_was_not_made_by_pin_name_is_no_name(pinned: str) -> None:
    assert unpin_name(pinned) is None


def test_defaults_are_those_of_the_manual() -> None:
    paths = Paths.from_environment({})

    assert paths.policy == Path("/etc/vgw/policy.d")
    assert paths.socket == Path("/run/vgw/vgw.sock")
    assert paths.manifest("web.01") == Path("/var/lib/vgw/vms/web%2e01.json")
    assert paths.endpoint_dir("web01", "eth0.5") == Path(
        f"/sys/fs/bpf/vgw/v{ABI_VERSION}/web01/eth0%2e5"
    )
    assert paths.events == Path(f"/sys/fs/bpf/vgw/v{ABI_VERSION}/events")
    assert paths.cache_dir == Path("/var/cache/vgw")
    assert paths.log_file == Path("/var/log/vgw/events.jsonl")


def test_an_option_beats_a_variable_which_beats_the_default(tmp_path: Path) -> None:
    environ = {"VGW_RUN_DIR": "/elsewhere", "VGW_STATE_DIR": "/state", "VGW_BPFFS": ""}

    paths = Paths.from_environment(environ, run_dir=tmp_path)

    assert paths.run_dir == tmp_path
    assert paths.state_dir == Path("/state")
    assert paths.bpffs == Path("/sys/fs/bpf/vgw")
