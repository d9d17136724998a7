# SPDX-License-Identifier: Apache-2.0
"""The doctor: a row for each thing, and for what is wrong a way to put it right."""

from __future__ import annotations

import dataclasses
import errno
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.observe import row
from tests.controller.policies import document
from vgw import libbpf
from vgw.controller import fitness
from vgw.controller.daemon import run
from vgw.controller.doctor import examine
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import KernelError, VgwError
from vgw.policy.model import Hook


@pytest.mark.bpf
def test_a_fit_host_has_nothing_to_fix(paths: Paths) -> None:
    rows = examine(paths)

    assert {row["check"] for row in rows} >= {"kernel", "bpf", "bpffs", "bcc", "headers", "cache"}
    assert [row for row in rows if not row["ok"] or row["fix"] is not None] == []
    details = {row["check"]: row["detail"] for row in rows}
    assert details["kernel"] == platform.release()
    assert "XDP programs are attached by" in details["xdp link"] or "netlink" in details["xdp link"]


@pytest.mark.bpf
def test_what_is_wrong_comes_with_what_to_do(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = dataclasses.replace(
        paths, bpffs=tmp_path / "plain" / "vgw", cache_dir=tmp_path / "file" / "cache"
    )

    rows = {row["check"]: row for row in examine(wrong)}

    assert not rows["bpffs"]["ok"]
    own = tmp_path / "plain" / "vgw"
    assert rows["bpffs"]["fix"] == f"run `mkdir -p {own} && mount -t bpf bpf {own}`"
    assert not rows["cache"]["ok"]
    assert "VGW_CACHE_DIR" in rows["cache"]["fix"]


@pytest.mark.bpf
def test_a_kernel_without_a_description_of_its_types_is_said(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> tuple[str, ...]:
        raise VgwError("cannot learn the layout; use another kernel")

    monkeypatch.setattr("vgw.controller.doctor.socket_buffer_options", refuse)
    (row,) = (row for row in examine(paths) if row["check"] == "btf")
    assert (row["ok"], row["fix"]) == (False, "use another kernel")


@pytest.mark.bpf
def test_a_kernel_that_lets_no_program_read_it_is_said(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgw.controller.doctor.reads_directly", lambda: False)
    unknown = bytes.fromhex("85000000ffff0000")  # a call of a function that no kernel has
    monkeypatch.setattr("vgw.controller.doctor._READ_KERNEL", unknown)
    (row,) = (row for row in examine(paths) if row["check"] == "btf")
    assert (row["ok"], row["fix"]) == (False, "boot without lockdown=confidentiality")


@pytest.mark.parametrize(
    ("release", "ok"),
    [
        ("5.10.0-30-amd64", False),
        ("6.1.0-26-amd64", False),
        ("6.1.113", True),
        ("6.6.54", False),
        ("6.12.1-generic", True),
        ("odd", False),
    ],
)
@pytest.mark.bpf
def test_kernels(paths: Paths, monkeypatch: pytest.MonkeyPatch, release: str, ok: bool) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)

    (row,) = (row for row in examine(paths) if row["check"] == "kernel")

    assert row["ok"] is ok
    assert (row["fix"] is None) is ok


def test_without_rights_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "missing_capabilities", lambda: ["CAP_BPF"])

    with pytest.raises(VgwError, match=r"no permission .* CAP_BPF is missing; run vgw as root, or"):
        fitness.require_capabilities()


@pytest.mark.parametrize(("path", "kind"), [("/proc", "proc"), ("/sys", "sysfs")])
def test_types_of_file_systems(path: str, kind: str) -> None:
    assert fitness.filesystem_type(Path(path)) == kind


def test_the_default_bpffs_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "filesystem_type", lambda _: "sysfs")

    with pytest.raises(VgwError, match=r"`mount -t bpf bpf /sys/fs/bpf`$"):
        fitness.require_bpffs(Path("/sys/fs/bpf/vgw"))


# --- kernels that lack something ------------------------------------------------------------


def row_of(check: str, paths: Paths) -> tuple[bool, str, str | None]:
    (row,) = (row for row in examine(paths) if row["check"] == check)
    return row["ok"], row["detail"], row["fix"]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where settings of a pretended kernel are."""
    monkeypatch.setattr("vgw.controller.doctor._SETTINGS", tmp_path / "sys")
    return tmp_path / "sys"


@pytest.mark.bpf
@pytest.mark.parametrize(
    ("check", "name", "fit", "unfit"),
    [
        ("jit", "net/core/bpf_jit_enable", "1", "0"),
        ("unprivileged", "kernel/unprivileged_bpf_disabled", "2", "0"),
    ],
)
def test_catalogue_M28_settings_that_matter(  # noqa: PLR0917
    paths: Paths, settings: Path, check: str, name: str, fit: str, unfit: str
) -> None:
    assert row_of(check, paths)[2] is None, "a kernel without the setting"
    file = settings / name
    file.parent.mkdir(parents=True)
    file.write_text(f"{fit}\n")
    assert row_of(check, paths)[2] is None
    file.write_text(f"{unfit}\n")
    ok, _, fix = row_of(check, paths)
    assert ok, "vgw works all the same"
    assert f"sysctl -w {name.replace('/', '.')}=" in str(fix)


@pytest.mark.bpf
def test_catalogue_M28_without_tcx_the_clsact_qdisc_is_tried_where_it_touches_nothing(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row_of("clsact", paths)[0]
    monkeypatch.setattr("vgw.controller.doctor._tcx_known", lambda: False)
    before = Path("/proc/thread-self/ns/net").readlink()
    assert row_of("clsact", paths) == (True, "tc filters of a clsact qdisc can be attached", None)
    assert Path("/proc/thread-self/ns/net").readlink() == before

    def refuse(_: int) -> bool:
        raise KernelError("cannot add a clsact qdisc to lo: No such file or directory", 2)

    monkeypatch.setattr("vgw.controller.links_netlink.add_clsact", refuse)
    ok, detail, fix = row_of("clsact", paths)
    assert not ok
    assert "neither links for tc nor the clsact qdisc" in detail
    assert "sch_ingress" in str(fix)


@pytest.mark.bpf
def test_catalogue_M28_a_kernel_that_loads_no_programs_is_refused_at_the_start(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitness.require_programs()

    def refuse(*_: object) -> int:
        raise KernelError("refused", 22)

    with monkeypatch.context() as patch:
        patch.setattr("vgw.libbpf.prog_load", refuse)
        with pytest.raises(VgwError, match="loads no tc programs") as refused:
            run(paths, ("127.0.0.1", 0))
        assert "\n" not in str(refused.value)

    def unknown() -> tuple[str, ...]:
        raise VgwError("this kernel does not describe its types; use another kernel")

    monkeypatch.setattr("vgw.controller.fitness.socket_buffer_options", unknown)
    with pytest.raises(VgwError, match="does not describe its types"):
        run(paths, ("127.0.0.1", 0))
    assert not paths.bpffs.exists()
    assert not paths.socket.exists()


@pytest.mark.bpf
def test_catalogue_M28_a_kernel_without_native_xdp_and_links_attaches_otherwise(
    paths: Paths, tap: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own answers where it lacks something, each injected; nothing is left open."""
    tap("tap0")
    real = libbpf.link_create

    def no_links(*arguments: Any, **options: Any) -> int:
        del arguments, options
        raise KernelError("unknown", errno.EINVAL)

    monkeypatch.setattr(libbpf, "link_create", no_links)
    host = Host(paths)
    for hook in (Hook.TC, Hook.XDP):
        host.attach(document(), "web01", hook=hook)
        there = row(host)
        assert there["attached"]
        assert not there["from_vm"]["link"]
        assert there["from_vm"]["hook"] == hook
        host.detach("web01")
    monkeypatch.setattr(libbpf, "link_create", real)
    host.attach(document(), "web01")
    assert row(host)["from_vm"]["link"]
