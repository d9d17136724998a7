# SPDX-License-Identifier: Apache-2.0
"""BPF programs: load, run on a given packet and describe them by file descriptor."""

from __future__ import annotations

import ctypes
import enum
import errno
from ctypes import c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Final

from vgw.errors import VerifierError
from vgw.libbpf.library import change, check, failure, library

LICENSE: Final = b"Dual BSD/GPL"
INSTRUCTION_BYTES: Final = 8
LOG_BYTES: Final = 1 << 20
_MAX_LOG_BYTES: Final = 1 << 26
_TAIL_LINES: Final = 20
_LAST_LINE: Final = "\nprocessed "
# What the program may add to a packet, so that its output fits the buffer.
_OUTPUT_ROOM: Final = 512
#: Ids of maps that there is room for at the first question; the kernel says how many there are.
_MAP_IDS: Final = 64


class ProgType(enum.IntEnum):
    """Program types vgw uses, as numbered by the kernel."""

    SCHED_CLS = 3
    XDP = 6


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """What the kernel says about a program."""

    prog_type: int
    id: int
    tag: str
    name: str
    map_ids: tuple[int, ...]
    verified_insns: int
    """Instructions the verifier walked; 0 before Linux 5.16, which does not say."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of a test run: return code, mean duration in ns, and the packet it left."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    retval: int
    duration_ns: int
    data_out: bytes


class _ProgLoadOpts(ctypes.Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_void_p),
    ]


class _TestRunOpts(ctypes.Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_char_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    ]


class _ProgInfo(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("flags", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
    ]


def prog_load(
    prog_type: int,
    name: str,
    insns: bytes,
    *,
    expected_attach_type: int = 0,
    log_size: int = LOG_BYTES,
) -> int:
    """Load a program and return its fd.

    Raises VerifierError with the end of the verifier's log when the kernel refuses the code,
    KernelError when it refuses for another reason. `log_size` is the first try at a buffer for
    that log; it grows when the log does not fit.
    """
    result = _load(prog_type, name, insns, expected_attach_type, None)
    if result >= 0:
        return result
    what = f"load the program {name}"
    if -result in (errno.EPERM, errno.ENOMEM, errno.ENOSYS, errno.EBADF):
        raise failure(what, -result)
    again, log = _load_with_log(prog_type, name, insns, expected_attach_type, log_size)
    if again >= 0:
        return again  # what was in the way has gone meanwhile
    if not log.strip():
        raise failure(what, -result)
    tail = "\n".join(log.rstrip().splitlines()[-_TAIL_LINES:])
    message = f"{failure(what, -result)}; the verifier's log ends with:\n{tail}"
    raise VerifierError(message, -result, tail)


def _load(
    prog_type: int,
    name: str,
    insns: bytes,
    attach_type: int,
    log: ctypes.Array[c_char] | None,
) -> int:
    """Call bpf_prog_load and return its fd or negative errno."""
    opts = _ProgLoadOpts(ctypes.sizeof(_ProgLoadOpts), expected_attach_type=attach_type)
    if log is not None:
        opts.log_level = 1
        opts.log_size = len(log)
        opts.log_buf = ctypes.addressof(log)
    return change(
        "program load",
        name,
        library().bpf_prog_load,
        prog_type,
        name[:15].encode(),
        LICENSE,
        insns,
        len(insns) // INSTRUCTION_BYTES,
        ctypes.byref(opts),
    )


def _load_with_log(
    prog_type: int, name: str, insns: bytes, attach_type: int, log_size: int
) -> tuple[int, str]:
    """Load a program that the kernel refused; return what _load() does, and the verifier's log."""
    while True:
        buffer = ctypes.create_string_buffer(log_size)
        result = _load(prog_type, name, insns, attach_type, buffer)
        log = buffer.value.decode(errors="replace")
        # A log that does not fit loses its start, before Linux 6.4 its end.
        if result != -errno.ENOSPC or _LAST_LINE in log or log_size >= _MAX_LOG_BYTES:
            return result, log
        log_size *= 8


def prog_test_run(fd: int, data: bytes, *, repeat: int = 1, ctx_in: bytes = b"") -> TestRun:
    """Run a program on the packet `data` without sending it anywhere; raises KernelError.

    `ctx_in` is the program's context (struct xdp_md or __sk_buff), empty for the default one.
    With `repeat` the program runs that often; the result is of the last run.
    """
    output = ctypes.create_string_buffer(len(data) + _OUTPUT_ROOM)
    opts = _TestRunOpts(
        ctypes.sizeof(_TestRunOpts),
        data_in=data,
        data_size_in=len(data),
        data_out=ctypes.addressof(output),
        data_size_out=len(output),
        repeat=repeat,
    )
    if ctx_in:
        opts.ctx_in = ctx_in
        opts.ctx_size_in = len(ctx_in)
    call = library().bpf_prog_test_run_opts
    check(change("test run", fd, call, fd, ctypes.byref(opts)), "run a program on a packet")
    return TestRun(opts.retval, opts.duration, output.raw[: opts.data_size_out])


def prog_info(fd: int) -> ProgInfo:
    """Return what the kernel says about the program; raises KernelError."""
    ids, info = _with_map_ids(fd, _MAP_IDS)
    if info.nr_map_ids > len(ids):
        ids, info = _with_map_ids(fd, info.nr_map_ids)
    return ProgInfo(
        prog_type=info.type,
        id=info.id,
        tag=bytes(info.tag).hex(),
        name=info.name.decode(errors="replace"),
        map_ids=tuple(ids[: info.nr_map_ids]),
        verified_insns=info.verified_insns,
    )


def _with_map_ids(fd: int, room: int) -> tuple[ctypes.Array[c_uint32], _ProgInfo]:
    """Return the ids of a program's maps, as many as there is room for, and its description."""
    ids = (c_uint32 * room)()
    info = _ProgInfo(nr_map_ids=room, map_ids=ctypes.addressof(ids))
    size = c_uint32(ctypes.sizeof(info))
    result = library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    check(result, "describe a program")
    return ids, info


def prog_fd_by_id(prog_id: int) -> int:
    """Open a program by id; needs CAP_SYS_ADMIN; raises KernelError."""
    return check(library().bpf_prog_get_fd_by_id(prog_id), f"open the program with id {prog_id}")
