# SPDX-License-Identifier: Apache-2.0
"""The rules of each compiled policy by its digest: what their numbers mean, and what they match.

The names are written before an image can be in force, so that no number is without one. What the
rules match, which only `simulate` and `apply --dry-run` ask for, follows once it is: the image in
the kernel cannot be read back into rules. VMs with equal images share both files.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from vgw import files
from vgw.abi import Action
from vgw.controller.keyed_locks import KeyedLocks
from vgw.controller.pins import entries
from vgw.controller.state_file import is_whole, read_state, remove_state, write_state
from vgw.controller.typed import is_typed
from vgw.policy.model import Direction, EffectiveRule, Network, Service, Tier

_NAMES_SCHEMA: Final = "vgw/rule-names/v1"
_MATCHES_SCHEMA: Final = "vgw/rule-matches/v1"
_DAMAGED: Final = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError)

_Item = TypeVar("_Item")
_ServiceSets = tuple[tuple[Service, ...], ...]
_LAST_PORT: Final = 65535
_PortSets = tuple[tuple[tuple[int, int], ...], ...]


class RuleLabel(NamedTuple):
    """What a rule number stands for."""

    direction: str
    tier: str
    policy: str
    name: str
    action: str
    log: bool

    @property
    def key(self) -> str:
        """The rule's identity over policy changes, as EffectiveRule.key."""
        return f"{self.direction}/{self.tier}/{self.policy}/{self.name}"


def labels_of_rules(rules: Iterable[EffectiveRule]) -> list[RuleLabel]:
    """Return what the numbers of an image with these rules stand for."""
    actions = [action.name.lower() for action in Action]
    return [
        RuleLabel(
            str(rule.direction),
            str(rule.tier),
            rule.policy,
            rule.name,
            actions[rule.action],
            rule.log,
        )
        for rule in rules
    ]


class PolicyStore:
    """The rules of compiled policies, kept in a directory; for use from several threads."""

    def __init__(self, directory: Path) -> None:
        """Use a directory, which is made when something is kept."""
        self._directory = directory
        self._locks = KeyedLocks()
        self._whole: set[Path] = set()

    def keep_names(self, digest: str, rules: Sequence[EffectiveRule]) -> None:
        """Write what an image's rule numbers stand for, unless it is there. Raises VgwError."""
        self._keep(self._names(digest), _NAMES_SCHEMA, lambda: _names_body(rules))

    def keep_matches(self, digest: str, rules: Sequence[EffectiveRule]) -> None:
        """Write what the rules of an image match, unless it is there. Raises VgwError."""
        self._keep(self._matches(digest), _MATCHES_SCHEMA, lambda: _matches_body(rules))

    def labels(self, digest: str) -> list[RuleLabel] | None:
        """Return what the rule numbers of an image stand for; None when that is lost."""
        body = read_state(self._names(digest), _NAMES_SCHEMA)
        try:
            return None if body is None else _labels(body)
        except _DAMAGED:
            return None

    def rules(self, digest: str) -> tuple[EffectiveRule, ...] | None:
        """Return the rules of an image, by number; None when they are lost.

        Where a rule was written, and its comment, are not kept: only what it means.
        """
        labels = self.labels(digest)
        body = read_state(self._matches(digest), _MATCHES_SCHEMA)
        if labels is None or body is None:
            return None
        try:
            return tuple(_rules(labels, body))
        except _DAMAGED:
            return None

    def digests(self) -> set[str]:
        """Return the images of which anything is kept."""
        return {entry.name for entry in entries(self._directory)}

    def remove(self, digest: str) -> None:
        """Forget an image; the last one takes the directory with it."""
        for file in (self._names(digest), self._matches(digest)):
            remove_state(file)
            self._whole.discard(file)
        with contextlib.suppress(OSError):
            files.rmdir(self._directory)

    def _keep(self, file: Path, schema: str, body: Callable[[], dict[str, Any]]) -> None:
        with self._locks.of(str(file)):
            if file not in self._whole and not is_whole(file, schema):
                write_state(file, schema, body())
            self._whole.add(file)

    def _names(self, digest: str) -> Path:
        return self._directory / digest / "names.json"

    def _matches(self, digest: str) -> Path:
        return self._directory / digest / "matches.json"


class RuleNames:
    """What rule numbers stand for, by image: read once; for use from several threads."""

    def __init__(self, store: PolicyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._labels: dict[str, list[RuleLabel] | None] = {}
        self._keys: dict[str, frozenset[str]] = {}

    def labels(self, digest: str) -> list[RuleLabel] | None:
        """Return what the rule numbers of an image stand for; None when that is lost."""
        with self._lock:
            if digest not in self._labels:
                self._labels[digest] = self._store.labels(digest)
            return self._labels[digest]

    def keep_only(self, digests: Collection[str]) -> None:
        """Forget the images that are not among these."""
        with self._lock:
            for digest in self._labels.keys() - digests:
                del self._labels[digest]
                self._keys.pop(digest, None)

    def keys(self, digest: str) -> frozenset[str]:
        """Return the keys of the rules of an image."""
        labels = self.labels(digest)
        with self._lock:
            if digest not in self._keys:
                self._keys[digest] = frozenset(label.key for label in labels or ())
            return self._keys[digest]


def _names_body(rules: Sequence[EffectiveRule]) -> dict[str, Any]:
    policies, rows = _distinct([(r.direction, r.tier, r.policy) for r in rules], list)
    return {
        "policies": rows,
        "policy": policies,
        "name": [rule.name for rule in rules],
        "action": [int(rule.action) for rule in rules],
        "log": [int(rule.log) for rule in rules],
    }


def _labels(body: Mapping[str, Any]) -> list[RuleLabel]:
    actions = [action.name.lower() for action in Action]
    policies = body["policies"]
    if not set(map(type, chain(body["name"], *policies))) <= {str}:
        raise ValueError("names that are none")
    rows = zip(body["policy"], body["name"], body["action"], body["log"], strict=True)
    return [
        RuleLabel._make((*policies[policy], name, actions[action], log == 1))
        for policy, name, action, log in rows
    ]


def _matches_body(rules: Sequence[EffectiveRule]) -> dict[str, Any]:
    networks: dict[tuple[int, int, int], int] = {}

    def numbers(some: tuple[Network, ...]) -> list[int]:
        # These keys are hashed and compared in a third of the time that networks take.
        keys = ((int(each.network_address), each.prefixlen, each.version) for each in some)
        return [networks.setdefault(key, len(networks)) for key in keys]

    peers, peer_sets = _distinct([rule.peers for rule in rules], numbers)
    local, local_sets = _distinct([rule.local for rule in rules], numbers)
    services, service_sets = _distinct([rule.services for rule in rules], _service_rows)
    ports, port_sets = _distinct([rule.source_ports for rule in rules], list)
    return {
        "networks": [_network_text(*network) for network in networks],
        "peer_sets": peer_sets,
        "local_sets": local_sets,
        "service_sets": service_sets,
        "port_sets": port_sets,
        "peers": peers,
        "local": local,
        "services": services,
        "source_ports": ports,
    }


def _rules(labels: Sequence[RuleLabel], body: Mapping[str, Any]) -> Iterator[EffectiveRule]:
    networks = [_network(text) for text in body["networks"]]
    peer_sets, local_sets = (
        [tuple(networks[number] for number in row) for row in body[name]]
        for name in ("peer_sets", "local_sets")
    )
    service_sets = [tuple(_service(*row) for row in rows) for rows in body["service_sets"]]
    port_sets = [tuple((low, high) for low, high in row) for row in body["port_sets"]]
    if not is_typed((*service_sets,), _ServiceSets) or not is_typed((*port_sets,), _PortSets):
        raise ValueError("services or ports of other types")
    spans = [each.ports for each in chain(*service_sets) if each.ports]
    if not all(low <= high <= _LAST_PORT for low, high in chain(spans, *port_sets)):
        raise ValueError("ports that are none")
    numbers = ((s.protocol, s.icmp_type, s.icmp_code) for s in chain(*service_sets))
    bytes(number or 0 for number in chain(*numbers))  # a ValueError where one is none of a byte
    columns = (body[name] for name in ("peers", "local", "services", "source_ports"))
    for label, peers, local, services, ports in zip(labels, *columns, strict=True):
        yield EffectiveRule(
            Direction(label.direction),
            Tier(label.tier),
            label.policy,
            label.name,
            Action[label.action.upper()],
            peer_sets[peers],
            local_sets[local],
            service_sets[services],
            port_sets[ports],
            label.log,
        )


def _distinct(
    items: Sequence[_Item], encode: Callable[[_Item], list[Any]]
) -> tuple[list[int], list[list[Any]]]:
    """Return for each item the number of its value, and the encoded values by number."""
    by_value: dict[_Item, int] = {}
    # Rules share most of their sets, and comparing identities is so much quicker.
    by_identity: dict[int, int] = {}
    numbers: list[int] = []
    for item in items:
        number = by_identity.get(id(item))
        if number is None:
            number = by_identity[id(item)] = by_value.setdefault(item, len(by_value))
        numbers.append(number)
    return numbers, [encode(item) for item in by_value]


def _network_text(address: int, length: int, version: int) -> str:
    """Return what str() makes of a network, in a quarter of the time."""
    if version == 4:
        return f"{socket.inet_ntoa(address.to_bytes(4, 'big'))}/{length}"
    return f"{socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, 'big'))}/{length}"


def _network(text: str) -> Network:
    address, _, length = text.partition("/")
    if ":" in address:
        return IPv6Network((socket.inet_pton(socket.AF_INET6, address), int(length)))
    return IPv4Network((socket.inet_pton(socket.AF_INET, address), int(length)))


def _service_rows(services: tuple[Service, ...]) -> list[Any]:
    return [(s.protocol, s.ports, s.icmp_type, s.icmp_code) for s in services]


def _service(
    protocol: int | None,
    ports: list[int] | None,
    icmp_type: int | None,
    icmp_code: int | None,
) -> Service:
    return Service(protocol, None if ports is None else (ports[0], ports[1]), icmp_type, icmp_code)
