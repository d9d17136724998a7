# SPDX-License-Identifier: Apache-2.0
"""Reading records that programs put into a perf event array, with what was lost."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int, c_uint32, c_uint64, c_void_p
from types import TracebackType
from typing import Final

from vgw.libbpf.library import check, failure, library

_TYPE_SOFTWARE: Final = 1
_CONFIG_BPF_OUTPUT: Final = 10
_SAMPLE_RAW: Final = 1 << 10
_RECORD_LOST: Final = 2
_RECORD_SAMPLE: Final = 9
_STOP: Final = -1
_CONTINUE: Final = -2
_HEADER_BYTES: Final = 8

_RecordCallback = CFUNCTYPE(c_int, c_void_p, c_int, c_void_p)


class _PerfEventAttr(ctypes.Structure):
    """The first published layout of the kernel's structure, which every kernel accepts."""

    _fields_ = [
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("sample_period", c_uint64),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("flags", c_uint64),
        ("wakeup_events", c_uint32),
        ("bp_type", c_uint32),
        ("config1", c_uint64),
    ]


class PerfReader:
    """Calls `on_event(cpu, record)` for each record and `on_lost(cpu, count)` for each gap.

    A record is the program's bytes followed by up to 7 bytes of padding. `pages` is the buffer
    of one CPU and a power of two; the kernel wakes poll() every `wakeup_events` records, so a
    caller that wants fewer records sooner calls consume() on a tick. Only one reader of a map
    at a time gets its records: a new one takes over. Not for use from two threads at once.
    """

    def __init__(
        self,
        map_fd: int,
        on_event: Callable[[int, bytes], None],
        on_lost: Callable[[int, int], None],
        pages: int = 64,
        wakeup_events: int = 64,
    ) -> None:
        """Open the buffers; raises KernelError."""
        self._on_event = on_event
        self._on_lost = on_lost
        self._error: BaseException | None = None
        self._delivered = 0
        self._buffer: int | None = None
        self._callback = _RecordCallback(self._record)  # libbpf keeps only a pointer to it
        attr = _PerfEventAttr(
            type=_TYPE_SOFTWARE,
            size=ctypes.sizeof(_PerfEventAttr),
            config=_CONFIG_BPF_OUTPUT,
            sample_period=wakeup_events,
            sample_type=_SAMPLE_RAW,
            wakeup_events=wakeup_events,
        )
        # The kernel drops the buffers when the fd they were set through is closed.
        self._map_fd = os.dup(map_fd)
        buffer = library().perf_buffer__new_raw(
            self._map_fd, pages, ctypes.byref(attr), self._callback, None, None
        )
        if not buffer:
            number = ctypes.get_errno()
            os.close(self._map_fd)
            raise failure("open the perf buffers of the events map", number)
        self._buffer = buffer

    def __enter__(self) -> PerfReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def poll(self, timeout_ms: int) -> int:
        """Wait up to `timeout_ms` (-1: for ever), deliver what is due, return how many records.

        Raises KernelError, and whatever a callback raised; the records behind that one stay in
        the buffer for the next call.
        """
        return self._deliver(library().perf_buffer__poll, timeout_ms)

    def consume(self) -> int:
        """Deliver all records in the buffers without waiting; as poll() otherwise."""
        return self._deliver(library().perf_buffer__consume)

    def close(self) -> None:
        """Free the buffers; later records are counted as lost by the programs."""
        if self._buffer is not None:
            library().perf_buffer__free(self._buffer)
            self._buffer = None
            os.close(self._map_fd)

    def _deliver(self, function: Callable[..., int], *arguments: int) -> int:
        if self._buffer is None:
            raise failure("read events from a closed reader", errno.EBADF)
        self._delivered = 0
        result = function(self._buffer, *arguments)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if result != -errno.EINTR:
            check(result, "read events")
        return self._delivered

    def _record(self, _context: int | None, cpu: int, header: int) -> int:
        """Take one record from libbpf; an exception stops the delivery and is raised there."""
        try:
            self._dispatch(cpu, header)
        except BaseException as error:
            self._error = error
            return _STOP
        return _CONTINUE

    def _dispatch(self, cpu: int, header: int) -> None:
        kind = c_uint32.from_address(header).value
        body = header + _HEADER_BYTES
        if kind == _RECORD_SAMPLE:
            size = c_uint32.from_address(body).value
            self._delivered += 1
            self._on_event(cpu, ctypes.string_at(body + 4, size))
        elif kind == _RECORD_LOST:
            self._on_lost(cpu, c_uint64.from_address(body + 8).value)
