# SPDX-License-Identifier: Apache-2.0
"""The kernel's BPF interface as vgw uses it: ctypes over libbpf.so.1, file descriptors as ints.

Every function raises KernelError when the kernel refuses; fds are closed with os.close. Keys and
values are bytes in the host's byte order unless vgw/abi.py says otherwise.
"""

from vgw.libbpf.kernel_types import Member, struct_members
from vgw.libbpf.library import library
from vgw.libbpf.links import (
    XDP_GENERIC,
    XDP_NATIVE,
    AttachType,
    LinkInfo,
    LinkType,
    get_pinned,
    link_create,
    link_detach,
    link_info,
    link_update,
    pin,
    tcx_programs,
    xdp_link,
)
from vgw.libbpf.maps import (
    MAPS_OF_MAPS,
    PER_CPU,
    MapFlag,
    MapInfo,
    MapType,
    array_values,
    map_create,
    map_delete,
    map_delete_many,
    map_entries,
    map_fd_by_id,
    map_fill,
    map_info,
    map_lookup,
    map_memory,
    map_update,
    map_update_many,
    possible_cpus,
    wait_for_programs,
)
from vgw.libbpf.perf import PerfReader
from vgw.libbpf.programs import (
    LICENSE,
    ProgInfo,
    ProgType,
    TestRun,
    prog_fd_by_id,
    prog_info,
    prog_load,
    prog_test_run,
)
from vgw.libbpf.side_by_side import outcomes, side_by_side
from vgw.libbpf.xdp_query import xdp_program

__all__ = [
    "LICENSE",
    "MAPS_OF_MAPS",
    "PER_CPU",
    "XDP_GENERIC",
    "XDP_NATIVE",
    "AttachType",
    "LinkInfo",
    "LinkType",
    "MapFlag",
    "MapInfo",
    "MapType",
    "Member",
    "PerfReader",
    "ProgInfo",
    "ProgType",
    "TestRun",
    "array_values",
    "get_pinned",
    "library",
    "link_create",
    "link_detach",
    "link_info",
    "link_update",
    "map_create",
    "map_delete",
    "map_delete_many",
    "map_entries",
    "map_fd_by_id",
    "map_fill",
    "map_info",
    "map_lookup",
    "map_memory",
    "map_update",
    "map_update_many",
    "outcomes",
    "pin",
    "possible_cpus",
    "prog_fd_by_id",
    "prog_info",
    "prog_load",
    "prog_test_run",
    "side_by_side",
    "struct_members",
    "tcx_programs",
    "wait_for_programs",
    "xdp_link",
    "xdp_program",
]
