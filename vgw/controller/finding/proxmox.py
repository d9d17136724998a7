# SPDX-License-Identifier: Apache-2.0
"""VMs and containers of Proxmox VE: by its configuration, and by the names of their interfaces.

The host's side of interface N is tap<VMID>i<N> of a VM and veth<CTID>i<N> of a container. Anybody
can make interfaces of such names, so only those of a VM that has a configuration here count.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from vgw.controller.finding.found import FoundInterface, FoundVm, SourceError, clean_interface
from vgw.policy.model import Finder

CONFIG: Final = Path("/etc/pve")
_INTERFACE: Final = re.compile(r"(tap|veth)([1-9][0-9]{1,8})i([0-9]{1,2})")
_FILE: Final = re.compile(r"([1-9][0-9]{1,8})\.conf")
_LINE: Final = re.compile(r"^([a-z0-9]+):\s*(.*?)\s*$")
_MAC: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_LONGEST_CONFIG: Final = 1 << 20


class _Kind(NamedTuple):
    """A kind of guest: where its configuration is, its interfaces' prefix, the key of its name."""

    directory: str
    prefix: str
    name: str


_KINDS: Final = (_Kind("qemu-server", "tap", "name"), _Kind("lxc", "veth", "hostname"))


class Proxmox:
    """The guests that this Proxmox node has; a source of VMs."""

    finder = Finder.PROXMOX

    def __init__(self, config: Path = CONFIG) -> None:
        """Read the configuration under `config`."""
        self._config = config

    def watch(self, changed: Callable[[], None]) -> None:
        """Do nothing: that interfaces come and go is known anyway."""

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def scan(self) -> Sequence[FoundVm]:
        """Return the guests of this node by number. Raises SourceError."""
        there = _interfaces()
        guests = [guest for kind in _KINDS for guest in self._guests(kind, there)]
        names = Counter(name for _, name, _ in guests)
        return [
            # Proxmox lets several guests have the same name; then none of them goes by it.
            FoundVm(
                name if names[name] == 1 else f"vm{number}",
                str(self.finder),
                bool(interfaces),
                interfaces,
            )
            for number, name, interfaces in sorted(guests)
        ]

    def _guests(
        self, kind: _Kind, there: dict[tuple[str, str], list[tuple[int, str]]]
    ) -> Iterator[tuple[int, str, tuple[FoundInterface, ...]]]:
        """Yield number, name and interfaces of each guest of a kind."""
        directory = self._config / kind.directory
        try:
            files = [(file, _FILE.fullmatch(file.name)) for file in directory.iterdir()]
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self._config.is_dir():
                return  # a node without guests of this kind
            raise SourceError(f"Proxmox cannot be asked: {directory}: {error.strerror}") from error
        for file, number in files:
            if number is not None:
                settings = _settings(file)
                found = (
                    clean_interface(name, _mac(settings.get(f"net{index}", "")))
                    for index, name in sorted(there.get((kind.prefix, number[1]), ()))
                )
                own = tuple(each for each in found if each is not None)
                yield int(number[1]), settings.get(kind.name) or f"vm{number[1]}", own


def _interfaces() -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Return the interfaces with a name of Proxmox's: (prefix, guest) -> (number, name)."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for _, name in socket.if_nameindex():
        match = _INTERFACE.fullmatch(name)
        if match is not None:
            found.setdefault((match[1], match[2]), []).append((int(match[3]), name))
    return found


def _settings(file: Path) -> dict[str, str]:
    """Return the settings in force; what stands below the first [section] is of snapshots.

    A file that cannot be read has none: its guest is known by its number alone.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_LONGEST_CONFIG).decode(errors="replace")
    except OSError:
        return {}
    settings: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):
            break
        match = _LINE.match(line)
        if match is not None:
            settings.setdefault(match[1], match[2])
    return settings


def _mac(net: str) -> str | None:
    """Return the MAC of a netN setting: virtio=MAC,... of a VM, hwaddr=MAC of a container."""
    for part in net.split(","):
        _, _, value = part.partition("=")
        if _MAC.fullmatch(value):
            return value
    return None
