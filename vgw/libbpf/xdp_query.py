# SPDX-License-Identifier: Apache-2.0
"""Which XDP programs interfaces have, asked of rtnetlink.

libbpf's bpf_xdp_query() answers the same, but has the kernel list every interface of the host for
it; with hundreds of VMs that is most of what an attach or a status would do. pyroute2 takes longer
to import than an attach may take.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

from vgw.libbpf.library import failure

_RTM_GETLINK: Final = 18
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 1
_NLM_F_DUMP: Final = 0x300
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_NUMBER: Final = struct.Struct("=I")
_NESTED: Final = 1 << 15
_IFLA_EXT_MASK: Final = 29
_SKIP_STATISTICS: Final = 1 << 3
_IFLA_XDP: Final = 43
_XDP_ATTACHED: Final = 2
_XDP_PROG_ID: Final = 4
_XDP_DRV_PROG_ID: Final = 5
_XDP_SKB_PROG_ID: Final = 6
_XDP_HW_PROG_ID: Final = 7
_ATTACHED_GENERIC: Final = 2
_ANSWER_BYTES: Final = 65536
#: IFLA_XDP with nothing in it but that nothing is attached.
_NO_PROGRAM: Final = _ATTRIBUTE.pack(12, _IFLA_XDP) + _ATTRIBUTE.pack(5, _XDP_ATTACHED) + bytes(4)


def xdp_program(ifindex: int) -> tuple[int, str] | None:
    """Return the id of the interface's XDP program and "native" or "generic", or None.

    Raises KernelError.
    """
    link = dict(attributes(_ask(ifindex)))
    xdp = dict(attributes(link.get(_IFLA_XDP, b"")))
    attached = xdp.get(_XDP_ATTACHED, b"\0")[0]
    if not attached:
        return None
    ids = {kind: _NUMBER.unpack(value)[0] for kind, value in xdp.items() if len(value) == 4}
    either = ids.get(_XDP_PROG_ID, 0)
    if attached == _ATTACHED_GENERIC:
        return ids.get(_XDP_SKB_PROG_ID, either), "generic"
    return ids.get(_XDP_DRV_PROG_ID) or ids.get(_XDP_HW_PROG_ID) or either, "native"


def xdp_programs() -> dict[int, int]:
    """Return the id of the XDP program of each interface that has one, by index.

    One question for all interfaces of the network namespace. Raises KernelError.
    """
    found: dict[int, int] = {}
    for ifindex, answer in _ask_all():
        xdp = dict(attributes(dict(attributes(answer)).get(_IFLA_XDP, b"")))
        ids = [_NUMBER.unpack(value)[0] for value in xdp.values() if len(value) == 4]
        if ids:
            found[ifindex] = ids[0]
    return found


def _ask_all() -> Iterator[tuple[int, bytes]]:
    """Yield index and attributes of each interface that may have a program."""
    what = "list the XDP programs of all interfaces"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.sendto(_request(0, _NLM_F_REQUEST | _NLM_F_DUMP), (0, 0))
            while True:
                data, start = sock.recv(_ANSWER_BYTES), 0
                while start + _HEADER.size <= len(data):
                    length, kind, *_ = _HEADER.unpack_from(data, start)
                    if kind == _NLMSG_DONE:
                        return
                    body, end = start + _HEADER.size, start + length
                    if kind == _NLMSG_ERROR:
                        (number,) = struct.unpack_from("=i", data, body)
                        raise failure(what, -number)
                    # Most have none, and need not be taken apart.
                    if data.find(_NO_PROGRAM, body, end) < 0:
                        (ifindex,) = struct.unpack_from("=4xi", data, body)
                        yield ifindex, data[body + _LINK.size : end]
                    start += (max(length, _HEADER.size) + 3) & ~3
    except OSError as error:
        raise failure(what, error.errno or 0) from error


def _request(ifindex: int, flags: int) -> bytes:
    """Return the question for one interface, or with the flag of a dump for all."""
    mask = _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _IFLA_EXT_MASK) + _NUMBER.pack(_SKIP_STATISTICS)
    body = _LINK.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + mask
    return _HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, flags, 1, 0) + body


def _ask(ifindex: int) -> bytes:
    """Return the attributes of one interface, without its statistics."""
    what = f"read the XDP program of the interface with index {ifindex}"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.sendto(_request(ifindex, _NLM_F_REQUEST), (0, 0))
            answer = sock.recv(_ANSWER_BYTES)
    except OSError as error:
        raise failure(what, error.errno or 0) from error
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (number,) = struct.unpack_from("=i", answer, _HEADER.size)
        raise failure(what, -number)
    return answer[_HEADER.size + _LINK.size : length]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute in a run of them."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[(max(length, _ATTRIBUTE.size) + 3) & ~3 :]
