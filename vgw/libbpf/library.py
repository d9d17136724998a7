# SPDX-License-Identifier: Apache-2.0
"""The loaded libbpf.so.1: prototypes of the functions vgw calls and one way to report failures."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Final

from vgw import steps
from vgw.errors import KernelError, VgwError

#: The kernel's own "operation not supported"; user space has no name for it.
ENOTSUPP: Final = 524
#: What kernels and map types say that have no call for many entries at once.
NO_BATCH: Final = (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP)

_MISSING: Final = "libbpf.so.1 cannot be loaded ({}): install it with `apt install libbpf1`"

_HINTS: Final = {
    errno.EPERM: "run vgw as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.EACCES: "run vgw as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.ENOMEM: "free memory on this host, or raise the memory limit of vgw's control group",
    errno.E2BIG: "it is more than this kernel or map takes; lower the limits of the VM",
    errno.ENOSPC: "make room there, or lower the limits of the VM",
    errno.EROFS: "remount the file system by `mount -o remount,rw`",
    errno.ENOSYS: "this kernel was built without BPF: use one with CONFIG_BPF_SYSCALL",
}

_COUNT: Final = POINTER(c_uint32)
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "bpf_map_create": (c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_map_lookup_elem": (c_int, c_void_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_delete_elem": (c_int, c_void_p),
    "bpf_map_get_next_key": (c_int, c_void_p, c_void_p),
    "bpf_map_lookup_batch": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, _COUNT, c_void_p),
    "bpf_map_update_batch": (c_int, c_void_p, c_void_p, _COUNT, c_void_p),
    "bpf_map_get_fd_by_id": (c_uint32,),
    "bpf_prog_load": (c_int, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p),
    "bpf_prog_test_run_opts": (c_int, c_void_p),
    "bpf_prog_get_fd_by_id": (c_uint32,),
    "bpf_prog_query": (c_int, c_int, c_uint32, _COUNT, _COUNT, _COUNT),
    "bpf_obj_get_info_by_fd": (c_int, c_void_p, _COUNT),
    "bpf_obj_pin": (c_int, c_char_p),
    "bpf_obj_get": (c_char_p,),
    "bpf_link_create": (c_int, c_int, c_int, c_void_p),
    "bpf_link_update": (c_int, c_int, c_void_p),
    "bpf_link_detach": (c_int,),
    "bpf_link_get_next_id": (c_uint32, _COUNT),
    "bpf_link_get_fd_by_id": (c_uint32,),
    "libbpf_num_possible_cpus": (),
    "perf_buffer__poll": (c_void_p, c_int),
    "perf_buffer__consume": (c_void_p,),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return libbpf.so.1 with its prototypes set, loading it at the first call.

    Raises VgwError with the package to install when it is missing.
    """
    try:
        loaded = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise VgwError(_MISSING.format(error)) from None
    for name, argtypes in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.argtypes = argtypes
        function.restype = c_int
    loaded.perf_buffer__new_raw.restype = c_void_p
    loaded.perf_buffer__new_raw.argtypes = (
        c_int, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p,
    )  # fmt: skip
    loaded.perf_buffer__free.restype = None
    loaded.perf_buffer__free.argtypes = (c_void_p,)
    # Failures are raised as errors, so libbpf's own warnings on stderr would only repeat them.
    loaded.libbpf_set_print(None)
    return loaded


def failure(what: str, number: int, hint: str | None = None) -> KernelError:
    """Return the error for a failed call: `what` was attempted, `number` is the errno.

    `hint` says what to do; by default it follows from the errno.
    """
    text = "Operation not supported" if number == ENOTSUPP else os.strerror(number)
    hint = hint or _HINTS.get(number)
    return KernelError(f"cannot {what}: {text}" + (f"; {hint}" if hint else ""), number)


def change(step: str, target: object, call: Callable[..., int], *arguments: object) -> int:
    """Make a call that changes something in the kernel; return its result or negative errno."""
    refused = steps.announce(step, target)
    return -refused if refused else call(*arguments)


def check(result: int, what: str) -> int:
    """Return `result` of a libbpf call, or raise KernelError when it is a negative errno."""
    if result < 0:
        raise failure(what, -result)
    return result
