# SPDX-License-Identifier: Apache-2.0
"""What others run on a protected interface beside vgw's programs.

A program or filter that runs behind ours may still send packets elsewhere (act_mirred,
bpf_redirect) or copy them, past the bridge and past the firewalls of other VMs. Nothing of it is
removed; it is said. The kernel is asked by netlink directly: `status` must not load a library.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import Any, Final

from vgw import libbpf
from vgw.abi import Path
from vgw.controller.interfaces import messages
from vgw.controller.links_netlink import FILTER_HANDLE, FILTER_PRIORITY, PARENT
from vgw.errors import KernelError
from vgw.libbpf import AttachType
from vgw.libbpf.xdp_query import attributes

_RTM_NEWTFILTER: Final = 44
_RTM_GETTFILTER: Final = 46
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
#: struct tcmsg: family, interface, handle, parent, priority and protocol.
_TCMSG: Final = struct.Struct("=BxxxiIII")
_TCA_KIND: Final = 1
_ANSWER_BYTES: Final = 1 << 16

_TCX_TYPE: Final = {Path.FROM_VM: AttachType.TCX_INGRESS, Path.TO_VM: AttachType.TCX_EGRESS}

Row = dict[str, Any]


def programs_beside(ifindex: int, known: Collection[int]) -> list[Row]:
    """Return what of others is on an interface: {"path", "kind", "id"}.

    `kind` is "xdp" or "tcx" and `id` the program's, or the kind of a tc filter and its priority.
    `known` are ids of programs that are vgw's, or were reported already. Raises KernelError.
    """
    return list(_found(ifindex, known))


def _found(ifindex: int, known: Collection[int]) -> Iterator[Row]:
    xdp = libbpf.xdp_program(ifindex)
    if xdp is not None and xdp[0] not in known:
        yield _row(Path.FROM_VM, "xdp", xdp[0])
    for path in Path:
        for program in libbpf.tcx_programs(ifindex, _TCX_TYPE[path]):
            if program not in known:
                yield _row(path, "tcx", program)
        for kind, priority in sorted(_filters(ifindex, path)):
            yield _row(path, kind, priority)


def _row(path: Path, kind: str, number: int) -> Row:
    return {"path": path.name.lower(), "kind": kind, "id": number}


def _filters(ifindex: int, path: Path) -> set[tuple[str, int]]:
    """Return kind and priority of each filter at an interface's ingress or egress but ours."""
    body = _TCMSG.pack(socket.AF_UNSPEC, ifindex, 0, PARENT[path], 0)
    request = _HEADER.pack(_HEADER.size + len(body), _RTM_GETTFILTER, _NLM_F_REQUEST_DUMP, 1, 0)
    found: set[tuple[str, int]] = set()
    ours, handles = ("bpf", FILTER_PRIORITY), set()
    for kind, answer in _dump(request + body, ifindex):
        if kind != _RTM_NEWTFILTER:
            continue
        _, _, handle, _, info = _TCMSG.unpack_from(answer)
        name = dict(attributes(answer[_TCMSG.size :])).get(_TCA_KIND, b"").rstrip(b"\0").decode()
        entry = name, info >> 16
        found.add(entry)
        if entry == ours and handle:  # 0 speaks of the priority and not of a filter
            handles.add(handle)
    return found - {ours} if handles == {FILTER_HANDLE} else found


def _dump(request: bytes, ifindex: int) -> Iterator[tuple[int, bytes]]:
    """Ask and yield type and body of each answer."""
    what = f"list the tc filters of the interface with index {ifindex}"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.sendto(request, (0, 0))
            while True:
                for kind, _, _, body in messages(sock.recv(_ANSWER_BYTES)):
                    if kind == _NLMSG_DONE:
                        return
                    if kind == _NLMSG_ERROR:
                        (number,) = struct.unpack_from("=i", body)
                        raise KernelError(f"cannot {what}: {os.strerror(-number)}", -number)
                    yield kind, body
    except OSError as error:
        raise KernelError(f"cannot {what}: {error.strerror}", error.errno or 0) from error
