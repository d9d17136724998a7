# SPDX-License-Identifier: Apache-2.0
"""libvirt's hook as libvirt runs it: a script, three words, and a domain's XML on stdin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.process import Controller, environment_of, eventually
from tests.controller.test_finding_sources import MAC, interface, xml
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host

pytestmark = pytest.mark.bpf

SCRIPT = Path(__file__).parents[2] / "contrib/libvirt/qemu"
POLICY = (
    "schema: vgw/v1\nvms: {web01: {labels: {role: web}}, db01: {interfaces: [{name: tap-db}]}}\n"
)
PROTECT_ALL = "schema: vgw/v1\nprotect: all\nfind: [libvirt]\n"

Hook = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def places(paths: Paths) -> Iterator[Paths]:
    paths.policy.write_text(POLICY)
    yield paths
    Host(paths).detach_all()


@pytest.fixture
def script(places: Paths, tmp_path: Path) -> Path:
    """The hook, installed: it says where vgw and the settings of this host are."""
    vgw, settings = tmp_path / "vgw", tmp_path / "hook.conf"
    run = f'#!/bin/sh\nexec {sys.executable} -c "from vgw.cli import main; main()" "$@"\n'
    vgw.write_text(run)
    vgw.chmod(0o755)
    settings.write_text(
        "".join(f"export {name}={path}\n" for name, path in environment_of(places).items())
    )
    installed = tmp_path / "qemu"
    text = SCRIPT.read_text().replace("/usr/local/bin/vgw", str(vgw))
    installed.write_text(text.replace("/etc/vgw/libvirt-hook.conf", str(settings)))
    installed.chmod(0o755)
    return installed


@pytest.fixture
def hook(script: Path) -> Hook:
    def call(name: str, operation: str, text: str) -> subprocess.CompletedProcess[str]:
        # libvirt gives its hooks hardly any environment.
        return subprocess.run(
            [script, name, operation, "begin", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": "/nowhere", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )

    return call


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line by which a start was refused."""
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def passes(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.stdout == "", "libvirt would take it for another XML"
    return done.returncode == 0


def attached(places: Paths) -> dict[str, list[str]]:
    rows = Host(places).status()["vms"]
    return {
        row["vm"]: [each["name"] for each in row["interfaces"] if each["attached"]] for row in rows
    }


def test_a_vm_is_protected_before_it_runs(
    hook: Hook, places: Paths, tap: Callable[[str], int]
) -> None:
    assert passes(hook("web01", "prepare", xml("web01", interface(MAC, None))))
    assert passes(hook("web01", "start", xml("web01", interface(MAC, "tap7"))))
    assert attached(places) == {}, "its TAP comes later"

    tap("tap7")
    whole = xml("web01", interface(MAC, "tap7"))
    assert passes(hook("web01", "start", whole))
    assert attached(places) == {"web01": ["tap7"]}
    (endpoint,) = Host(places).open_endpoints("web01")
    with endpoint:
        config = endpoint.maps.config()
    assert bytes(config.mac)[:6].hex(":") == MAC
    for operation in ("started", "reconnect"):
        assert passes(hook("web01", operation, whole)), "again is harmless"


def test_what_ends_is_forgotten(hook: Hook, places: Paths, veth: Callable[[str], str]) -> None:
    veth("tap7")
    whole = xml("web01", interface(MAC, "tap7"))
    assert passes(hook("web01", "started", whole))
    subprocess.run(["ip", "link", "del", "tap7"], check=True)
    for operation in ("stopped", "release"):
        assert passes(hook("web01", operation, whole))
    assert attached(places) == {}
    assert not list(places.bpffs.glob("v*/web01"))


def test_a_vm_that_nobody_names_is_not_touched(
    hook: Hook, places: Paths, tap: Callable[[str], int]
) -> None:
    tap("tap7")
    whole = xml("other", interface(MAC, "tap7"), interface(MAC, "x", "direct"))
    for operation in ("prepare", "start", "started", "migrate", "nonsense"):
        assert passes(hook("other", operation, whole))
    assert attached(places) == {}

    places.inventory.write_text(PROTECT_ALL)
    assert passes(hook("other", "started", xml("other", interface(MAC, "tap7"))))
    assert attached(places) == {"other": ["tap7"]}


@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
def test_a_vm_that_cannot_be_protected_does_not_start(hook: Hook, operation: str) -> None:
    text = xml("web01", interface(MAC, "macvtap0", "direct"))
    assert "interface of type direct" in refused(hook("web01", operation, text))


def test_a_vm_whose_tap_is_not_there_does_not_go_on(hook: Hook) -> None:
    text = xml("web01", interface(MAC, "tap7"))
    assert "tap7" in refused(hook("web01", "started", text))
    nameless = xml("web01", interface(MAC, None))
    assert "does not name all" in refused(hook("web01", "started", nameless))


def test_what_is_written_of_a_vm_has_to_be_there(
    hook: Hook, places: Paths, tap: Callable[[str], int]
) -> None:
    tap("tap7")
    line = refused(hook("db01", "started", xml("db01", interface(MAC, "tap7"))))
    assert "interface tap-db of VM db01 does not exist" in line
    tap("tap-db")
    done = hook("db01", "started", xml("db01", interface(MAC, "tap7"), interface(MAC, "tap-db")))
    assert passes(done)
    assert "tap7 is not protected: other interfaces of the VM are listed" in done.stderr
    assert attached(places) == {"db01": ["tap-db"]}


def test_a_policy_that_cannot_be_read_lets_no_vm_start(hook: Hook, places: Paths) -> None:
    places.policy.write_text(POLICY + "nonsense: 1\n")
    done = hook("other", "prepare", xml("other"))
    assert done.returncode != 0
    assert "unknown key 'nonsense'" in done.stderr


def test_a_host_that_is_not_fit_lets_no_vm_start(hook: Hook, script: Path, tmp_path: Path) -> None:
    settings = tmp_path / "hook.conf"
    settings.write_text(settings.read_text() + f"export VGW_BPFFS={tmp_path}/none\n")
    assert "bpffs" in refused(hook("web01", "prepare", xml("web01"))).lower()
    script.write_text(script.read_text().replace(str(tmp_path / "vgw"), "/nowhere/vgw"))
    assert "cannot be run" in refused(hook("other", "prepare", xml("other")))
    assert hook("other", "release", xml("other")).returncode == 0, "an end is never held up"


def test_xml_of_another_vm_is_refused(hook: Hook) -> None:
    assert "is that of db01" in refused(hook("web01", "start", xml("db01")))
    assert "cannot be read" in refused(hook("web01", "start", "<domain>"))


def test_a_controller_that_runs_does_the_work(
    hook: Hook, places: Paths, tap: Callable[[str], int]
) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    controller = Controller(places, 9477)
    try:
        tap("tap7")
        assert passes(hook("web01", "started", xml("web01", interface(MAC, "tap7"))))
        assert controller.attached() == {"web01": 1}
        (row,) = [each for each in controller.client.vms()["vms"] if each["vm"] == "web01"]
        assert (row["source"], row["interfaces"][0]["mac"]) == ("told", MAC)
        subprocess.run(["ip", "link", "del", "tap7"], check=True)
        eventually("it is gone", lambda: not controller.attached())
    finally:
        controller.end(signal.SIGTERM)


def test_a_controller_without_a_policy_does_not_let_vms_start(hook: Hook, places: Paths) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    places.policy.write_text(POLICY + "nonsense: 1\n")
    controller = Controller(places, 9477)
    try:
        assert hook("other", "prepare", xml("other")).returncode != 0
        places.policy.unlink()
        assert passes(hook("other", "prepare", xml("other"))), (
            "where nothing is asked for, all start"
        )
    finally:
        controller.end(signal.SIGTERM)
