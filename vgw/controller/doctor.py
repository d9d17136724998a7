# SPDX-License-Identifier: Apache-2.0
"""Whether this host is fit for vgw: each thing it needs, tried out, with what to do about it."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import platform
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from vgw import abi, libbpf
from vgw.controller import fitness, links, links_netlink, pinned
from vgw.controller.api_client import Client
from vgw.controller.foreign import programs_beside
from vgw.controller.own_namespace import in_own_namespace
from vgw.controller.paths import Paths
from vgw.errors import ControllerUnreachableError, KernelError, VgwError
from vgw.libbpf import AttachType, ProgType
from vgw.loader import load_artefact, reads_directly, socket_buffer_options

#: Kernels before this have no bpf_link for XDP and are not tested.
_OLDEST_KERNEL: Final = (5, 15)
#: Branch -> first release with the fixes that vgw's hooks need (CVE-2024-41091, CVE-2024-49978).
_FIXED: Final = {(5, 15): 164, (6, 1): 113, (6, 6): 55}

_APT: Final = "apt install {}"
_HEADERS: Final = Path("/usr/include/linux/types.h")

#: `bpf_probe_read_kernel(fp - 8, 8, NULL)`
_READ_KERNEL: Final = b"".join(
    struct.pack("=BBhi", *words)
    for words in (
        (0xBF, 0xA1, 0, 0),
        (0x07, 0x01, 0, -8),
        (0xB7, 0x02, 0, 8),
        (0xB7, 0x03, 0, 0),
        (0x85, 0, 0, 113),
    )
)

#: Settings of the kernel, and where they are.
_SETTINGS: Final = Path("/proc/sys")
_JIT: Final = "net/core/bpf_jit_enable"
_UNPRIVILEGED: Final = "kernel/unprivileged_bpf_disabled"

#: Every network namespace has this interface, with this index.
_LOOPBACK: Final = 1
#: No interface has this index.
_NO_INTERFACE: Final = 0x7FFFFFFF

#: How long the controller may take to say what it does.
_ANSWER_SECONDS: Final = 10.0
_RESTART: Final = "restart it (VMs stay protected meanwhile); its log may say why"

#: What to do where an error gives no advice of its own.
_OTHERWISE: Final = "put right what it names, then run `vgw doctor` again"

Row = dict[str, Any]
#: Returns what was found; raises _UnfitError when that will not do.
_Check = Callable[[Paths], str]


class _UnfitError(Exception):
    """What was found will not do, or with `ok` should be looked at; `fix` says what to do."""

    def __init__(self, detail: str, fix: str, *, ok: bool = False) -> None:
        super().__init__(detail)
        self.fix, self.ok = fix, ok


def examine(paths: Paths) -> list[Row]:
    """Return a row {"check", "ok", "detail", "fix"} for each thing.

    `fix` is null where nothing is to do; with `ok` it says what to look at.

    Nothing is changed on the host, but for programs that are compiled into the cache.
    """
    return [_row(name, check, paths) for name, check in _CHECKS.items()]


def _row(name: str, check: _Check, paths: Paths) -> Row:
    try:
        return {"check": name, "ok": True, "detail": check(paths), "fix": None}
    except _UnfitError as error:
        return {"check": name, "ok": error.ok, "detail": str(error), "fix": error.fix}
    except VgwError as error:
        detail, fix = _advice_of(str(error).splitlines()[0])
        return {"check": name, "ok": False, "detail": detail, "fix": fix}
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fix = "run vgw as root" if isinstance(error, PermissionError) else _OTHERWISE
        return {"check": name, "ok": False, "detail": detail, "fix": fix}


def _advice_of(message: str) -> tuple[str, str]:
    """Split an error into what is wrong and what to do: `what: why; advice`, `what: run this`."""
    detail, semicolon, fix = message.partition("; ")
    if semicolon:
        return detail, fix
    detail, _, fix = message.rpartition(": ")
    return (detail, fix) if fix.startswith("run ") else (message, _OTHERWISE)


def _kernel(_: Paths) -> str:
    release = platform.release()
    numbers = [int(text) for text in re.findall(r"\d+", release)[:3]]
    version = (numbers[0], numbers[1]) if len(numbers) > 1 else (0, 0)
    patch = numbers[2] if len(numbers) > 2 else 0
    if version < _OLDEST_KERNEL:
        raise _UnfitError(release, "use Linux 5.15 or later, better 6.6 or later")
    if patch < _FIXED.get(version, 0):
        raise _UnfitError(
            f"{release} lacks fixes of the TAP and tc paths (CVE-2024-41091, CVE-2024-49978)",
            f"upgrade the kernel to {version[0]}.{version[1]}.{_FIXED[version]} or later",
        )
    return release


def _capabilities(_: Paths) -> str:
    missing = fitness.missing_capabilities()
    if missing:
        raise _UnfitError(
            f"missing {', '.join(missing)}",
            f"run vgw as root, or with {', '.join(fitness.NEEDED_CAPABILITIES)}",
        )
    return f"user id {os.geteuid()} has {', '.join(fitness.NEEDED_CAPABILITIES)}"


def _libbpf(_: Paths) -> str:
    libbpf.library()
    return "libbpf.so.1 is there"


def _btf(_: Paths) -> str:
    socket_buffer_options()
    if reads_directly():
        return "tc programs read directly where a guest asks for checksums"
    try:
        with _program(ProgType.SCHED_CLS, _READ_KERNEL):
            return "tc programs can read where a guest asks for checksums"
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise
        raise _UnfitError(
            "tc programs cannot read where a guest asks for checksums",
            "boot without lockdown=confidentiality",
        ) from None


def _bpf_load(_: Paths) -> str:
    with _program(ProgType.XDP), _program(ProgType.SCHED_CLS):
        return "the kernel loads XDP and tc programs"


def _jit(_: Paths) -> str:
    if _setting(_JIT) == 0:
        raise _UnfitError(
            "programs are interpreted: they judge the same, and take several times as long",
            f"run `sysctl -w {_JIT.replace('/', '.')}=1`",
            ok=True,
        )
    return "programs are compiled to the processor's code"


def _unprivileged(_: Paths) -> str:
    if _setting(_UNPRIVILEGED) == 0:
        raise _UnfitError(
            "every user may load BPF programs, which vgw does not need",
            f"run `sysctl -w {_UNPRIVILEGED.replace('/', '.')}=2`",
            ok=True,
        )
    return "other users load no BPF programs"


def _setting(name: str) -> int | None:
    """Return a setting of the kernel, None where it has no such setting."""
    try:
        return int((_SETTINGS / name).read_text())
    except (OSError, ValueError):
        return None


def _clock(_: Paths) -> str:
    fitness.require_host_clock()
    return "the monotonic clock is that of the packet programs"


def _clsact(_: Paths) -> str:
    """Whether there is a clsact qdisc, where tc programs cannot be attached by links."""
    if _tcx_known():
        return "not needed: tc programs are attached by links"
    in_vain = in_own_namespace(lambda: links_netlink.add_clsact(_LOOPBACK))
    if in_vain is not None:
        raise _UnfitError(
            f"this kernel has neither links for tc nor the clsact qdisc: {in_vain}",
            "load the modules sch_ingress and cls_bpf, or use a kernel that has them",
        )
    return "tc filters of a clsact qdisc can be attached"


def _xdp_link(_: Paths) -> str:
    # The loopback device has no native XDP: a kernel that knows the link says that, others EINVAL.
    known = _link_error(ProgType.XDP, 1, AttachType.XDP) == errno.EOPNOTSUPP
    return _how_attached("XDP", known, "netlink")


def _tcx_link(_: Paths) -> str:
    return _how_attached("tc", _tcx_known(), "a clsact filter")


def _tcx_known() -> bool:
    return _link_error(ProgType.SCHED_CLS, _NO_INTERFACE, AttachType.TCX_INGRESS) == errno.ENODEV


def _link_error(kind: ProgType, ifindex: int, attach_type: AttachType) -> int:
    """Return why a link cannot be made where none can be made."""
    flags = libbpf.XDP_NATIVE if attach_type is AttachType.XDP else 0
    with _program(kind) as program:
        try:
            os.close(libbpf.link_create(program, ifindex, attach_type, flags))
        except KernelError as error:
            return error.errno
    return 0


def _how_attached(hook: str, known: bool, instead: str) -> str:
    if known:
        return f"{hook} programs are attached by links that outlive every process"
    return f"no links for {hook}: programs are attached by {instead}, which other tools can remove"


def _bpffs(paths: Paths) -> str:
    fitness.require_bpffs(paths.bpffs)
    return f"{paths.bpffs} is in a bpffs"


def _bcc(_: Paths) -> str:
    spec = importlib.util.find_spec("bcc")
    apt = _APT.format("python3-bpfcc") + ", and use a venv made with --system-site-packages"
    if spec is None or spec.origin is None:
        raise _UnfitError("the Python module bcc is missing", apt)
    if not (Path(spec.origin).parent / "libbcc.py").exists():
        raise _UnfitError(
            f"{spec.origin} is another package of the same name", f"pip uninstall bcc; {apt}"
        )
    return spec.origin


def _headers(_: Paths) -> str:
    if not _HEADERS.exists():
        raise _UnfitError(f"{_HEADERS} is missing", _APT.format("linux-libc-dev"))
    return f"{_HEADERS} is there"


def _cache(paths: Paths) -> str:
    try:
        paths.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.cache_dir):
            return f"{paths.cache_dir} is writable"
    except OSError as error:
        raise _UnfitError(
            f"{paths.cache_dir}: {error.strerror}", "run vgw as root, or set VGW_CACHE_DIR"
        ) from error


def _compile(paths: Paths) -> str:
    artefact = load_artefact(paths.cache_dir, trusted=fitness.trusted_users(paths.bpffs))
    return f"programs are compiled ({artefact.digest[:12]})"


def _others(paths: Paths) -> str:
    """Whether somebody else's programs or filters are on protected interfaces, beside vgw's."""
    found = []
    for interface, vms in pinned.owners(paths).items():
        ifindex = pinned.present_ifindex(interface)
        if ifindex is None:
            continue
        own: set[int] = set()
        for vm, path in itertools.product(vms, abi.Path):
            there = links.read_attachment(ifindex, path, paths.endpoint_dir(vm, interface))
            own |= set() if there is None else {there.prog_id}
        found += [
            f"{interface} {row['path']}: {row['kind']} {row['id']}"
            for row in programs_beside(ifindex, own)
        ]
    if found:
        raise _UnfitError(
            f"of somebody else beside vgw: {', '.join(found)}",
            "`vgw status` says how to look at each; remove what may redirect packets",
            ok=True,
        )
    return "nothing of somebody else runs on a protected interface"


def _controller(paths: Paths) -> str:
    """Whether the controller, if one runs, answers and makes progress."""
    if not paths.socket.exists():
        return "none runs; VMs stay protected, nothing is logged and none that comes is protected"
    try:
        health = Client(paths.socket, _ANSWER_SECONDS).status()["health"]
    except ControllerUnreachableError:
        return "none runs; what is left of its socket is replaced by the next"
    except (VgwError, KeyError) as error:
        raise _UnfitError(f"it gives no answer: {error}", _RESTART) from error
    if not health["ok"]:
        raise _UnfitError(f"no progress in: {', '.join(health['stuck'])}", _RESTART)
    return "it runs and makes progress"


@contextlib.contextmanager
def _program(kind: ProgType, code: bytes = b"") -> Iterator[int]:
    """Load a program that begins with `code` and then does nothing."""
    fd = libbpf.prog_load(kind, "vgw_probe", code + fitness.DO_NOTHING)
    try:
        yield fd
    finally:
        os.close(fd)


_CHECKS: Final[dict[str, _Check]] = {
    "kernel": _kernel,
    "capabilities": _capabilities,
    "libbpf": _libbpf,
    "btf": _btf,
    "bpf": _bpf_load,
    "jit": _jit,
    "unprivileged": _unprivileged,
    "clock": _clock,
    "xdp link": _xdp_link,
    "tc link": _tcx_link,
    "clsact": _clsact,
    "bpffs": _bpffs,
    "bcc": _bcc,
    "headers": _headers,
    "cache": _cache,
    "programs": _compile,
    "others": _others,
    "controller": _controller,
}
