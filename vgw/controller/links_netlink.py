# SPDX-License-Identifier: Apache-2.0
"""Attachments by netlink, for kernels without bpf_links: XDP modes and filters of a clsact qdisc.

pyroute2 is imported when one of these is called: it takes longer to start than an attach takes.
Every function raises KernelError when the kernel refuses.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final, TypeVar

from vgw import steps
from vgw.abi import Path
from vgw.errors import ForeignProgramError, KernelError

#: Where a filter of ours goes: before what others add later, under a handle of its own.
FILTER_PRIORITY: Final = 1
FILTER_HANDLE: Final = 0x767767

_Answer = TypeVar("_Answer")

#: What the kernel says when there is no such qdisc, filter or interface.
_NOTHING_THERE: Final = (errno.EINVAL, errno.ENOENT, errno.ENODEV)

#: XDP_FLAGS_UPDATE_IF_NOEXIST and XDP_FLAGS_REPLACE of linux/if_link.h.
_XDP_UPDATE_IF_NOEXIST: Final = 1 << 0
_XDP_REPLACE: Final = 1 << 4

#: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS or TC_H_MIN_EGRESS) of linux/pkt_sched.h.
PARENT: Final = {Path.FROM_VM: 0xFFFFFFF2, Path.TO_VM: 0xFFFFFFF3}


def interface_name(ifindex: int) -> str:
    """Return the name of an interface for a message, whether it still exists or not."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"with index {ifindex}"


def set_xdp(ifindex: int, prog_fd: int, mode: int, replaced_fd: int | None = None) -> None:
    """Attach an XDP program in the place of another, by default where there is none.

    `mode` is XDP_NATIVE or XDP_GENERIC.
    """
    if replaced_fd is None:
        condition: list[tuple[str, object]] = [
            ("IFLA_XDP_FLAGS", {"value": mode | _XDP_UPDATE_IF_NOEXIST})
        ]
    else:
        condition = _instead_of(replaced_fd, mode)
    _change_xdp(ifindex, ("IFLA_XDP_FD", prog_fd), *condition)


def clear_xdp(ifindex: int, prog_fd: int, mode: int) -> None:
    """Remove the XDP program of a mode if it is `prog_fd`; another one stays (EEXIST)."""
    _change_xdp(ifindex, ("IFLA_XDP_FD", -1), *_instead_of(prog_fd, mode))


def _instead_of(prog_fd: int, mode: int) -> list[tuple[str, object]]:
    """Return what makes a change of the XDP program depend on which one is there."""
    return [
        ("IFLA_XDP_FLAGS", {"value": mode | _XDP_REPLACE}),
        ("IFLA_XDP_EXPECTED_FD", prog_fd),
    ]


def has_clsact(ifindex: int) -> bool:
    """Tell whether the interface has a clsact qdisc."""
    return "clsact" in _qdiscs(ifindex)


def add_clsact(ifindex: int) -> None:
    """Make sure that the interface has a clsact qdisc.

    An ingress qdisc without filters gives way to it. Raises ForeignProgramError when one has any:
    both cannot be there, and what is added to the side towards the VM would land on the other.
    """
    if "ingress" in _qdiscs(ifindex):
        if _filters(ifindex, Path.FROM_VM):
            raise ForeignProgramError(
                f"interface {interface_name(ifindex)} has an ingress qdisc with filters of "
                "somebody else where vgw needs a clsact qdisc; replace it by one"
            )
        _ask(
            f"remove the ingress qdisc of {interface_name(ifindex)}",
            lambda route: route.tc("del", "ingress", ifindex),
            step="qdisc delete",
            unless=_NOTHING_THERE,
            otherwise=None,
        )
    _ask(
        f"add a clsact qdisc to {interface_name(ifindex)}",
        lambda route: route.tc("add", "clsact", ifindex),
        step="qdisc add",
        unless=(errno.EEXIST,),
        otherwise=None,
    )


def remove_clsact(ifindex: int) -> bool:
    """Remove the clsact qdisc unless it has a filter; return whether there is none now."""
    if any(_filters(ifindex, path) for path in Path):
        return False
    _ask(
        f"remove the clsact qdisc of {interface_name(ifindex)}",
        lambda route: route.tc("del", "clsact", ifindex),
        step="qdisc delete",
        unless=_NOTHING_THERE,
        otherwise=None,
    )
    return True


def add_filter(ifindex: int, path: Path, prog_fd: int, name: str, *, replace: bool = False) -> None:
    """Add a direct-action filter; EEXIST or EINVAL when one of somebody else is in its place.

    With `replace` it takes the place of the one that is there, which no packet notices.
    """
    _ask(
        f"add a tc filter to {interface_name(ifindex)}",
        lambda route: route.tc(
            "replace-filter" if replace else "add-filter",
            "bpf",
            ifindex,
            FILTER_HANDLE,
            fd=prog_fd,
            name=name,
            parent=PARENT[path],
            prio=FILTER_PRIORITY,
            direct_action=True,
        ),
        step="filter add",
    )


def filter_name(ifindex: int, path: Path) -> str | None:
    """Return the name of the filter in the place of ours, or None when there is none."""
    for entry in _filters(ifindex, path):
        options = entry.get_attr("TCA_OPTIONS")
        in_place = (entry["handle"], entry["info"] >> 16) == (FILTER_HANDLE, FILTER_PRIORITY)
        if in_place and options is not None:
            return str(options.get_attr("TCA_BPF_NAME"))
    return None


def remove_filter(ifindex: int, path: Path) -> None:
    """Remove the filter in the place of ours; none there is no error."""
    _ask(
        f"remove a tc filter from {interface_name(ifindex)}",
        lambda route: route.tc(
            "del-filter",
            "bpf",
            ifindex,
            FILTER_HANDLE,
            parent=PARENT[path],
            prio=FILTER_PRIORITY,
        ),
        step="filter delete",
        unless=_NOTHING_THERE,
        otherwise=None,
    )


def _qdiscs(ifindex: int) -> set[str]:
    """Return the kinds of the qdiscs of an interface."""
    found: list[Any] = _ask(
        f"list the qdiscs of {interface_name(ifindex)}",
        lambda route: list(route.get_qdiscs(index=ifindex)),
        unless=_NOTHING_THERE,
        otherwise=[],
    )
    return {str(entry.get_attr("TCA_KIND")) for entry in found}


def _filters(ifindex: int, path: Path) -> list[Any]:
    return _ask(
        f"list the tc filters of {interface_name(ifindex)}",
        lambda route: list(route.get_filters(index=ifindex, parent=PARENT[path])),
        unless=_NOTHING_THERE,
        otherwise=[],
    )


def _change_xdp(ifindex: int, *attributes: tuple[str, object]) -> None:
    _ask(
        f"change the XDP program of {interface_name(ifindex)}",
        lambda route: route.link("set", index=ifindex, xdp={"attrs": list(attributes)}),
        step="xdp set",
    )


def _ask(
    what: str,
    request: Callable[[Any], _Answer],
    *,
    step: str | None = None,
    unless: tuple[int, ...] = (),
    otherwise: _Answer | None = None,
) -> _Answer:
    """Return what `request` answers, given a netlink socket; `step` if it changes something.

    `otherwise` is the answer when the kernel refuses with one of the errnos `unless`; another
    refusal is raised as a KernelError of "cannot `what`".
    """
    import pyroute2  # noqa: PLC0415

    refused = 0 if step is None else steps.announce(step, what)
    if refused:
        raise KernelError(f"cannot {what}: {os.strerror(refused)}", refused)
    try:
        with pyroute2.IPRoute() as route:
            return request(route)
    except pyroute2.NetlinkError as error:
        if error.code in unless:
            return otherwise  # type: ignore[return-value]
        raise KernelError(f"cannot {what}: {os.strerror(error.code)}", error.code) from error
