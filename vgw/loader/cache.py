# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk: found by what they are compiled from, compiled when missing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from vgw.abi import ABI_VERSION
from vgw.abi_maps import size_mismatch
from vgw.errors import CompileError, VgwError
from vgw.libbpf import MapType, map_create
from vgw.loader.artefact import Artefact, merge
from vgw.loader.compiler import EXIT_NO_BCC
from vgw.loader.socket_buffer import socket_buffer_options
from vgw.loader.sources import SourceTree, bpf_dir, write_headers
from vgw.loader.ticks import tick_options

#: Options of the compiler. BCC optimises what clang hands it, so clang's own optimiser would only
#: do the work twice (a third of the time); every program includes helpers that only others use.
OPTIONS: Final = (
    "-O2",
    "-Xclang",
    "-disable-llvm-passes",
    "-Wall",
    "-Werror",
    "-Wno-unused-function",
)

_APT: Final = (
    "run `apt install python3-bpfcc`, and make virtual environments with --system-site-packages"
)
_OTHER_DIRECTORY: Final = "run vgw as root, or choose another directory by VGW_CACHE_DIR"
#: The compiler's environment: clang heeds variables that add headers (CPATH), BCC some that change
#: the program, and both run tools; none of this may depend on who runs vgw from where.
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_PASSED_ON: Final = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
_KEPT: Final = 4
_BUILD_DIGITS: Final = 12
_STALE_SECONDS: Final = 3600
_SHOWN_ERRORS: Final = 3
_TIMEOUT_SECONDS: Final = 120
_DIAGNOSTIC: Final = re.compile(r"^.*\berror: .*$", re.MULTILINE)


def load_artefact(
    cache_dir: Path,
    progress: Callable[[str], None] | None = None,
    *,
    programs: Collection[str] | None = None,
    source: SourceTree | None = None,
    trusted: Collection[int] = (),
) -> Artefact:
    """Return the compiled programs, from `cache_dir` if they are there, else compiling them.

    `programs` limits it to some, which saves compiling the rest; `progress` hears a line before
    something slow starts; `trusted` are users whose directory it may be besides. Raises
    CompileError naming header and line, or the map that differs from vgw/abi.py, KernelError when
    maps cannot be created or the kernel does not describe its types, and VgwError when BCC or
    linux-libc-dev is missing or the directory is not fit.
    """
    tree = source or SourceTree(bpf_dir())
    texts = {name: tree.flatten(name) for name in programs or tree.programs}
    digests = _digests(tree, texts)
    _prepare(cache_dir, {os.geteuid(), *trusted})
    parts = {name: _read(_path(cache_dir, name, digests[name])) for name in texts}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        if progress is not None:
            progress("compiling the packet programs; this happens once per version")
        for name, compiled in _compile(tree, {name: texts[name] for name in missing}).items():
            _check_sizes(compiled)
            parts[name] = part = replace(compiled, digest=digests[name])
            _write(_path(cache_dir, name, digests[name]), part)
            _prune(cache_dir, name)
    return merge([part for part in parts.values() if part is not None])


def packet_build(source: SourceTree | None = None) -> str:
    """Return a name, 12 hex digits, for all that the programs on the packet path are made of.

    It differs where anything differs: sources, compiler options, BCC, places in the kernel's types.
    Nothing is compiled for it. Raises VgwError as load_artefact() does.
    """
    tree = source or SourceTree(bpf_dir())
    texts = {name: tree.flatten(name) for name in tree.programs if "_vm" in name}
    total = hashlib.sha256()
    for digest in _digests(tree, texts).values():
        _feed(total, digest)
    return total.hexdigest()[:_BUILD_DIGITS]


def _digests(tree: SourceTree, texts: Mapping[str, str]) -> dict[str, str]:
    """Return for each program a name for everything that its compiled form depends on."""
    shared = hashlib.sha256()
    facts = (str(ABI_VERSION), platform.machine(), _bcc_version(), *_options(), *tree.shim())
    for fact in facts:
        _feed(shared, fact)
    digests: dict[str, str] = {}
    for name, text in texts.items():
        total = shared.copy()
        for fact in (name, str(int(tree.programs[name])), text):
            _feed(total, fact)
        digests[name] = total.hexdigest()
    return digests


def _options() -> tuple[str, ...]:
    """Return the compiler's options but for those that say where headers are; raises VgwError."""
    return *OPTIONS, *socket_buffer_options(), *tick_options()


def _feed(total: hashlib._Hash, fact: str) -> None:
    """Add a text to a hash so that no other sequence of texts gives the same."""
    data = fact.encode()
    total.update(len(data).to_bytes(8, "big") + data)


def _bcc_version() -> str:
    """Return the text that says BCC's version, without importing BCC; raises VgwError."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        raise VgwError(f"Python's bcc module is missing: {_APT}")
    version = Path(spec.origin).with_name("version.py")
    # Another package of that name has no such file: the compiling process says so.
    return version.read_text() if version.is_file() else spec.origin


def _prepare(cache_dir: Path, users: Collection[int]) -> None:
    """Make the directory; raises VgwError when others than `users` could put programs into it."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = cache_dir.stat()
    except OSError as error:
        raise VgwError(
            f"cannot use the cache directory {cache_dir}: {error.strerror}; {_OTHER_DIRECTORY}"
        ) from None
    if facts.st_uid not in users or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise VgwError(
            f"the cache directory {cache_dir} is open to other users: run "
            f"`chown {os.geteuid()} {cache_dir}` and `chmod 700 {cache_dir}`"
        )


def _path(cache_dir: Path, program: str, digest: str) -> Path:
    return cache_dir / f"{program}-{digest}.vgw"


def _read(path: Path) -> Artefact | None:
    """Return what a cache file holds, None when there is none or it is damaged."""
    try:
        artefact = Artefact.decode(path.read_bytes())
    except (OSError, ValueError):
        return None
    return artefact if path.stem.endswith(artefact.digest) else None


def _write(path: Path, artefact: Artefact) -> None:
    """Write a cache file so that others see all of it or nothing."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(artefact.encode())
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise VgwError(
            f"cannot write to the cache {path.parent}: {error.strerror}; {_OTHER_DIRECTORY}"
        ) from None


def _prune(cache_dir: Path, program: str) -> None:
    """Remove all but the newest files of a program, and what interrupted writers left."""
    with contextlib.suppress(OSError):  # another process may be doing the same
        by_age = sorted(cache_dir.glob(f"{program}-*.vgw"), key=lambda path: -path.stat().st_mtime)
        stale = time.time() - _STALE_SECONDS
        leftovers = [path for path in cache_dir.glob("*.tmp") if path.stat().st_mtime < stale]
        for path in (*by_age[_KEPT:], *leftovers):
            path.unlink(missing_ok=True)


def _check_sizes(artefact: Artefact) -> None:
    """Raise CompileError when a map's keys or values have other sizes than the ABI says."""
    for spec in artefact.maps.values():
        mismatch = size_mismatch(spec.name, spec.key_size, spec.value_size)
        if mismatch:
            raise CompileError(f"{mismatch}: bpf/ and vgw/ are of different versions; reinstall")


def _compile(tree: SourceTree, texts: Mapping[str, str]) -> dict[str, Artefact]:
    """Compile programs from their flattened sources, each in a process of its own."""
    os.close(map_create(MapType.ARRAY, "probe", 4, 4, 1))  # without the right to, say so plainly
    with tempfile.TemporaryDirectory(prefix="vgw-compile-") as name:
        directory = Path(name)
        options = [*_options(), *write_headers(tree, directory / "kernel")]
        (directory / "options").write_text("\n".join(options))
        for program, text in texts.items():
            (directory / f"{program}.c").write_text(text)
        _run_children(directory, {program: int(tree.programs[program]) for program in texts})
        return {program: _compiled(directory / f"{program}.vgw") for program in texts}


def _compiled(path: Path) -> Artefact:
    """Return what a compiling process wrote. Raises CompileError when it wrote nothing of use."""
    try:
        return Artefact.decode(path.read_bytes())
    except (OSError, ValueError):
        spec = importlib.util.find_spec("bcc")
        compiler = "bcc" if spec is None else spec.origin
        raise CompileError(
            f"the compiler {compiler} ended without an error and without the program {path.stem}; "
            f"is it BCC? {_APT}"
        ) from None


def _run_children(directory: Path, programs: Mapping[str, int]) -> None:
    """Run a compiling process for each program (name -> type); raises what the first one found."""
    command = [sys.executable, "-P", "-m", "vgw.loader", str(directory)]
    environment = {
        **_ENVIRONMENT,
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "BCC_KERNEL_SOURCE": str(directory / "kernel"),
    }
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, kind in programs.items():
            children[name] = subprocess.Popen(
                [*command, name, str(kind)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        for name, child in children.items():
            _, output = child.communicate(timeout=_TIMEOUT_SECONDS)
            if child.returncode:
                raise _failure(name, child.returncode, output)
    except subprocess.TimeoutExpired:
        raise CompileError(f"the compiler did not end within {_TIMEOUT_SECONDS} s") from None
    finally:
        for child in children.values():
            child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


def _failure(program: str, code: int, output: str) -> VgwError:
    """Return the error for a compiling process that ended with `code`."""
    lines = output.strip().splitlines() or ["it gave no reason"]
    if code == EXIT_NO_BCC:
        return VgwError(f"{lines[-1]}: {_APT}")
    found = list(dict.fromkeys(_DIAGNOSTIC.findall(output)))
    if found:
        more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
        return CompileError("; ".join(found[:_SHOWN_ERRORS]) + more)
    if code < 0:
        lines.append(f"it was ended by {signal.Signals(-code).name}")
    return CompileError(f"the compiler failed on {program}: {lines[-1]}")
