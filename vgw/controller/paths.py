# SPDX-License-Identifier: Apache-2.0
"""Where everything of vgw lives on the host, and how names become names of files.

Each place can be moved by a variable or an option, which is how tests isolate themselves.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from vgw.abi import ABI_VERSION
from vgw.errors import VgwError

#: Field of Paths -> (variable that moves it, place where it is otherwise).
_PLACES: Final[dict[str, tuple[str, str]]] = {
    "policy": ("VGW_POLICY", "/etc/vgw/policy.d"),
    "inventory": ("VGW_INVENTORY", "/etc/vgw/inventory.yaml"),
    "run_dir": ("VGW_RUN_DIR", "/run/vgw"),
    "state_dir": ("VGW_STATE_DIR", "/var/lib/vgw"),
    "bpffs": ("VGW_BPFFS", "/sys/fs/bpf/vgw"),
    "cache_dir": ("VGW_CACHE_DIR", "/var/cache/vgw"),
    "log_file": ("VGW_LOG", "/var/log/vgw/events.jsonl"),
}

#: Names beside those of VMs in the directory of the pins: the perf buffer that all share, and the
#: directory of the images that VMs share.
EVENTS_PIN: Final = "events"
IMAGES_PIN: Final = "images"

#: File systems allow 255 bytes; what is left is for the suffixes of temporary files.
_LONGEST_NAME: Final = 200

_NOT_UTF_8: Final = re.compile("[\ud800-\udfff]")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]")
_PINNED: Final = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9a-f]{2})+")


@functools.lru_cache(maxsize=8192)
def pin_name(name: str) -> str:
    """Return the name of a VM or interface as one component of a path.

    bpffs refuses dots, and `/` must not leave the directory, so every byte but letters, digits,
    `_` and `-` becomes `%` and two hex digits. Raises VgwError when there is no such file name.
    """
    # What has no UTF-8, half of a surrogate pair, makes nothing.
    pinned = "".join(
        char if _PLAIN.match(char) else "".join(f"%{byte:02x}" for byte in char.encode())
        for char in ("" if _NOT_UTF_8.search(name) else name)
    )
    if name in {EVENTS_PIN, IMAGES_PIN}:
        pinned = f"%{ord(name[0]):02x}{name[1:]}"
    if not pinned or len(pinned) > _LONGEST_NAME:
        shown = f"{name[:32]}..." if len(name) > 32 else name
        raise VgwError(
            f"{shown!r} is no name for a VM or interface: use 1 to 63 letters, digits, '.', '_' "
            "or '-'"
        )
    return pinned


@functools.lru_cache(maxsize=8192)
def unpin_name(pinned: str) -> str | None:
    """Return the name that `pin_name` made this of, or None when it made nothing like it."""
    if not _PINNED.fullmatch(pinned):
        return None
    raw = re.sub(
        rb"%([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), pinned.encode()
    )
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return None
    return name if len(pinned) <= _LONGEST_NAME and pin_name(name) == pinned else None


@dataclass(frozen=True, slots=True)
class Paths:
    """The places that one vgw on one host uses."""

    policy: Path
    run_dir: Path
    state_dir: Path
    bpffs: Path
    cache_dir: Path
    log_file: Path
    inventory: Path = Path(_PLACES["inventory"][1])

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **overrides: Path) -> Paths:
        """Return the places that `environ` (default: the process's) and `overrides` ask for."""
        environ = os.environ if environ is None else environ
        places = {
            field.name: Path(environ.get(_PLACES[field.name][0]) or _PLACES[field.name][1])
            for field in fields(cls)
        }
        return cls(**{name: path.absolute() for name, path in (places | overrides).items()})

    @property
    def socket(self) -> Path:
        """The controller's unix socket."""
        return self.run_dir / "vgw.sock"

    @property
    def pins(self) -> Path:
        """The directory of all pins of this ABI version."""
        return self.bpffs / f"v{ABI_VERSION}"

    @property
    def events(self) -> Path:
        """The pin of the perf buffer that all endpoints share."""
        return self.pins / EVENTS_PIN

    @property
    def images(self) -> Path:
        """The directory of the pins of compiled policies, by digest."""
        return self.pins / IMAGES_PIN

    @property
    def policies(self) -> Path:
        """The directory of what the rule numbers of compiled policies mean, by digest."""
        return self.state_dir / "policies"

    @property
    def manifests(self) -> Path:
        """The directory of what vgw remembers of each VM."""
        return self.state_dir / "vms"

    def vm_dir(self, vm: str) -> Path:
        """Return the directory of a VM's pins."""
        return self.pins / pin_name(vm)

    def endpoint_dir(self, vm: str, interface: str) -> Path:
        """Return the directory of one endpoint's pins."""
        return self.pins.joinpath(pin_name(vm), pin_name(interface))

    def manifest(self, vm: str) -> Path:
        """Return the file of what vgw remembers of a VM."""
        return self.manifests / f"{pin_name(vm)}.json"

    @property
    def leases(self) -> Path:
        """The directory of the addresses that VMs were leased."""
        return self.state_dir / "leases"

    def lease_file(self, vm: str) -> Path:
        """Return the file of the addresses that a VM was leased."""
        return self.leases / f"{pin_name(vm)}.json"

    def counts(self, vm: str) -> Path:
        """Return the file of what a VM's rules had counted before its policy last changed."""
        return self.state_dir / "counts" / f"{pin_name(vm)}.json"

    def flow_import(self, vm: str) -> Path:
        """Return the file of which export of another host a VM's flows are, and up to where."""
        return self.state_dir / "imports" / f"{pin_name(vm)}.json"
