# SPDX-License-Identifier: Apache-2.0
"""Programs that cannot be made: the old ones stay, and the error names what is in the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.controller.observe import program_ids, received, row, send_to_vm, traces
from tests.controller.policies import document, to_vm
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import CompileError, ExitCode, VerifierError, VgwError
from vgw.loader import bpf_dir, cache, clone, sources

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"
Tap = Callable[[str], int]
Break = Callable[[pytest.MonkeyPatch, Path], None]


def compiler_fails(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Put an error into a header."""
    shutil.copytree(bpf_dir(), directory / "bpf")
    header = directory / "bpf" / "policy.h"
    header.write_text(header.read_text() + "\nint nonsense = not_declared;\n")
    patch.setattr(cache, "bpf_dir", lambda: directory / "bpf")


def bcc_is_missing(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(importlib.util, "find_spec", lambda _: None)


def headers_are_missing(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.setattr(sources, "_USER_HEADERS", directory / "nowhere")


def verifier_rejects(patch: pytest.MonkeyPatch, _: Path) -> None:
    """Let a program return without a return value."""
    only_exit = bytes([0x95, *bytes(7)])
    patch.setattr(clone, "_patch", lambda *_: only_exit)


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        (compiler_fails, CompileError, r"policy\.h:\d+:\d+: error: .*not_declared"),
        (bcc_is_missing, VgwError, r"bcc module is missing: run `apt install python3-bpfcc`"),
        (headers_are_missing, VgwError, r"is missing: run `apt install linux-libc-dev`"),
        (verifier_rejects, VerifierError, r"cannot load the program tc_\w+: .*R0 !read_ok"),
    ],
    ids=["compiler", "bcc", "headers", "verifier"],
)
@pytest.mark.parametrize("protected", [True, False], ids=["protected", "fresh"])
def test_catalogue_M29_programs_that_cannot_be_made_leave_what_is_there(
    host: Host,
    paths: Paths,
    tap: Tap,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    broken: Break,
    kind: type[VgwError],
    said: str,
    protected: bool,
) -> None:
    vm = tap("tap0")
    if protected:
        host.attach(document(HTTP), "web01")
        (paths.endpoint_dir("web01", "tap0") / "stats").unlink()  # so that programs are needed
    before, state = traces(paths), status_of(host)
    with monkeypatch.context() as patch:
        broken(patch, tmp_path)
        elsewhere = Host(dataclasses.replace(paths, cache_dir=tmp_path / "cache"))
        tried = elsewhere if broken is not verifier_rejects else Host(paths)
        with pytest.raises(kind, match=f"(?s){said}") as raised:
            tried.attach(document(HTTPS), "web01")

    assert raised.value.exit_code == ExitCode.FAILED
    assert traces(paths) == before
    assert status_of(host) == state
    send_to_vm("tap0", to_vm(dport=443))
    assert received(vm, to_vm(dport=443)) is not protected
    assert host.attach(document(HTTPS), "web01").changed  # negative control: it was that
    send_to_vm("tap0", to_vm(dport=443))
    assert received(vm, to_vm(dport=443))
    assert len(program_ids(host)) == 2


def status_of(host: Host) -> str | None:
    """Return what is wrong with the endpoint, "" if there is none."""
    reason: str | None = row(host)["reason"] if host.attached() else ""
    return reason
