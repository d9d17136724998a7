# SPDX-License-Identifier: Apache-2.0
"""BPF maps: create, read, write, walk and describe them by file descriptor."""

from __future__ import annotations

import array
import ctypes
import enum
import errno
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_char, c_size_t, c_uint32, c_uint64
from pathlib import Path
from typing import Final, NamedTuple

from vgw.errors import KernelError
from vgw.libbpf.library import NO_BATCH, change, check, failure, library
from vgw.libbpf.side_by_side import side_by_side

BATCH_ENTRIES: Final = 4096
_MAX_WALK: Final = 1 << 24
#: Deletions that wait for the kernel at the same time.
_WAITING: Final = 64


class MapType(enum.IntEnum):
    """Map types vgw uses, as numbered by the kernel."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13


class MapFlag(enum.IntFlag):
    """Map creation flags vgw uses."""

    NO_PREALLOC = 1 << 0
    INNER_MAP = 1 << 12


MAPS_OF_MAPS: Final = (MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS)
PER_CPU: Final = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY)


class MapInfo(NamedTuple):
    """What the kernel says about a map; sizes in bytes, of one value even if it is per CPU."""

    map_type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class _MapCreateOpts(ctypes.Structure):
    _fields_ = [
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    ]


class _MapInfo(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    ]


@functools.cache
def possible_cpus() -> int:
    """Return how many CPUs the kernel keeps a per-CPU value for."""
    return check(library().libbpf_num_possible_cpus(), "count the possible CPUs")


def map_create(  # noqa: PLR0913, PLR0917 (the kernel's own parameters)
    map_type: int,
    name: str,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    inner_fd: int | None = None,
) -> int:
    """Create a map and return its fd; sizes in bytes, `inner_fd` is a map of maps' template.

    The kernel keeps the first 15 characters of `name`. Raises KernelError.
    """
    opts = _MapCreateOpts(ctypes.sizeof(_MapCreateOpts), map_flags=flags)
    if inner_fd is not None:
        opts.inner_map_fd = inner_fd
    sizes = key_size, value_size, max_entries
    call = library().bpf_map_create
    created = change(
        "map create", name, call, map_type, name[:15].encode(), *sizes, ctypes.byref(opts)
    )
    return check(created, f"create the map {name} ({max_entries} entries)")


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the value of `key`, or None when the map has no such key; raises KernelError.

    The kernel writes `value_size` bytes unchecked: for a per-CPU map it is the value's size
    rounded up to 8, times possible_cpus(); for a map of maps it is 4 and the value is a map id.
    """
    value = ctypes.create_string_buffer(value_size)
    result = library().bpf_map_lookup_elem(fd, key, value)
    if result == -errno.ENOENT:
        return None
    check(result, "read from a map")
    return value.raw


def map_read(fd: int, key: bytes, value: ctypes.Structure) -> bool:
    """Read the value of `key` into a structure of its size; return whether the map has the key.

    Raises KernelError. A third of the time of map_lookup() and a copy.
    """
    result = library().bpf_map_lookup_elem(fd, key, ctypes.byref(value))
    if result == -errno.ENOENT:
        return False
    check(result, "read from a map")
    return True


def map_update(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Write one entry; raises KernelError. In a map of maps the value is a map's fd."""
    call = library().bpf_map_update_elem
    written = change("map update", fd, call, fd, key, value, flags)
    if written < 0:
        raise failure(f"write to {_named(fd)}", -written)


def map_update_many(fd: int, entries: Mapping[bytes, bytes]) -> None:
    """Write several entries by one call; raises KernelError, and some may be written then.

    A map of maps makes the kernel wait for an RCU grace period: here once, from Linux 6.8 on,
    instead of once an entry.
    """
    keys, values = b"".join(entries), b"".join(entries.values())
    count = c_uint32(len(entries))
    call = library().bpf_map_update_batch
    result = change("map update", fd, call, fd, keys, values, ctypes.byref(count), None)
    if -result in NO_BATCH:
        for key, value in entries.items():
            map_update(fd, key, value)
        return
    if result < 0:
        raise failure(f"write {len(entries)} entries to {_named(fd)}", -result)


def map_delete_many(fd: int, keys: Sequence[bytes]) -> None:
    """Delete entries that are there from a map of maps; raises KernelError.

    The kernel waits for an RCU grace period at each, and takes no batch; calls at the same time
    wait for the same one.
    """
    for start in range(0, len(keys), _WAITING):
        part = keys[start : start + _WAITING]
        side_by_side(*(functools.partial(map_delete, fd, key) for key in part))


def map_delete(fd: int, key: bytes) -> bool:
    """Delete one entry and return whether it was there; raises KernelError."""
    result = change("map delete", fd, library().bpf_map_delete_elem, fd, key)
    if result == -errno.ENOENT:
        return False
    if result < 0:
        raise failure(f"remove an entry of {_named(fd)}", -result)
    return True


def map_entries(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Walk all entries (sizes as for map_lookup); raises KernelError.

    An entry that stays in the map during the walk appears, one that comes or goes may.
    """
    count = BATCH_ENTRIES
    tokens = [ctypes.create_string_buffer(max(key_size, 8)) for _ in range(2)]
    begin: ctypes.Array[c_char] | None = None
    while True:
        keys = ctypes.create_string_buffer(key_size * count)
        values = ctypes.create_string_buffer(value_size * count)
        filled = c_uint32(count)
        result = library().bpf_map_lookup_batch(
            fd, begin, tokens[0], keys, values, ctypes.byref(filled), None
        )
        if result == -errno.ENOSPC:  # one bucket of a hash holds more than fits
            count *= 2
            continue
        if begin is None and -result in NO_BATCH:
            yield from _walk(fd, key_size, value_size)
            return
        if result == -errno.EINTR:  # older kernels: no batch gets over a hole in a map of maps
            key = None if begin is None else begin.raw[:key_size]
            yield from _walk(fd, key_size, value_size, key)
            return
        if result not in (0, -errno.ENOENT):
            raise failure("walk a map", -result)
        all_keys, all_values = keys.raw, values.raw
        for index in range(filled.value):
            yield (
                all_keys[index * key_size : (index + 1) * key_size],
                all_values[index * value_size : (index + 1) * value_size],
            )
        if result == -errno.ENOENT:
            return
        begin = tokens[0]
        tokens.reverse()


def array_values(fd: int, value_size: int, first: int = 0, count: int | None = None) -> bytes:
    """Return values of an array, one behind the other by index; raises KernelError.

    They are `count` from index `first` on, which have to be there, or without `count` all from
    there on. `value_size` is that of one value as for map_lookup. Quick for many small ones.
    """
    wanted = map_info(fd).max_entries - first if count is None else count
    return ArrayPart(value_size, first, wanted).read(fd)


class ArrayPart:
    """Reads the same part of one array after the other into memory that stays where it is.

    For one thread at a time.
    """

    def __init__(self, value_size: int, first: int, count: int) -> None:
        """Read `count` values from index `first` on; `value_size` is as for map_lookup()."""
        self.first = first
        self._size, self._count = value_size, count
        self._before = bytes(c_uint32(first - 1)) if first else None
        self._values = (c_char * (value_size * count))()
        self._filled = c_uint32(count)
        keys, token = (c_uint32 * count)(), c_uint32()
        places = ctypes.byref(token), keys, self._values, ctypes.byref(self._filled)
        self._arguments = self._before, *places, None
        self._batch = library().bpf_map_lookup_batch

    def read(self, fd: int) -> bytes:
        """Return the values, one behind the other. Raises KernelError."""
        self._filled.value = self._count
        result = self._batch(fd, *self._arguments)
        if -result in NO_BATCH:
            walked = itertools.islice(_walk(fd, 4, self._size, self._before), self._count)
            return b"".join(value for _, value in walked)
        if result != -errno.ENOENT:  # which says that the end was reached
            check(result, "read an array")
        return self._values.raw


def _walk(
    fd: int, key_size: int, value_size: int, key: bytes | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """Walk a map entry by entry behind a key, for kernels or map types without batch lookups."""
    following = ctypes.create_string_buffer(key_size)
    for _ in range(_MAX_WALK):  # a key deleted under the walk starts it again
        result = library().bpf_map_get_next_key(fd, key, following)
        if result == -errno.ENOENT:
            return
        check(result, "walk a map")
        key = following.raw
        value = map_lookup(fd, key, value_size)
        if value is not None:
            yield key, value


def map_fill(fd: int, values: bytes, value_size: int) -> None:
    """Write an array from index 0 on with the concatenated `values`; raises KernelError."""
    total = len(values) // value_size
    keys = array.array("I", range(total)).tobytes()
    count = c_uint32(total)
    call = library().bpf_map_update_batch
    result = change("map update", fd, call, fd, keys, values, ctypes.byref(count), None)
    if -result in NO_BATCH and not count.value:
        for index in range(total):
            value = values[index * value_size : (index + 1) * value_size]
            map_update(fd, bytes(c_uint32(index)), value)
        return
    check(result, f"write {total} entries to a map")


def map_info(fd: int) -> MapInfo:
    """Return what the kernel says about the map; raises KernelError."""
    info = _MapInfo()
    size = c_uint32(ctypes.sizeof(info))
    result = library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    check(result, "describe a map")
    return MapInfo(
        map_type=info.type,
        id=info.id,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        name=info.name.decode(errors="replace"),
    )


def _named(fd: int) -> str:
    """Return what to call a map in an error."""
    try:
        return f"the map {map_info(fd).name}"
    except KernelError:
        return "a map"


def map_fd_by_id(map_id: int) -> int:
    """Open a map by id; needs CAP_SYS_ADMIN; raises KernelError."""
    return check(library().bpf_map_get_fd_by_id(map_id), f"open the map with id {map_id}")


def map_memory(fd: int) -> int:
    """Return the bytes of kernel memory that the map itself takes, without its inner maps.

    Raises KernelError when `fd` is not an open map.
    """
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError as error:
        raise failure("read the memory of a map", error.errno or errno.EIO) from None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "memlock":
            return int(value)
    raise failure("read the memory of a map", errno.EINVAL)


def wait_for_programs() -> None:
    """Return once every program run that started before the call has ended; raises KernelError.

    After it no packet is judged with what a map held before the caller's writes. Takes an RCU
    grace period, 8-16 ms. The kernel waits one out at each update of a map of maps; the
    membarrier call would do too, but refuses on hosts with isolated (nohz_full) CPUs.
    """
    fds: list[int] = []
    try:
        fds.append(map_create(MapType.ARRAY, "barrier_inner", 4, 4, 1))
        fds.append(map_create(MapType.ARRAY_OF_MAPS, "barrier", 4, 4, 1, inner_fd=fds[0]))
        map_update(fds[1], bytes(4), bytes(c_uint32(fds[0])))
    finally:
        for fd in fds:
            os.close(fd)
