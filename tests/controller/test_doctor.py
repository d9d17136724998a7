# SPDX-License-Identifier: Apache-2.0
"""The doctor: a row for each thing, and for what is wrong a way to put it right."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import pytest

from vgw.controller import fitness
from vgw.controller.doctor import examine
from vgw.controller.paths import Paths
from vgw.errors import VgwError


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
