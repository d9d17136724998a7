# SPDX-License-Identifier: Apache-2.0
"""What vgw remembers of one VM in the state directory: policies and facts of its endpoints.

The kernel has the truth about what is enforced; this has what the kernel cannot say: which policy a
generation was, what the interfaces are, and what the user ordered. It is written before a change
takes effect, so that no event can carry a generation that is not known.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from vgw import abi
from vgw.abi import Action, Mode
from vgw.controller.clock import SECOND_NS
from vgw.controller.paths import pin_name
from vgw.controller.state_file import read_state, write_state
from vgw.controller.typed import is_typed
from vgw.errors import VgwError
from vgw.policy import values
from vgw.policy.model import AllowedPair, Defaults, Guards, Hook, Interface, Tracking

SCHEMA: Final = "vgw/manifest/v2"

#: Files that are known at most; a policy may have so many VMs.
_MOST_KNOWN: Final = 20_000

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """The policy of one generation.

    `images` are the digests of its images, `rules` how many rules each has; `staged`: programs need
    their stages for it. `defaults` None: they are lost.
    """

    images: Mapping[abi.Path, str]
    rules: Mapping[abi.Path, int]
    staged: bool = False
    defaults: Defaults | None = None


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """One endpoint: its identity in events, and its facts.

    `hook_override` is the hook that the user ordered, None when it is as the policy says.
    """

    endpoint: int
    interface: Interface
    hook_override: Hook | None = None


@dataclass(frozen=True, slots=True)
class ModeNote:
    """Why a mode was ordered, since when (RFC 3339, by the wall clock), and by whom."""

    reason: str
    since: str
    by: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything remembered of a VM. `mode` is what the policy says, `mode_override` the user.

    `mode_note` is about the latter; None: there is none, or it is lost.

    `extra` names interfaces that were attached by name, without the policy listing them; they are
    protected again when they come back. Without `endpoints` the rest is unknown: it was lost.
    `policies` are those of `generation` and of the generations that it replaced, for flows and
    events that still carry their rule numbers.
    """

    vm: str
    generation: int = 0
    mode: Mode = Mode.ENFORCE
    mode_override: Mode | None = None
    policy: str = ""
    named: bool = False
    endpoints: Mapping[str, EndpointEntry] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    policies: Mapping[int, PolicyEntry] = field(default_factory=dict)
    mode_note: ModeNote | None = None

    @property
    def effective_mode(self) -> Mode:
        """What the endpoints do: what the user ordered, else what the policy says."""
        return self.mode if self.mode_override is None else self.mode_override

    @property
    def is_staged(self) -> bool:
        """Whether programs need their stages: until a switch they judge by the policy before."""
        return any(entry.staged for entry in self.policies.values())

    def only(self, names: Collection[str]) -> Manifest:
        """Return a manifest that has only the endpoints of some interfaces."""
        left = {name: entry for name, entry in self.endpoints.items() if name in names}
        return dataclasses.replace(self, endpoints=left)

    def current(self) -> PolicyEntry | None:
        """Return the policy of the generation that the VM runs, None when that is lost."""
        return self.policies.get(self.generation)

    def digest(self, generation: int, path: abi.Path) -> str | None:
        """Return the image that packets of a path were judged by in a generation, if known."""
        entry = self.policies.get(generation)
        return None if entry is None else entry.images.get(path)

    def in_generation(
        self, read: Callable[[str], _Value | None]
    ) -> Callable[[int, abi.Path], _Value | None]:
        """Return `read`, which takes a digest, as a function of the image's generation and path."""

        def found(generation: int, path: abi.Path) -> _Value | None:
            digest = self.digest(generation, path)
            return None if digest is None else read(digest)

        return found

    def digests(self) -> set[str]:
        """Return all images that the policies refer to."""
        return {digest for entry in self.policies.values() for digest in entry.images.values()}


#: File -> what tells its versions apart, and what is in this one.
_known: dict[str, tuple[tuple[int, ...], Manifest]] = {}


def load_manifest(path: Path) -> Manifest | None:
    """Return what is remembered in a file; None when there is none, or it is damaged.

    A file that was made for another VM counts as damaged. One that was read before and is the same
    still is not read again: a change asks for that of each VM several times.
    """
    place = os.fspath(path)
    try:
        status = os.stat(place)  # noqa: PTH116 - a Path takes twice as long
    except (OSError, ValueError):
        _known.pop(place, None)
        return None
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed_ns)
    known = _known.get(place)
    if known is not None and known[0] == version:
        return known[1]
    now_ns = time.time_ns()
    manifest = _read(path)
    # One that changed at this moment may change once more in the same tick of the file's clock.
    if manifest is not None and changed_ns < now_ns - SECOND_NS:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[place] = version, manifest
    return manifest


def _read(path: Path) -> Manifest | None:
    body = read_state(path, SCHEMA)
    try:
        manifest = None if body is None else _from_json(body)
        is_own = manifest is not None and pin_name(manifest.vm) == path.stem
    except (VgwError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return manifest if is_own and is_typed(manifest, Manifest) else None


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest so that a crash leaves the old or the new one. Raises VgwError."""
    write_state(path, SCHEMA, _to_json(manifest))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    override = manifest.mode_override
    return {
        "vm": manifest.vm,
        "generation": manifest.generation,
        "mode": manifest.mode.name,
        "mode_override": None if override is None else override.name,
        "mode_note": None if manifest.mode_note is None else dataclasses.asdict(manifest.mode_note),
        "policy": manifest.policy,
        "named": manifest.named,
        "endpoints": {
            name: {
                "endpoint": entry.endpoint,
                "interface": _interface_to_json(entry.interface),
                "hook_override": None if entry.hook_override is None else str(entry.hook_override),
            }
            for name, entry in manifest.endpoints.items()
        },
        "extra": list(manifest.extra),
        "policies": {
            str(generation): _policy_to_json(entry)
            for generation, entry in manifest.policies.items()
        },
    }


def _from_json(body: Mapping[str, Any]) -> Manifest:
    override = body["mode_override"]
    note = body.get("mode_note")  # which earlier versions did not write
    return Manifest(
        vm=body["vm"],
        generation=body["generation"],
        mode=Mode[body["mode"]],
        mode_override=None if override is None else Mode[override],
        mode_note=None if note is None else ModeNote(**note),
        policy=body["policy"],
        named=body["named"],
        endpoints={
            name: EndpointEntry(
                entry["endpoint"],
                _interface_from_json(entry["interface"]),
                None if entry["hook_override"] is None else Hook(entry["hook_override"]),
            )
            for name, entry in body["endpoints"].items()
        },
        extra=tuple(body["extra"]),
        policies={
            int(generation): _policy_from_json(entry)
            for generation, entry in body["policies"].items()
        },
    )


def _policy_to_json(entry: PolicyEntry) -> dict[str, Any]:
    defaults = entry.defaults
    return {
        "images": {path.name: digest for path, digest in entry.images.items()},
        "rules": {path.name: count for path, count in entry.rules.items()},
        "staged": entry.staged,
        "defaults": None
        if defaults is None
        else [defaults.ingress.name, defaults.egress.name, defaults.log],
    }


def _policy_from_json(body: Mapping[str, Any]) -> PolicyEntry:
    defaults = body["defaults"]
    return PolicyEntry(
        images={abi.Path[name]: digest for name, digest in body["images"].items()},
        rules={abi.Path[name]: count for name, count in body["rules"].items()},
        staged=body["staged"],
        defaults=None
        if defaults is None
        else Defaults(Action[defaults[0]], Action[defaults[1]], defaults[2]),
    )


def _interface_to_json(interface: Interface) -> dict[str, Any]:
    return {
        "name": interface.name,
        "mac": interface.mac,
        "addresses": [str(address) for address in interface.addresses],
        "allowed_pairs": [[str(pair.network), pair.mac] for pair in interface.allowed_pairs],
        "vlans": list(interface.vlans),
        "guards": dataclasses.asdict(interface.guards),
        "conntrack_max": interface.conntrack_max,
        "hook": str(interface.hook),
        "tracking": _tracking_to_json(interface.tracking),
        "learns": interface.learns,
    }


def _interface_from_json(body: Mapping[str, Any]) -> Interface:
    return Interface(
        name=body["name"],
        mac=None if body["mac"] is None else values.mac(body["mac"]),
        addresses=tuple(ipaddress.ip_address(text) for text in body["addresses"]),
        allowed_pairs=tuple(
            AllowedPair(ipaddress.ip_network(network), mac)
            for network, mac in body["allowed_pairs"]
        ),
        vlans=tuple(body["vlans"]),
        guards=Guards(**body["guards"]),
        conntrack_max=body["conntrack_max"],
        hook=Hook(body["hook"]),
        tracking=_tracking_from_json(body["tracking"]),
        learns=body.get("learns", False),
    )


def _tracking_to_json(tracking: Tracking) -> dict[str, Any]:
    timeouts = {state.name: timeout for state, timeout in tracking.timeouts_ns}
    return {**dataclasses.asdict(tracking), "timeouts_ns": timeouts}


def _tracking_from_json(body: Mapping[str, Any]) -> Tracking:
    timeouts = tuple((abi.FlowState[name], each) for name, each in body["timeouts_ns"].items())
    return Tracking(**{**body, "timeouts_ns": timeouts})
