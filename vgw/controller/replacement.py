# SPDX-License-Identifier: Apache-2.0
"""An endpoint that takes the place of another without a gap: beside it, on the hooks, in its place.

The maps and programs of the new one are pinned in a directory beside the old one's. Each program
takes over the attachment of the old one, or is attached before that goes; then its pins take the
place of the old ones, those of programs last. At every moment in between a process may die: what
it leaves filters, and settle() ends what it began.
"""

from __future__ import annotations

import contextlib
import os
import pathlib

from vgw import abi, files, libbpf
from vgw.controller import links, pinned
from vgw.controller import links_replace as replacing
from vgw.controller.paths import unpin_name
from vgw.controller.pins import (
    ASIDE,
    MOVING,
    beside,
    entries,
    names,
    quietly,
    remove_endpoint,
    remove_tree,
)
from vgw.policy.model import Hook

#: A map that only a whole endpoint has; a program for another hook comes without it.
_OF_WHOLE = "active"


class Placing:
    """An endpoint on its way into its directory; then finish() or undo(), exactly one of them."""

    def __init__(
        self,
        directory: pathlib.Path,
        ifindex: int,
        former: pathlib.Path | None = None,
        *,
        takes_from: pathlib.Path | None = None,
    ) -> None:
        """Prepare for an endpoint of an interface.

        What is in `directory` is replaced; `former` is that of an endpoint on the same interface
        from when that had another name, which is replaced if `directory` has none. Of the endpoint
        in `takes_from`, which is another version's, only the places on the hooks are taken; what
        is left of it the caller removes. Raises OSError.
        """
        self._takes_from = takes_from
        self.directory = directory
        self._ifindex = ifindex
        self._held = contextlib.ExitStack()
        self._undo = contextlib.ExitStack()
        if former is not None and not directory.exists():
            files.rename(former, directory)
            self._undo.callback(quietly, files.rename, directory, former)
        self._replaces = directory.exists()
        self.place = beside(directory) if self._replaces else directory

    def make_room(self) -> None:
        """Make the directory `place`, where maps and programs are to be pinned."""
        remove = remove_tree if self._replaces else remove_endpoint
        self._undo.callback(quietly, remove, self.place)
        files.mkdir(self.place, 0o700)

    def attach(
        self, prog_fd: int, path: abi.Path, hook: Hook, *, force: bool, prefer_link: bool = True
    ) -> None:
        """Attach a program that is pinned; errors are those of links.attach().

        The old one goes with this, or runs on beside it until finish().
        """
        if self._takes_from is not None and self._inherit(prog_fd, path, hook, self._takes_from):
            return
        if self._replaces:
            old = replacing.take_over(prog_fd, self._ifindex, path, hook, self.directory)
            if old is not None:
                self._held.callback(os.close, old)
                self._undo.callback(quietly, self._put_back, old, path, hook)
                return
        pin = links.link_pin(self.place, path)
        self._undo.callback(quietly, links.detach, self._ifindex, path, pin)
        links.attach(prog_fd, self._ifindex, path, hook, pin, force=force, prefer_link=prefer_link)

    def finish(self) -> None:
        """Put the pins into their place; what they replace is gone then. Raises OSError."""
        with self._held:
            self._undo.pop_all()
            if self._replaces:
                _move_into_place(self.place, self.directory, self._ifindex)

    def undo(self) -> None:
        """Leave what was there before, running as it did."""
        with self._held:
            self._undo.close()

    def _inherit(self, prog_fd: int, path: abi.Path, hook: Hook, takes_from: pathlib.Path) -> bool:
        """Take the place that a program of another version has; return whether it had one."""
        old = replacing.take_over(prog_fd, self._ifindex, path, hook, takes_from)
        if old is None:
            return False
        self._held.callback(os.close, old)

        def give_back() -> None:
            replacing.inherit(self._ifindex, path, self.place, takes_from)
            replaced = replacing.take_over(old, self._ifindex, path, hook, takes_from)
            if replaced is not None:
                os.close(replaced)

        self._undo.callback(quietly, give_back)
        replacing.inherit(self._ifindex, path, takes_from, self.place)
        return True

    def _put_back(self, prog_fd: int, path: abi.Path, hook: Hook) -> None:
        replaced = replacing.take_over(prog_fd, self._ifindex, path, hook, self.directory)
        if replaced is not None:
            os.close(replaced)


def settle(vm_dir: pathlib.Path) -> None:
    """End what a process began that died while a VM's endpoint was replaced or renamed.

    Raises OSError.

    If a program of the new one runs already, the new one it is, and the others take over too; where
    the kernel refuses that, the path keeps the old one until the endpoint is repaired.
    """
    for name in names(vm_dir):
        if not name.startswith(ASIDE):
            continue
        place = vm_dir / name
        if name.startswith(MOVING):
            directory = place.with_name(place.name.removeprefix(MOVING))
            if not directory.exists():
                files.rename(place, directory)
        else:
            directory = place.with_name(place.name.removeprefix(ASIDE))
            ifindex = pinned.present_ifindex(unpin_name(directory.name) or "")
            running = [path for path in abi.Path if _runs(place, directory, path, ifindex)]
            if running:
                files.mkdir(directory, 0o700, exist_ok=True)
                for path in set(abi.Path).difference(running):
                    quietly(_carry_on, place, directory, path, ifindex)
                _move_into_place(place, directory, ifindex)
            else:
                remove_tree(place)


def destroy(directory: pathlib.Path, ifindex: int | None) -> None:
    """Detach and remove an endpoint, whole or broken; `ifindex` None: the interface is gone.

    The directory of its VM goes with its last endpoint.
    """
    places = beside(directory), directory
    for place in places:
        for path in abi.Path:
            links.detach(ifindex, path, links.link_pin(place, path))
    if ifindex is not None:
        for place in places:
            links.remove_clsact_if_ours(ifindex, place)
    remove_tree(beside(directory))
    remove_endpoint(directory)


def _carry_on(
    place: pathlib.Path, directory: pathlib.Path, path: abi.Path, ifindex: int | None
) -> None:
    """Let the program pinned in `place`, if there is one, run in the place of the old one."""
    pin = links.program_pin(place, path)
    if ifindex is None or not pin.exists():
        return
    with links.opened(pin) as program:
        is_xdp = libbpf.prog_info(program).prog_type == libbpf.ProgType.XDP
        hook = Hook.XDP if is_xdp else Hook.TC
        old = replacing.take_over(program, ifindex, path, hook, directory)
    if old is not None:
        os.close(old)


def _runs(
    place: pathlib.Path, directory: pathlib.Path, path: abi.Path, ifindex: int | None
) -> bool:
    """Tell whether the program that is pinned in `place` is attached."""
    program = links.pinned_program(links.program_pin(place, path))
    if program is None:
        return False
    if any(
        replacing.running(links.link_pin(each, path)) == program.id for each in (place, directory)
    ):
        return True
    return ifindex is not None and links.read_attachment(ifindex, path, place) is not None


def _move_into_place(place: pathlib.Path, directory: pathlib.Path, ifindex: int | None) -> None:
    """Let an endpoint whose programs are attached have the directory of the one before.

    Interrupted anywhere, it can be done again, for the pins of programs are moved last.
    """
    programs = {links.program_pin(place, path): path for path in abi.Path}
    for pin, path in programs.items():
        if _runs(place, directory, path, ifindex):
            replacing.retire(ifindex, path, directory, place)
        else:
            files.unlink(pin)  # what is in its place runs on
    if (place / _OF_WHOLE).exists():
        _remove_strays(place, directory)
    for entry in sorted(entries(place), key=lambda entry: entry in programs):
        files.rename(entry, directory / entry.name)
    files.rmdir(place)


def _remove_strays(place: pathlib.Path, directory: pathlib.Path) -> None:
    """Remove maps that the endpoint before had and the new one has not."""
    keep = {entry.name for entry in entries(place)}
    for path in abi.Path:
        keep |= {links.link_pin(place, path).name, links.program_pin(place, path).name}
    for entry in entries(directory):
        if entry.is_file() and entry.name not in keep:
            files.unlink(entry)
