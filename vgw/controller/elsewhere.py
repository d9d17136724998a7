# SPDX-License-Identifier: Apache-2.0
"""Endpoints whose tables are of another ABI: which there are, and how they are removed.

They have a directory for each ABI version beside this version's. What this version does not
know the layout of it does not touch: it goes on filtering.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw import abi, files
from vgw.controller import links
from vgw.controller.builds import build_of
from vgw.controller.layouts import Layout, LayoutError, layout_file, load_layout
from vgw.controller.paths import EVENTS_PIN, IMAGES_PIN, Paths, pin_name, unpin_name
from vgw.controller.pins import endpoint_dirs, entries, remove_tree
from vgw.controller.replacement import destroy
from vgw.controller.state_file import remove_state

_PINS: Final = re.compile(r"v(\d{1,9})")
#: Ends the mark of the build as long as an endpoint has not all that it is to take over.
UNFINISHED: Final = "-unfinished"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An endpoint of another ABI version."""

    vm: str
    interface: str
    abi: int
    directory: Path

    @property
    def is_unfinished(self) -> bool:
        """Whether it was about to take over from another endpoint and has not."""
        return is_unfinished(self.directory)

    def layout(self, paths: Paths) -> Layout:
        """Return what its tables are like; raises LayoutError that says what to do."""
        try:
            return load_layout(paths.state_dir, self.abi)
        except LayoutError as error:
            raise LayoutError(
                f"{self.interface} goes on filtering with the tables of ABI {self.abi}, but "
                f"{error}; run `vgw detach --vm {self.vm}` of the version that attached it, then "
                "attach it with this one"
            ) from error


def is_unfinished(directory: Path) -> bool:
    """Tell whether an endpoint was about to take over from another one and has not."""
    return (build_of(directory) or "").endswith(UNFINISHED)


def endpoints_elsewhere(paths: Paths, vm: str | None = None) -> list[Elsewhere]:
    """Return the endpoints of other ABI versions, of one VM or of all."""
    found: list[Elsewhere] = []
    for version, pins in _other_pins(paths):
        for vm_dir in entries(pins) if vm is None else [pins / pin_name(vm)]:
            name = unpin_name(vm_dir.name)
            if name is None or not vm_dir.is_dir():
                continue
            for directory in endpoint_dirs(vm_dir):
                interface = unpin_name(directory.name)
                if interface is not None:
                    found.append(Elsewhere(name, interface, version, directory))
    return sorted(found, key=lambda each: (each.vm, each.interface, each.abi))


def remove_elsewhere(
    paths: Paths, each: Elsewhere, ifindex: int | None, *, force: bool = False
) -> None:
    """Detach and remove an endpoint of another version; `ifindex` None: the interface is gone.

    Raises LayoutError when it is not known how that version attaches, but not with `force`.
    """
    if not force:
        each.layout(paths)
    destroy(each.directory, ifindex)
    tidy_elsewhere(paths)


def is_gone(each: Elsewhere) -> bool:
    """Tell whether the interface of an endpoint that has links is no more."""
    pins = [links.link_pin(each.directory, path) for path in abi.Path]
    return any(pin.exists() for pin in pins) and links.linked_ifindex(each.directory) is None


def tidy_elsewhere(paths: Paths) -> None:
    """Remove what other versions without endpoints left in bpffs, and their layouts."""
    used = {each.abi for each in endpoints_elsewhere(paths)}
    for version, pins in _other_pins(paths):
        if version in used:
            continue
        remove_tree(pins / IMAGES_PIN)
        with contextlib.suppress(OSError):
            files.unlink(pins / EVENTS_PIN)
            files.rmdir(pins)
    kept = {layout_file(paths.state_dir, version) for version, _ in _other_pins(paths)}
    kept.add(layout_file(paths.state_dir, abi.ABI_VERSION))
    for file in set(entries(layout_file(paths.state_dir, 0).parent)) - kept:
        if file.suffix == ".json":
            remove_state(file)


def _other_pins(paths: Paths) -> list[tuple[int, Path]]:
    """Return version and directory of the pins of other ABI versions."""
    found = []
    for entry in entries(paths.bpffs):
        match = _PINS.fullmatch(entry.name)
        if match and entry.is_dir() and int(match[1]) != abi.ABI_VERSION:
            found.append((int(match[1]), entry))
    return sorted(found)
