# SPDX-License-Identifier: Apache-2.0
"""Which XDP program an interface has, asked of rtnetlink.

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
_NLM_F_REQUEST: Final = 1
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


def _ask(ifindex: int) -> bytes:
    """Return the attributes of one interface, without its statistics."""
    mask = _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _IFLA_EXT_MASK) + _NUMBER.pack(_SKIP_STATISTICS)
    body = _LINK.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + mask
    request = _HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, _NLM_F_REQUEST, 1, 0) + body
    what = f"read the XDP program of the interface with index {ifindex}"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.sendto(request, (0, 0))
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
