# SPDX-License-Identifier: Apache-2.0
"""What groups stand for: sets of networks, kept over changes of the document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TypeVar

from vgw.policy.model import Address, Group, Network, PolicyDocument, Vm
from vgw.policy.quotas import Members

_N = TypeVar("_N", IPv4Network, IPv6Network)


def labels_match(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether labels have every wanted key with its value; wanting none matches none."""
    return bool(wanted) and all(labels.get(key) == value for key, value in wanted.items())


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Return networks without overlaps, adjacent ones merged, IPv4 before IPv6, sorted.

    The result is that of ipaddress.collapse_addresses; networks that stay are the same objects.
    """
    found = tuple(networks)
    if len(found) < 2:
        return found
    return (
        *_collapse([network for network in found if isinstance(network, IPv4Network)]),
        *_collapse([network for network in found if isinstance(network, IPv6Network)]),
    )


def _collapse(networks: list[_N]) -> list[_N]:
    """Collapse networks of one version in one pass over them in order."""
    if not networks:
        return networks
    make, bits = type(networks[0]), networks[0].max_prefixlen
    by_place = {(int(each.network_address), each.prefixlen): each for each in networks}
    # What the networks so far come to, in order; one that was merged has no object yet.
    kept: list[tuple[int, int, _N | None]] = []
    end = -1
    for (start, prefix), network in sorted(by_place.items()):
        if start <= end:
            continue
        end = start + (1 << (bits - prefix)) - 1
        first, length = start, prefix
        kept.append((first, length, network))
        while length and len(kept) > 1 and kept[-2][:2] == (first ^ (1 << (bits - length)), length):
            kept.pop()
            first, length = kept.pop()[0], length - 1
            kept.append((first, length, None))
    return [make((first, length)) if each is None else each for first, length, each in kept]


def _host(address: Address) -> Network:
    """Return the network of one address; from its number, because ipaddress is slow by text."""
    number = int(address)
    return IPv4Network(number) if isinstance(address, IPv4Address) else IPv6Network(number)


class Groups:
    """Resolves the groups of one document, each at most once.

    With the groups of an earlier document, those that no change can have touched are taken over,
    and one that comes out as before is the same object as before.
    """

    def __init__(self, document: PolicyDocument, earlier: Groups | None = None) -> None:
        self._groups = document.groups
        self._vms = document.vms
        #: What has been resolved, of this document.
        self.members = Members()
        self._networks: dict[str, tuple[Network, ...]] = {}
        self._former: dict[str, tuple[Network, ...]] = {}
        self._vms_by_label: dict[tuple[str, str], list[Vm]] = {}
        if earlier is not None and earlier._vms is self._vms:
            self._vms_by_label = earlier._vms_by_label
        else:
            for vm in self._vms.values():
                for label in vm.labels.items():
                    self._vms_by_label.setdefault(label, []).append(vm)
        if earlier is not None:
            self._take_over(earlier)

    def networks(self, name: str) -> tuple[Network, ...]:
        """Return what a group stands for, collapsed. KeyError without such a group."""
        found = self._networks.get(name)
        if found is None:
            members = tuple(self._members(name))
            self.members.add(len(members), f"group {name!r}")
            found = collapse(members)
            former = self._former.pop(name, None)
            if found == former:
                found = former
            self._networks[name] = found
        return found

    def empty(self) -> tuple[str, ...]:
        """Return the groups that stand for nothing, in the order of the document."""
        filled = self._with_containers(
            name for name, group in self._groups.items() if any(True for _ in self._own(group))
        )
        return tuple(name for name in self._groups if name not in filled)

    def _take_over(self, earlier: Groups) -> None:
        touched = self._with_containers(self._touched_since(earlier))
        for known in (earlier._former, earlier._networks):
            self._former.update((name, known[name]) for name in known if name in self._groups)
        for name in earlier._networks:
            if name in self._groups and name not in touched:
                self._networks[name] = self._former.pop(name)

    def _touched_since(self, earlier: Groups) -> Iterator[str]:
        """Iterate over the groups whose own members may be others than in an earlier document."""
        names: set[str] = set()
        labels: set[tuple[str, str]] = set()
        if earlier._vms is not self._vms:
            for name in earlier._vms.keys() | self._vms.keys():
                before, now = earlier._vms.get(name), self._vms.get(name)
                if before is not now:
                    names.add(name)
                    labels.update(before.labels.items() if before else ())
                    labels.update(now.labels.items() if now else ())
        for name, group in self._groups.items():
            by_label = bool(group.labels) and labels.issuperset(group.labels.items())
            is_other = earlier._groups.get(name) is not group
            if is_other or by_label or not names.isdisjoint(group.vms):
                yield name

    def _with_containers(self, names: Iterable[str]) -> set[str]:
        """Return groups and those that they are in, at any depth."""
        containers: dict[str, list[str]] = {}
        for group in self._groups.values():
            for nested in group.groups:
                containers.setdefault(nested, []).append(group.name)
        pending = list(names)
        found = set(pending)
        while pending:
            for name in containers.get(pending.pop(), ()):
                if name not in found:
                    found.add(name)
                    pending.append(name)
        return found

    def _members(self, name: str) -> Iterator[Network]:
        pending = [name]
        seen = {name}
        while pending:
            group = self._groups[pending.pop()]
            yield from self._own(group)
            for nested in group.groups:
                if nested not in seen:
                    seen.add(nested)
                    pending.append(nested)

    def _own(self, group: Group) -> Iterator[Network]:
        """Iterate over what is in a group apart from the groups in it."""
        yield from group.cidrs
        for vm in (*self._vms_with(group.labels), *map(self._vms.get, group.vms)):
            for interface in vm.interfaces if vm else ():
                for address in interface.addresses:
                    if not address.is_link_local:
                        yield _host(address)

    def _vms_with(self, labels: Mapping[str, str]) -> Iterable[Vm]:
        if not labels:
            return ()
        candidates = self._vms_by_label.get(next(iter(labels.items())), ())
        return (vm for vm in candidates if labels_match(labels, vm.labels))
