# SPDX-License-Identifier: Apache-2.0
"""How a program takes the place of another of vgw's on an interface, with no packet in between."""

from __future__ import annotations

import contextlib
import os
import pathlib

from vgw import files, libbpf
from vgw.abi import Path
from vgw.controller import links
from vgw.controller import links_netlink as netlink
from vgw.controller.pins import beside, quietly
from vgw.errors import KernelError
from vgw.libbpf import AttachType
from vgw.policy.model import Hook


def take_over(
    prog_fd: int, ifindex: int, path: Path, hook: Hook, pin_dir: pathlib.Path
) -> int | None:
    """Let a program run instead of that of the endpoint in `pin_dir`, from one packet to the next.

    Returns an fd of the program that ran there, or None when the endpoint has none at that hook;
    raises KernelError when the kernel refuses, and the old program runs on then.
    """
    pin = links.link_pin(pin_dir, path)
    if pin.exists():
        return _take_over_link(prog_fd, ifindex, path, hook, pin_dir)
    if hook is Hook.XDP:
        return _take_over_xdp(prog_fd, ifindex, pin_dir)
    return _take_over_filter(prog_fd, ifindex, path, pin_dir)


def inherit(ifindex: int, path: Path, old_dir: pathlib.Path, new_dir: pathlib.Path) -> None:
    """File the attachment of a path with another endpoint, whose program has taken it over."""
    pin = links.link_pin(old_dir, path)
    if pin.exists():
        files.rename(pin, links.link_pin(new_dir, path))
        return
    links.mark_interface(new_dir, ifindex)
    links.hand_on_clsact(old_dir, new_dir)


def retire(ifindex: int | None, path: Path, old_dir: pathlib.Path, new_dir: pathlib.Path) -> None:
    """Take the program of one endpoint off that another one's has replaced or runs beside.

    The link of what runs then is pinned in `old_dir`. What is gone already is no error.
    """
    old, new = links.link_pin(old_dir, path), links.link_pin(new_dir, path)
    if not new.exists():
        if running(old) != _pinned_id(new_dir, path):
            links.detach(ifindex, path, old)
    elif not old.exists():
        links.detach(ifindex, path, old)
        files.rename(new, old)
    else:
        # The old link goes with the last that holds it: at the latest with this process.
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(KernelError):
                link = libbpf.get_pinned(old)
                stack.callback(os.close, link)
                stack.callback(quietly, libbpf.link_detach, link)
            files.rename(new, old)


def running(pin: pathlib.Path) -> int | None:
    """Return the id of the program that a pinned link runs, None when it runs none."""
    info = links.read_link(pin)
    return info.prog_id if info is not None and info.ifindex else None


def _take_over_link(
    prog_fd: int, ifindex: int, path: Path, hook: Hook, pin_dir: pathlib.Path
) -> int | None:
    pin = links.link_pin(pin_dir, path)
    wanted = AttachType.XDP if hook is Hook.XDP else links.TCX_TYPE[path]
    info = links.read_link(pin)
    if info is None or (info.ifindex, info.attach_type) != (ifindex, wanted):
        return None
    with contextlib.ExitStack() as on_failure, links.opened(pin) as link:
        old = _open(info.prog_id, path, pin_dir)
        on_failure.callback(os.close, old)
        libbpf.link_update(link, prog_fd)
        on_failure.pop_all()
    return old


def _take_over_xdp(prog_fd: int, ifindex: int, pin_dir: pathlib.Path) -> int | None:
    known = _pinned_id(pin_dir, Path.FROM_VM)
    there = libbpf.xdp_program(ifindex)
    if there is None or there[0] != known:
        return None
    with contextlib.ExitStack() as on_failure:
        old = _open(there[0], Path.FROM_VM, pin_dir)
        on_failure.callback(os.close, old)
        netlink.set_xdp(ifindex, prog_fd, links.XDP_MODES[links.mode_name(there[1])], old)
        on_failure.pop_all()
    return old


def _take_over_filter(prog_fd: int, ifindex: int, path: Path, pin_dir: pathlib.Path) -> int | None:
    known = links.program_of_filter(ifindex, path)
    if known is None:
        return None
    with contextlib.ExitStack() as on_failure:
        old = _open(known, path, pin_dir)
        on_failure.callback(os.close, old)
        name = links.filter_name(path, libbpf.prog_info(prog_fd).id)
        netlink.add_filter(ifindex, path, prog_fd, name, replace=True)
        on_failure.pop_all()
    return old


def _open(prog_id: int, path: Path, pin_dir: pathlib.Path) -> int:
    """Open a program that is pinned in an endpoint's directory or beside it; raises KernelError."""
    for place in (pin_dir, beside(pin_dir)):
        with contextlib.suppress(KernelError):
            fd = libbpf.get_pinned(links.program_pin(place, path))
            if libbpf.prog_info(fd).id == prog_id:
                return fd
            os.close(fd)
    return libbpf.prog_fd_by_id(prog_id)  # which takes CAP_SYS_ADMIN


def _pinned_id(pin_dir: pathlib.Path, path: Path) -> int | None:
    program = links.pinned_program(links.program_pin(pin_dir, path))
    return None if program is None else program.id
