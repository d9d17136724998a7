# SPDX-License-Identifier: Apache-2.0
"""What vgw remembers of one VM in the state directory: names, numbers and facts of its endpoints.

The kernel has the truth about what is enforced; this has what the kernel cannot say: which rule an
id stands for, what the interfaces are, and what the user ordered. It is written before a change
takes effect, so that no event can carry an id without a name.
"""

from __future__ import annotations

import ctypes
import dataclasses
import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vgw.abi import Mode, RuleCounter
from vgw.controller.state_file import read_state, write_state
from vgw.policy.model import AllowedPair, EffectiveRule, Guards, Hook, Interface

SCHEMA: Final = "vgw/manifest/v1"

#: Rules that are gone keep their names, for flows and events that still carry them; this many.
_RETIRED_RULES: Final = 1024


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """A rule that has an id; `current` says whether the policy in force still has it."""

    id: int
    direction: str
    tier: str
    policy: str
    name: str
    action: str
    log: bool
    current: bool = True


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """One endpoint: its identity in events, its facts, and what runs in it.

    `image` is the digest of the compiled policy of `Manifest.generation`, `hook_override` the hook
    that the user ordered, None when it is as the policy says.
    """

    endpoint: int
    interface: Interface
    image: str = ""
    hook_override: Hook | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything remembered of a VM. `mode` is what the policy says, `mode_override` the user.

    `extra` names interfaces that were attached by name, without the policy listing them; they are
    protected again when they come back. Without `endpoints` the rest is unknown: it was lost.
    `carried` holds final counts of rules from counters that are gone: id -> packets, bytes, last.
    """

    vm: str
    generation: int = 0
    mode: Mode = Mode.ENFORCE
    mode_override: Mode | None = None
    policy: str = ""
    named: bool = False
    endpoints: Mapping[str, EndpointEntry] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    rules: Mapping[str, RuleEntry] = field(default_factory=dict)
    next_rule_id: int = 0
    carried: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def effective_mode(self) -> Mode:
        """What the endpoints do: what the user ordered, else what the policy says."""
        return self.mode if self.mode_override is None else self.mode_override

    def only(self, names: Collection[str]) -> Manifest:
        """Return a manifest that has only the endpoints of some interfaces."""
        left = {name: entry for name, entry in self.endpoints.items() if name in names}
        return dataclasses.replace(self, endpoints=left)

    def rule_ids(self) -> dict[str, int]:
        """Return key -> id of every rule that has one."""
        return {key: entry.id for key, entry in self.rules.items()}

    def with_rules(self, rules: Iterable[EffectiveRule]) -> Manifest:
        """Return a manifest in which each of these rules has an id: its old one, or a new one."""
        entries: dict[str, RuleEntry] = {}
        next_id = self.next_rule_id
        for rule in rules:
            old = self.rules.get(rule.key)
            rule_id = next_id if old is None else old.id
            next_id = max(next_id, rule_id + 1)
            entries[rule.key] = RuleEntry(
                rule_id,
                str(rule.direction),
                str(rule.tier),
                rule.policy,
                rule.name,
                rule.action.name.lower(),
                rule.log,
            )
        retired = sorted(
            (
                (key, dataclasses.replace(entry, current=False))
                for key, entry in self.rules.items()
                if key not in entries
            ),
            key=lambda item: item[1].id,
        )
        kept = dict(retired[-_RETIRED_RULES:])
        return dataclasses.replace(self, rules=kept | entries, next_rule_id=next_id)

    def carrying(self, final: bytes) -> Manifest:
        """Return a manifest to which the counts of a map that goes are added.

        `final` is an array of abi.RuleCounter by rule id.
        """
        carried = dict(self.carried)
        for rule_id in range(len(final) // ctypes.sizeof(RuleCounter)):
            counter = RuleCounter.from_buffer_copy(final, rule_id * ctypes.sizeof(RuleCounter))
            if not counter.packets:
                continue
            packets, octets, last = carried.get(rule_id, (0, 0, 0))
            carried[rule_id] = (
                packets + counter.packets,
                octets + counter.bytes,
                max(last, counter.last_hit_ns),
            )
        return dataclasses.replace(self, carried=carried)


def load_manifest(path: Path) -> Manifest | None:
    """Return what is remembered in a file; None when there is none or it is damaged."""
    body = read_state(path, SCHEMA)
    try:
        return None if body is None else _from_json(body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


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
        "policy": manifest.policy,
        "named": manifest.named,
        "endpoints": {
            name: {
                "endpoint": entry.endpoint,
                "interface": _interface_to_json(entry.interface),
                "image": entry.image,
                "hook_override": None if entry.hook_override is None else str(entry.hook_override),
            }
            for name, entry in manifest.endpoints.items()
        },
        "extra": list(manifest.extra),
        "rules": {key: dataclasses.asdict(entry) for key, entry in manifest.rules.items()},
        "next_rule_id": manifest.next_rule_id,
        "carried": {str(rule_id): list(counts) for rule_id, counts in manifest.carried.items()},
    }


def _from_json(body: Mapping[str, Any]) -> Manifest:
    override = body["mode_override"]
    return Manifest(
        vm=body["vm"],
        generation=body["generation"],
        mode=Mode[body["mode"]],
        mode_override=None if override is None else Mode[override],
        policy=body["policy"],
        named=body["named"],
        endpoints={
            name: EndpointEntry(
                entry["endpoint"],
                _interface_from_json(entry["interface"]),
                entry["image"],
                None if entry["hook_override"] is None else Hook(entry["hook_override"]),
            )
            for name, entry in body["endpoints"].items()
        },
        extra=tuple(body["extra"]),
        rules={key: RuleEntry(**entry) for key, entry in body["rules"].items()},
        next_rule_id=body["next_rule_id"],
        carried={int(key): (row[0], row[1], row[2]) for key, row in body["carried"].items()},
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
    }


def _interface_from_json(body: Mapping[str, Any]) -> Interface:
    return Interface(
        name=body["name"],
        mac=body["mac"],
        addresses=tuple(ipaddress.ip_address(text) for text in body["addresses"]),
        allowed_pairs=tuple(
            AllowedPair(ipaddress.ip_network(network), mac)
            for network, mac in body["allowed_pairs"]
        ),
        vlans=tuple(body["vlans"]),
        guards=Guards(**body["guards"]),
        conntrack_max=body["conntrack_max"],
        hook=Hook(body["hook"]),
    )
