# SPDX-License-Identifier: Apache-2.0
"""The `vms` and `groups` sections of a policy file."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Final

from vgw.abi import MAX_ADDRESSES, MAX_VLANS, Mode
from vgw.policy import values
from vgw.policy.draft import Draft, InterfacePlace, Kind
from vgw.policy.fields import Fields, Keys, read_entries, read_scalar
from vgw.policy.model import (
    REJECT_PER_SECOND,
    Address,
    AllowedPair,
    Group,
    Guards,
    Hook,
    Interface,
    Logging,
    Tracking,
    Vm,
)
from vgw.policy.read_tracking import read_tracking
from vgw.policy.report import Report
from vgw.policy.yaml_nodes import MapNode, Node, Scalar

_VM_KEYS: Final = Keys(
    "a VM", ("labels", "mode", "interfaces", "conntrack", "reject_per_second", "log")
)
_LOG_KEYS: Final = Keys(
    "`log` of a VM",
    ("flows", "per_second"),
)
_INTERFACE_KEYS: Final = Keys(
    "an interface",
    ("name", "mac", "addresses", "allowed_pairs", "vlans", "guards", "conntrack_max", "hook"),
    required=("name",),
)
_PAIR_KEYS: Final = Keys("an allowed pair", ("address", "mac"), required=("address",))
_GUARD_NAMES: Final = tuple(each.name for each in fields(Guards))
_GUARD_KEYS: Final = Keys("`guards`", _GUARD_NAMES)
_GROUP_KEYS: Final = Keys("a group", ("labels", "cidrs", "vms", "groups"))
_MODES: Final = {mode.name.lower(): mode for mode in Mode}
_HOOKS: Final = {str(hook): hook for hook in Hook}
_VLAN: Final = partial(values.integer, lowest=1, highest=4094, what="a VLAN id")
_CONNTRACK_MAX: Final = partial(values.integer, lowest=1024, highest=131072)
_REJECTS: Final = partial(values.integer, lowest=0, highest=10_000)
_RECORDS: Final = partial(values.integer, lowest=0, highest=100_000)
_DEFAULT_CONNTRACK_MAX: Final = Interface("").conntrack_max


def read_vms(draft: Draft, node: Node) -> None:
    """Read the `vms` section into the draft."""
    for key, value in read_entries(draft.report, node):
        name = draft.define(Kind.VM, key, values.name)
        found = Fields(draft.report, value, _VM_KEYS)
        tracking = read_tracking(draft.report, found.value("conntrack"))
        draft.vms[name] = Vm(
            name=name,
            labels=read_labels(draft.report, found.value("labels")),
            mode=found.scalar("mode", values.choice(_MODES), Mode.ENFORCE),
            interfaces=tuple(
                _read_interface(draft, name, item, tracking) for item in found.items("interfaces")
            ),
            reject_per_second=found.scalar("reject_per_second", _REJECTS, REJECT_PER_SECOND),
            log=_read_logging(draft.report, found.value("log")),
        )


def _read_logging(report: Report, node: Node | None) -> Logging:
    """Read what a VM leaves in the log; without a node, as by default."""
    usual = Logging()
    if node is None:
        return usual
    found = Fields(report, node, _LOG_KEYS)
    return Logging(
        flows=found.scalar("flows", values.boolean, usual.flows),
        per_second=found.scalar("per_second", _RECORDS, usual.per_second),
    )


def read_groups(draft: Draft, node: Node) -> None:
    """Read the `groups` section into the draft."""
    for key, value in read_entries(draft.report, node):
        name = draft.define(Kind.GROUP, key, values.group_name)
        found = Fields(draft.report, value, _GROUP_KEYS)
        vms = found.scalars("vms", values.name)
        groups = found.scalars("groups", values.name)
        for place, vm in vms:
            draft.refer(Kind.VM, vm, place)
        for place, group in groups:
            draft.refer(Kind.GROUP, group, place, owner=name)
        draft.groups[name] = Group(
            name=name,
            labels=read_selector(draft.report, found.value("labels")),
            cidrs=tuple(cidr for _, cidr in found.scalars("cidrs", values.network)),
            vms=tuple(vm for _, vm in vms),
            groups=tuple(group for _, group in groups),
        )


def read_labels(report: Report, node: Node | None) -> dict[str, str]:
    """Read labels: names with texts; numbers and words such as `no` are texts as well."""
    labels: dict[str, str] = {}
    if node is None:
        return labels
    for key, value in read_entries(report, node):
        name = read_scalar(report, key, values.label)
        text = read_scalar(report, value, values.label)
        if name is not None and text is not None:
            labels[name] = text
    return labels


def read_selector(report: Report, node: Node | None) -> dict[str, str]:
    """Read the labels by which VMs are selected, of which there must be at least one."""
    if isinstance(node, MapNode) and not node.entries:
        report.add(node, "no label would select every VM; write labels or leave the key out")
    return read_labels(report, node)


def _read_interface(draft: Draft, vm: str, node: Node, tracking: Tracking) -> Interface:
    found = Fields(draft.report, node, _INTERFACE_KEYS)
    interface = Interface(
        name=found.scalar("name", values.interface_name, ""),
        mac=found.scalar("mac", values.mac, None),
        addresses=_read_addresses(draft.report, found),
        allowed_pairs=_read_pairs(draft.report, found),
        vlans=found.unique("vlans", _VLAN),
        guards=_read_guards(draft.report, found),
        conntrack_max=found.scalar("conntrack_max", _CONNTRACK_MAX, _DEFAULT_CONNTRACK_MAX),
        hook=found.scalar("hook", values.choice(_HOOKS), Hook.AUTO),
        tracking=tracking,
    )
    _check_limits(draft.report, found, interface)
    name = found.value("name")
    if name is not None and interface.name:
        mac = found.value("mac") if interface.mac else None
        draft.interfaces.append(InterfacePlace(vm, interface, node, name, mac))
    return interface


def _read_addresses(report: Report, found: Fields) -> tuple[Address, ...]:
    node = found.value("addresses")
    if isinstance(node, Scalar) and node.text == "learn":
        report.add(node, "learning addresses is not available yet; list the VM's addresses")
        return ()
    return found.unique("addresses", values.address)


def _read_pairs(report: Report, found: Fields) -> tuple[AllowedPair, ...]:
    pairs: dict[AllowedPair, Node] = {}
    for node in found.items("allowed_pairs"):
        pair = Fields(report, node, _PAIR_KEYS)
        network = pair.scalar("address", values.pair_network, None)
        mac = pair.scalar("mac", values.mac, None)
        if network is None:
            continue
        read = AllowedPair(network, mac)
        if read in pairs:
            report.add(node, f"this pair is in the list already, on line {pairs[read].line}")
        pairs[read] = node
    return tuple(pairs)


def _read_guards(report: Report, found: Fields) -> Guards:
    node = found.value("guards")
    if node is None:
        return Guards()
    switches = Fields(report, node, _GUARD_KEYS)
    return Guards(**{name: switches.scalar(name, values.boolean, True) for name in _GUARD_NAMES})


def _check_limits(report: Report, found: Fields, interface: Interface) -> None:
    """Refuse what does not fit an endpoint's configuration."""
    # One more for link-local: the address derived from the MAC or, without one, all of fe80::/10.
    implied = 1 if interface.mac or interface.addresses else 0
    count = len(interface.addresses) + len(interface.allowed_pairs) + implied
    if count > MAX_ADDRESSES:
        key = "allowed_pairs" if interface.allowed_pairs else "addresses"
        what = "addresses and allowed pairs, the implied link-local address included"
        message = f"{count} {what}; an interface has at most {MAX_ADDRESSES}, use CIDRs in pairs"
        report.add(found.key(key), message)
    if len(interface.vlans) > MAX_VLANS:
        message = f"{len(interface.vlans)} VLAN tags; an interface has at most {MAX_VLANS}"
        report.add(found.key("vlans"), message)
