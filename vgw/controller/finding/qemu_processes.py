# SPDX-License-Identifier: Apache-2.0
"""VMs by the QEMU processes that hold a TAP of this network namespace open.

The kernel says which TAP a descriptor of /dev/net/tun is (`iff:` in its fdinfo); the command line
gives the name of the VM (-name) and which netdev of it has which MAC.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from vgw.controller.finding.found import FoundInterface, FoundVm, SourceError, clean_interface
from vgw.policy.model import Finder

_PROGRAM: Final = re.compile(r"(?:qemu-system-[a-z0-9_]+|qemu-kvm|kvm|qemu)")
_TUN: Final = "/dev/net/tun"
_IFF: Final = re.compile(r"^iff:\s*(\S+)", re.MULTILINE)
_LONGEST_COMMAND: Final = 1 << 20


class QemuProcesses:
    """The QEMU processes of a host; a source of VMs."""

    finder = Finder.QEMU

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Look at the processes under `proc`."""
        self._proc = proc

    def watch(self, changed: Callable[[], None]) -> None:
        """Do nothing: the kernel has no events of processes for everybody."""

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def scan(self) -> Sequence[FoundVm]:
        """Return the VMs whose processes run, by name. Raises SourceError."""
        try:
            here = (self._proc / "thread-self/ns/net").stat().st_ino
            pids = sorted(int(each.name) for each in self._proc.iterdir() if each.name.isdigit())
        except OSError as error:
            raise SourceError(f"processes cannot be listed: {error}") from error
        found: dict[str, FoundVm] = {}
        for pid in pids:
            vm = self._read(self._proc / str(pid), here)
            if vm is not None:
                found.setdefault(vm.name, vm)
        return [found[name] for name in sorted(found)]

    def _read(self, process: Path, here: int) -> FoundVm | None:
        """Return the VM of a process, None when it is none of QEMU's or has no TAP here."""
        try:
            arguments = _arguments(process)
            if not arguments or not _PROGRAM.fullmatch(Path(arguments[0]).name):
                return None
            name = vm_name(arguments)
            if name is None or (process / "ns/net").stat().st_ino != here:
                return None
            taps = dict(_taps(process))
        except OSError:
            return None  # it ended meanwhile
        macs = macs_of_taps(arguments, taps)
        names = dict.fromkeys(taps.values())
        interfaces = (clean_interface(tap, macs.get(tap)) for tap in names)
        own: tuple[FoundInterface, ...] = tuple(each for each in interfaces if each is not None)
        return FoundVm(name, str(self.finder), True, own) if own else None


def _arguments(process: Path) -> list[str]:
    with (process / "cmdline").open("rb") as file:
        data = file.read(_LONGEST_COMMAND)
    return [os.fsdecode(part) for part in data.split(b"\0")[:-1]]


def _taps(process: Path) -> Iterator[tuple[int, str]]:
    """Yield descriptor and name of each TAP that a process holds open."""
    for entry in (process / "fd").iterdir():
        try:
            if str(entry.readlink()) != _TUN:
                continue
            found = _IFF.search((process / "fdinfo" / entry.name).read_text(errors="replace"))
        except OSError:
            continue  # closed meanwhile
        if found:
            yield int(entry.name), found[1]


def vm_name(arguments: Sequence[str]) -> str | None:
    """Return the VM's name that a command line of QEMU gives: -name NAME, -name guest=NAME,..."""
    for text in _values(arguments, "name"):
        options = split_options(text, "guest")
        if options.get("guest"):
            return options["guest"]
    return None


def macs_of_taps(arguments: Sequence[str], taps: dict[int, str]) -> dict[str, str]:
    """Return TAP -> MAC as a command line of QEMU connects them: by -netdev and -device.

    `taps` are those that the process holds open, by descriptor.
    """
    of_netdev: dict[str, str] = {}
    for text in _values(arguments, "netdev"):
        options = split_options(text, "type")
        tap = options.get("ifname") or _tap_of_descriptors(options, taps)
        if options.get("type") == "tap" and tap is not None:
            of_netdev[options.get("id", "")] = tap
    macs: dict[str, str] = {}
    for text in _values(arguments, "device"):
        options = split_options(text, "driver")
        tap = of_netdev.get(options.get("netdev", ""))
        if tap is not None and "mac" in options:
            macs[tap] = options["mac"]
    return macs


def _tap_of_descriptors(options: dict[str, str], taps: dict[int, str]) -> str | None:
    for text in (options.get("fd") or options.get("fds", "")).split(":"):
        if text.isdigit() and int(text) in taps:
            return taps[int(text)]
    return None


def _values(arguments: Sequence[str], option: str) -> Iterator[str]:
    """Yield the values of an option, which QEMU takes with one dash or two."""
    for here, value in itertools.pairwise(arguments):
        if here in (f"-{option}", f"--{option}"):
            yield value


def split_options(text: str, first: str) -> dict[str, str]:
    """Return the options of a QEMU argument: KEY=VALUE,... or a JSON object.

    A first one without a key is that of `first`; a comma in a value is written twice.
    """
    if text.startswith("{"):
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return {key: str(value) for key, value in read.items()} if isinstance(read, dict) else {}
    options: dict[str, str] = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if not equals and number == 0:
            key, value = first, part
        options[key] = value.replace("\0", ",")
    return options
