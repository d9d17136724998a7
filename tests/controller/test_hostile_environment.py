# SPDX-License-Identifier: Apache-2.0
"""Commands in a hostile environment run no code of others, and programs are made of vgw's alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.controller.policies import document
from vgw import loader
from vgw.cli_environment import require_own_code
from vgw.controller.reconcile import Host
from vgw.errors import CompileError, VgwError
from vgw.loader import cache
from vgw.loader.sources import SourceTree, bpf_dir
from vgw.policy.model import PolicyDocument

ROOT = Path(__file__).parents[2]
#: What runs other programs or looks them up, and the modules that may.
STARTERS = {"subprocess", "pty", "multiprocessing", "asyncio.subprocess"}
CALLS = {"system", "popen", "which", "execv", "execve", "execvp", "execl", "spawnv", "posix_spawn"}
MAY_START = {
    "vgw/loader/cache.py",  # the compilers
    "vgw/controller/guardian.py",  # what rolls a change back when its command has died
}


def starters(text: str) -> list[str]:
    """Return what of a module's text starts programs."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name in STARTERS]
        elif isinstance(node, ast.ImportFrom) and node.module in STARTERS:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in CALLS:
            found.append(node.attr)
    return found


def test_catalogue_N11_nothing_is_started_by_a_name_that_path_decides_about() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("vgw/**/*.py"))
        if starters(path.read_text())
    }
    assert found == MAY_START
    assert all("[sys.executable," in (ROOT / each).read_text() for each in MAY_START)


@pytest.mark.parametrize(
    "text", ["import subprocess", "from subprocess import run", "os.system('x')", "shutil.which"]
)
def test_what_starts_programs_is_found(text: str) -> None:
    assert starters(text)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that every user can write."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    return directory


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME"])
def test_catalogue_N11_code_that_others_can_change_is_refused(shared: Path, variable: str) -> None:
    for value in (shared, shared / "code.so", f"/usr/lib:{shared}", "lib/code.so"):
        with pytest.raises(VgwError, match=f"{variable} names .*unset it"):
            require_own_code({variable: str(value)})
    require_own_code({variable: "/usr/lib", "PATH": str(shared)})
    require_own_code({variable: ""})


@pytest.mark.skipif(os.geteuid() != 0, reason="it is about what root runs")
@pytest.mark.parametrize("variable", ["LD_LIBRARY_PATH", "PYTHONPATH"])
def test_catalogue_N11_the_command_refuses_a_hostile_environment(
    shared: Path, variable: str
) -> None:
    command = [sys.executable, "-P", "-c", "from vgw.cli import main; main()", "status"]
    environment = {**os.environ, variable: str(shared), "VGW_STATE_DIR": str(shared / "state")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vgw: {variable} names {shared}, where other users can put code")
    assert len(done.stderr.splitlines()) == 1


TOOLS = ("python3", "clang", "llc", "uname", "modprobe", "tar", "xz", "sh", "ip", "tc", "bpftool")


@pytest.fixture
def hostile(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with tools that leave a mark, and headers that break what includes them."""
    for tool in TOOLS:
        (shared / tool).write_text(f"#!/bin/sh\necho {tool} >>{shared}/mark\nexit 1\n")
        (shared / tool).chmod(0o755)
    (shared / "linux").mkdir()
    for header in ("types.h", "ip.h", "in.h", "if_ether.h", "tcp.h", "udp.h"):
        (shared / "linux" / header).write_text("#error a header of somebody else\n")
    for variable in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "BCC_PROBE_PREFIX"):
        monkeypatch.setenv(variable, str(shared))
    monkeypatch.setenv("PATH", str(shared))
    return shared


@pytest.mark.bpf
def test_catalogue_N11_programs_are_compiled_by_tools_and_headers_of_the_system(
    hostile: Path, tmp_path: Path
) -> None:
    programs = {"conntrack_reap"}
    loader.load_artefact(tmp_path / "cache", programs=programs)
    assert not (hostile / "mark").exists()


@pytest.mark.bpf
def test_variables_that_reach_the_compiler_would_change_programs(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PASSED_ON", ("PATH", "CPATH", "C_INCLUDE_PATH"))
    with pytest.raises(CompileError, match="a header of somebody else"):
        loader.load_artefact(tmp_path / "cache", programs={"conntrack_reap"})
    assert hostile.exists()


# --- policy text in C source ----------------------------------------------------------------------

MARK = "zq9injected"
RULES = (
    f"[{{name: {MARK}, action: accept, services: [tcp/80], "
    f"comment: '*/ int {MARK}(void) {{return 1;}} // \" \\ ??/ #include </etc/passwd>'}}]"
)
VMS = {
    f"{MARK}-vm": f"{{labels: {{{MARK}/x: {MARK}-1.0}}, interfaces: [{{name: '{MARK[:8]}\"#'}}]}}",
    "web01": "{interfaces: [{name: tap0, mac: '52:54:00:00:00:11', addresses: [10.20.0.11]}]}",
}


def hostile_document() -> PolicyDocument:
    return document(RULES, vms=VMS, extra=f"services: {{{MARK}: [tcp/81]}}")


@pytest.mark.bpf
def test_catalogue_N12_what_is_compiled_is_the_same_whatever_the_policy_says(
    host: Host, tap: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compilers are given vgw's own files and fixed options; a policy makes nothing new."""
    given: dict[str, str] = {}
    run = cache._run_children

    def watched(directory: Path, programs: Mapping[str, int]) -> None:
        for path in directory.rglob("*"):
            if path.is_file() and "public" not in path.parts:
                given[str(path.relative_to(directory))] = path.read_text()
        run(directory, programs)

    monkeypatch.setattr(cache, "_run_children", watched)
    object.__setattr__(host.paths, "cache_dir", tmp_path / "cache")
    tap("tap0")
    assert host.attach(hostile_document(), "web01").changed
    tree = SourceTree(bpf_dir())
    sources = {name: text for name, text in given.items() if "/" not in name and name[-2:] == ".c"}
    assert sources == {name: tree.flatten(name.removesuffix(".c")) for name in sources}
    assert {"tc_from_vm.c", "tc_to_vm.c"} <= sources.keys()
    assert not [name for name, text in given.items() if MARK in text or MARK in name]
    compiled = sorted(path.name for path in (tmp_path / "cache").iterdir())

    given.clear()
    assert host.apply(document(vms={"web01": VMS["web01"]})).vms[0].changed
    assert not given
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == compiled


def test_catalogue_N12_nothing_that_compiles_knows_policies() -> None:
    """The functions that lead to the compiler take places and names of vgw's own programs only."""
    reached: dict[str, Any] = {}
    for path in sorted((ROOT / "vgw" / "loader").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vgw."):
                reached[f"{path.name}: {node.module}"] = node.lineno
    assert not [each for each in reached if "policy" in each or "controller" in each]
    users = [
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("vgw/**/*.py"))
        if "bpf_dir" in path.read_text() or "SourceTree" in path.read_text()
    ]
    assert all(user.startswith("vgw/loader/") for user in users), users


def test_catalogue_N12_unknown_programs_are_not_compiled(tmp_path: Path) -> None:
    """Names of programs are keys of a table, not parts of paths that anything may fill in."""
    with pytest.raises((KeyError, CompileError)):
        loader.load_artefact(tmp_path / "cache", programs={f"../{MARK}"})
    assert not (tmp_path / "cache").exists()
