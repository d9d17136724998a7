# SPDX-License-Identifier: Apache-2.0
"""Attachments: how a program gets onto an interface, off it, and what is really there.

A bpf_link pinned beside the endpoint's maps is the way of choice: it outlives the process and no
other tool can knock it off. Kernels without links for a hook get netlink XDP or a clsact filter.
Programs of others are never removed unless asked to by `force`, and never put back on a detach.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from vgw import files, libbpf
from vgw.abi import Path
from vgw.controller import links_netlink as netlink
from vgw.controller.interfaces import (
    InterfaceFacts,
    OnLink,
    choose_hook,
    find_interface,
    watch_links,
)
from vgw.controller.links_netlink import interface_name
from vgw.controller.marks import mark, marked
from vgw.errors import ForeignProgramError, KernelError, VgwError
from vgw.libbpf import AttachType
from vgw.policy.model import Hook

__all__ = [
    "Attachment",
    "InterfaceFacts",
    "OnLink",
    "attach",
    "attached_ifindex",
    "choose_hook",
    "detach",
    "find_interface",
    "interface_name",
    "is_still",
    "read_attachment",
    "watch_links",
]

HookName = Literal["xdp", "tc"]
ModeName = Literal["native", "generic", "tcx", "clsact"]

#: Modes in the order in which they are tried.
XDP_MODES: Final[dict[ModeName, int]] = {
    "native": libbpf.XDP_NATIVE,
    "generic": libbpf.XDP_GENERIC,
}
TCX_TYPE: Final = {Path.FROM_VM: AttachType.TCX_INGRESS, Path.TO_VM: AttachType.TCX_EGRESS}

#: What a driver or kernel answers that does not have what was asked for.
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE, errno.ENOSPC, errno.E2BIG)

#: A directory beside the pins says that vgw made the clsact qdisc.
_MADE_CLSACT: Final = "made_clsact"
#: One with this prefix and an index says where programs are that have no links.
_MARK: Final = "on_"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program on an interface, as the kernel says it is.

    `ahead` are ids of programs of others on the same path that run before it, `shield` is that of
    vgw's own shield there.
    """

    hook: HookName
    mode: ModeName
    link: bool
    prog_id: int
    ahead: tuple[int, ...] = ()
    shield: int | None = None


def link_pin(directory: pathlib.Path, path: Path) -> pathlib.Path:
    """Return where the link of one path is pinned in the directory of an endpoint."""
    return directory / f"link_{path.name.lower()}"


def program_pin(directory: pathlib.Path, path: Path) -> pathlib.Path:
    """Return where the program of one path is pinned in the directory of an endpoint."""
    return directory / f"prog_{path.name.lower()}"


def shield_pin(directory: pathlib.Path) -> pathlib.Path:
    """Return where the program of an endpoint's shield is pinned while it is up."""
    return directory / "prog_shield"


@contextlib.contextmanager
def opened(pin: pathlib.Path) -> Iterator[int]:
    """Open a pinned object for the time of a block; raises KernelError."""
    fd = libbpf.get_pinned(pin)
    try:
        yield fd
    finally:
        os.close(fd)


def attach(  # noqa: PLR0913
    prog_fd: int,
    ifindex: int,
    path: Path,
    hook: Hook,
    pin: pathlib.Path,
    *,
    force: bool = False,
    prefer_link: bool = True,
) -> Attachment:
    """Attach a loaded program and return what the kernel then says.

    `hook` is XDP (only from_vm) or TC, `pin` is where the link goes. With `prefer_link` False, and
    on kernels without links, netlink is used and nothing is pinned. Raises ForeignProgramError
    when an XDP program of somebody else is there and not `force`, KernelError when the kernel
    refuses; nothing is attached then, and what was there before is there again.
    """
    if hook is Hook.XDP:
        return _attach_xdp(prog_fd, ifindex, pin, force=force, prefer_link=prefer_link)
    if prefer_link:
        try:
            _attach_link(prog_fd, ifindex, TCX_TYPE[path], 0, pin)
        except KernelError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return _attached(ifindex, path, pin.parent)
    _attach_clsact(prog_fd, ifindex, path, pin.parent)
    return _attached(ifindex, path, pin.parent)


def detach(ifindex: int | None, path: Path, pin: pathlib.Path) -> None:
    """Remove our program of one path from an interface; nothing of others is touched.

    `ifindex` None: the interface is gone. Whatever is left of the attachment goes; what is
    already gone is no error.
    """
    if pin.exists():
        # Without this the program would run on for as long as anybody holds the link open.
        with contextlib.suppress(KernelError), opened(pin) as fd:
            libbpf.link_detach(fd)
        files.unlink(pin)
        return
    program = pinned_program(program_pin(pin.parent, path))
    if ifindex is None or program is None:
        return
    if program.prog_type == libbpf.ProgType.XDP:
        there = libbpf.xdp_program(ifindex)
        if there is not None and there[0] == program.id:
            with opened(program_pin(pin.parent, path)) as fd:
                netlink.clear_xdp(ifindex, fd, XDP_MODES[mode_name(there[1])])
    elif program_of_filter(ifindex, path) == program.id:
        netlink.remove_filter(ifindex, path)
        remove_clsact_if_ours(ifindex, pin.parent)


def read_attachment(ifindex: int, path: Path, pin_dir: pathlib.Path) -> Attachment | None:
    """Return how the endpoint pinned in `pin_dir` is attached on one path, or None if it is not.

    Says only what the kernel says: a pinned link that was detached, or that is on another
    interface, is no attachment.
    """
    program = pinned_program(program_pin(pin_dir, path))
    if program is None:
        return None
    pin = link_pin(pin_dir, path)
    linked = _linked_program(pin, ifindex) == program.id
    if program.prog_type == libbpf.ProgType.XDP:
        there = libbpf.xdp_program(ifindex)
        if there is None or there[0] != program.id:
            return None
        return Attachment("xdp", mode_name(there[1]), linked, program.id)
    programs = libbpf.tcx_programs(ifindex, TCX_TYPE[path])
    if program.id in programs:
        ahead, shield = _xdp_ahead(ifindex, path, pin_dir)
        ahead = (*ahead, *programs[: programs.index(program.id)])
        return Attachment("tc", "tcx", linked, program.id, ahead, shield)
    if not pin.exists() and program_of_filter(ifindex, path) == program.id:
        ahead, shield = _xdp_ahead(ifindex, path, pin_dir)
        return Attachment("tc", "clsact", False, program.id, (*ahead, *programs), shield)
    return None


def is_still(attachment: Attachment, programs: bytes) -> bool:
    """Tell whether an attachment is as it was read before, by what is at its tcx hook now.

    `programs` is of libbpf.TcxLists. False also where that does not tell: read_attachment() does
    then.
    """
    ids = memoryview(programs).cast("I")
    return attachment.mode == "tcx" and attachment.prog_id in ids


def _xdp_ahead(
    ifindex: int, path: Path, pin_dir: pathlib.Path
) -> tuple[tuple[int, ...], int | None]:
    """Return the XDP program that sees packets of a path before tc does: of others, and a shield.

    One of others may redirect them.
    """
    there = libbpf.xdp_program(ifindex) if path is Path.FROM_VM else None
    while there is not None:
        if pinned_shield(pin_dir) == there[0]:
            return (), there[0]
        before, there = there, libbpf.xdp_program(ifindex)
        if there == before:
            return (there[0],), None
        # A shield came or went meanwhile: it goes before its pin does.
    return (), None


def pinned_shield(pin_dir: pathlib.Path) -> int | None:
    """Return the id of the program that is pinned as the shield of an endpoint, None without."""
    shield = pinned_program(shield_pin(pin_dir))
    return None if shield is None else shield.id


def pinned_program(pin: pathlib.Path) -> libbpf.ProgInfo | None:
    """Return what the kernel says of a pinned program, or None when there is none."""
    try:
        with opened(pin) as fd:
            return libbpf.prog_info(fd)
    except KernelError:
        return None


def linked_ifindex(pin_dir: pathlib.Path) -> int | None:
    """Return the index of the interface that an endpoint's links are on, whatever its name is now.

    None when it has no links, or the interface is gone.
    """
    for path in Path:
        with contextlib.suppress(KernelError), opened(link_pin(pin_dir, path)) as fd:
            ifindex = libbpf.link_info(fd).ifindex
            if ifindex:
                return ifindex
    return None


def attached_ifindex(pin_dir: pathlib.Path) -> int | None:
    """Return the index of the interface that an endpoint was put on, whatever its name is now.

    By its links, which end with the interface, else by what was noted when it was attached.
    """
    linked = linked_ifindex(pin_dir)
    if linked is not None or any(link_pin(pin_dir, path).exists() for path in Path):
        return linked
    return next((int(index) for index in marked(pin_dir, _MARK) if index.isdecimal()), None)


def mark_interface(pin_dir: pathlib.Path, ifindex: int) -> None:
    """Note on which interface programs without links are, by which it is found when renamed."""
    mark(pin_dir, _MARK, str(ifindex))


def _attached(ifindex: int, path: Path, pin_dir: pathlib.Path) -> Attachment:
    attachment = read_attachment(ifindex, path, pin_dir)
    if attachment is None:
        detach(ifindex, path, link_pin(pin_dir, path))
        raise VgwError(
            f"interface {interface_name(ifindex)}: the {path.name.lower()} program was attached "
            "and is gone again; find out which tool removes it, then attach again"
        )
    if not attachment.link:
        mark_interface(pin_dir, ifindex)
    return attachment


def _linked_program(pin: pathlib.Path, ifindex: int) -> int | None:
    info = read_link(pin)
    return info.prog_id if info is not None and info.ifindex == ifindex else None


def read_link(pin: pathlib.Path) -> libbpf.LinkInfo | None:
    """Return what the kernel says of a pinned link, None when there is none."""
    try:
        with opened(pin) as fd:
            return libbpf.link_info(fd)
    except KernelError:
        return None


def _attach_link(
    prog_fd: int, ifindex: int, attach_type: AttachType, flags: int, pin: pathlib.Path
) -> None:
    link = libbpf.link_create(prog_fd, ifindex, attach_type, flags)
    try:
        libbpf.pin(link, pin)
    except KernelError as error:
        raise VgwError(str(error)) from error  # which tells nothing of what the hook takes
    finally:
        os.close(link)  # a link that could not be pinned goes with its last descriptor


def _attach_xdp(
    prog_fd: int, ifindex: int, pin: pathlib.Path, *, force: bool, prefer_link: bool
) -> Attachment:
    foreign = libbpf.xdp_program(ifindex)
    if foreign is None:
        _place_xdp(prog_fd, ifindex, pin, prefer_link)
        return _attached(ifindex, Path.FROM_VM, pin.parent)
    if not force:
        raise ForeignProgramError(
            f"interface {interface_name(ifindex)} already has an XDP program that is not vgw's (id "
            f"{foreign[0]}, {foreign[1]}); remove it, or use --force to replace it"
        )
    foreign_fd = _open_foreign(ifindex, foreign[0])
    try:
        _evict_xdp(ifindex, foreign_fd, *foreign)
        try:
            _place_xdp(prog_fd, ifindex, pin, prefer_link)
        except VgwError:
            netlink.set_xdp(ifindex, foreign_fd, XDP_MODES[mode_name(foreign[1])])
            raise
    finally:
        os.close(foreign_fd)
    return _attached(ifindex, Path.FROM_VM, pin.parent)


def _place_xdp(prog_fd: int, ifindex: int, pin: pathlib.Path, prefer_link: bool) -> None:
    """Attach by the first of link native, link generic, netlink native, netlink generic."""
    refusal: KernelError | None = None
    for link in (True, False) if prefer_link else (False,):
        for flag in XDP_MODES.values():
            try:
                if link:
                    _attach_link(prog_fd, ifindex, AttachType.XDP, flag, pin)
                else:
                    netlink.set_xdp(ifindex, prog_fd, flag)
            except KernelError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                refusal = error
            else:
                return
    raise VgwError(
        f"interface {interface_name(ifindex)} takes no XDP program ({refusal}); use the tc hook"
    ) from refusal


def mode_name(text: str) -> ModeName:
    """Return the mode of XDP that libbpf.xdp_program() calls so."""
    return "native" if text == "native" else "generic"


def _open_foreign(ifindex: int, prog_id: int) -> int:
    """Open somebody else's program, which has to be put back when ours cannot take its place."""
    try:
        return libbpf.prog_fd_by_id(prog_id)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
        name = interface_name(ifindex)
        raise VgwError(
            f"replacing the XDP program {prog_id} of interface {name} needs CAP_SYS_ADMIN too: "
            f"remove it by `ip link set dev {name} xdp off`, then attach again"
        ) from error


def _evict_xdp(ifindex: int, prog_fd: int, prog_id: int, mode: str) -> None:
    """Remove the XDP program of somebody else, however it is attached."""
    link = libbpf.xdp_link(ifindex, prog_id)
    if link is None:
        netlink.clear_xdp(ifindex, prog_fd, XDP_MODES[mode_name(mode)])
        return
    try:
        libbpf.link_detach(link)
    finally:
        os.close(link)


def _attach_clsact(prog_fd: int, ifindex: int, path: Path, pin_dir: pathlib.Path) -> None:
    if not netlink.has_clsact(ifindex):
        # First, for what nobody knows to be ours would stay for ever.
        files.mkdir(pin_dir / _MADE_CLSACT, 0o700, exist_ok=True)
    try:
        netlink.add_clsact(ifindex)
        netlink.add_filter(ifindex, path, prog_fd, filter_name(path, libbpf.prog_info(prog_fd).id))
    except KernelError as error:
        remove_clsact_if_ours(ifindex, pin_dir)
        if error.errno not in (errno.EEXIST, errno.EINVAL):
            raise
        raise ForeignProgramError(
            f"interface {interface_name(ifindex)} has a tc filter of somebody else at priority "
            f"{netlink.FILTER_PRIORITY} that leaves no room for vgw's ({error}); remove it"
        ) from error


def remove_clsact_if_ours(ifindex: int, pin_dir: pathlib.Path) -> None:
    """Remove the clsact qdisc if vgw made it and nobody has a filter in it."""
    marker = pin_dir / _MADE_CLSACT
    if marker.exists() and netlink.remove_clsact(ifindex):
        files.rmdir(marker)


def hand_on_clsact(old_dir: pathlib.Path, new_dir: pathlib.Path) -> None:
    """Note that the clsact qdisc, if vgw made it, is there for another endpoint now."""
    if (old_dir / _MADE_CLSACT).exists():
        files.mkdir(new_dir / _MADE_CLSACT, 0o700, exist_ok=True)
        files.rmdir(old_dir / _MADE_CLSACT)


def program_of_filter(ifindex: int, path: Path) -> int | None:
    """Return the id of the program that is attached to a path as a clsact filter of ours."""
    name = netlink.filter_name(ifindex, path) or ""
    number = name.removeprefix(filter_name(path, ""))
    return int(number) if number != name and number.isdecimal() else None


def filter_name(path: Path, prog_id: int | str) -> str:
    """Return the name of the filter by which a program is attached to a path."""
    return f"vgw/{path.name.lower()}/{prog_id}"
