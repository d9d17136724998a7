# SPDX-License-Identifier: Apache-2.0
"""What `status` and `rules` say of a VM, as JSON: read back from the kernel, named by memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from vgw import abi
from vgw.controller import links, pinned
from vgw.controller.builds import build_of
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.controller.elsewhere import endpoints_elsewhere
from vgw.controller.endpoint import (
    BrokenEndpointError,
    OpenEndpoint,
    open_endpoint,
    pending_note,
)
from vgw.controller.foreign import programs_beside
from vgw.controller.links import Attachment, InterfaceFacts
from vgw.controller.manifest import EndpointEntry, Manifest, load_manifest
from vgw.controller.mode_order import order_report
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore, RuleLabel, RuleNames
from vgw.controller.rule_counts import NO_COUNT, RuleCounts, add, counted_now
from vgw.errors import VgwError
from vgw.maps import EndpointMaps, RuleCount
from vgw.policy.guards import missing_guards
from vgw.policy.model import PATH_OF_DIRECTION, Hook, Interface

SCHEMA: Final = "vgw/v1"

Row = dict[str, Any]

#: What is not known of a VM whose tables are of another version.
_UNKNOWN: Final = dict.fromkeys(("mode", "mode_policy", "generation", "policy", "named"))


def vm_status(paths: Paths, vm: str, build: str | None = None) -> Row:
    """Return the status of one VM. What is broken is said, and does not raise.

    `build` is this version's, None if that is not known.
    """
    manifest = load_manifest(paths.manifest(vm))
    if manifest is not None and not manifest.endpoints:
        manifest = None
    names = pinned.interfaces_of(paths, vm)
    rows = [_interface_status(paths, vm, name, manifest) for name in names]
    for row, _ in rows:
        row["pending"] = row["pending"] or _build_note(row, build)
    configs = [config for _, config in rows if config is not None]
    mode = abi.Mode(configs[0].mode).name.lower() if configs else None
    if mode is None and manifest is not None:
        mode = manifest.effective_mode.name.lower()
    generation = max((config.generation for config in configs), default=None)
    return {
        "vm": vm,
        "mode": mode,
        "mode_policy": None if manifest is None else manifest.mode.name.lower(),
        "mode_order": order_report(manifest),
        "generation": generation,
        "policy": None if manifest is None else manifest.policy or None,
        "named": None if manifest is None else manifest.named,
        "interfaces": [row for row, _ in rows],
    }


def _build_note(row: Row, build: str | None) -> str | None:
    """Return what is to be known of an endpoint whose programs are not of `build`."""
    if build is None or not row["attached"] or row["build"] == build:
        return None
    return (
        f"its programs are of another build ({row['build'] or 'unknown'}, this is {build}); a "
        "start of the controller, attach or apply brings them to this one"
    )


def elsewhere_status(paths: Paths, vm: str | None) -> list[Row]:
    """Return the status of VMs whose tables are of another ABI: only that they are."""
    found: dict[str, Row] = {}
    for each in endpoints_elsewhere(paths, vm):
        if each.interface in pinned.interfaces_of(paths, each.vm):
            continue  # which has taken over, or is about to
        interface = _empty_row(each.interface, pinned.present_ifindex(each.interface), None)
        interface["build"] = build_of(each.directory)
        interface["reason"] = (
            f"it filters with the tables of ABI {each.abi}, of another version; start that one, or "
            f"`vgw attach --vm {each.vm}` to go on with this one"
        )
        row = found.setdefault(each.vm, {"vm": each.vm, **_UNKNOWN, "interfaces": []})
        row["interfaces"].append(interface)
    return list(found.values())


def _empty_row(name: str, ifindex: int | None, manifest: Manifest | None) -> Row:
    """Return the status of an interface of which nothing has been read."""
    entry = None if manifest is None else manifest.endpoints.get(name)
    return {
        "name": name,
        "ifindex": ifindex,
        "attached": False,
        "build": None,
        "from_vm": None,
        "to_vm": None,
        "rules": _rule_counts(manifest),
        "conntrack": {"entries": 0, "max": 0 if entry is None else entry.interface.conntrack_max},
        "half_open": None,
        "drops": 0,
        "reject_answers": None,
        "reason": None,
        "pending": None,
        "beside": [],
        "guards_off": None if entry is None else _guards_off(entry.interface),
    }


def _interface_status(
    paths: Paths, vm: str, name: str, manifest: Manifest | None
) -> tuple[Row, abi.EndpointConfig | None]:
    ifindex = pinned.present_ifindex(name)
    renamed = pinned.located(paths, vm, name) if ifindex is None else None
    if renamed is not None:
        ifindex = renamed.ifindex
    entry = None if manifest is None else manifest.endpoints.get(name)
    row = _empty_row(name, ifindex, manifest)
    row["build"] = build_of(paths.endpoint_dir(vm, name))
    try:
        with open_endpoint(vm, name, paths.endpoint_dir(vm, name)) as endpoint:
            config = endpoint.maps.config()
            row["reason"] = _read_attachments(row, endpoint, ifindex)
            row["attached"] = row["from_vm"] is not None and row["to_vm"] is not None
            if ifindex is not None:
                beside = programs_beside(ifindex, _known_programs(row))
                shield = links.pinned_shield(endpoint.directory)  # which may have just come
                row["beside"] = [
                    each for each in beside if (each["kind"], each["id"]) != ("xdp", shield)
                ]
            if entry is not None and row["from_vm"] is not None:
                now = name if renamed is None else renamed.name
                row["guards_off"] |= _not_seen(now, row["from_vm"]["hook"])
            meta, config = endpoint.maps.meta(), endpoint.maps.config()
            row["conntrack"] = {"entries": meta.entries, "max": endpoint.maps.conntrack_max()}
            row["half_open"] = {
                **{str(each): meta.half_open[path] for each, path in PATH_OF_DIRECTION.items()},
                "max": config.half_open_max,
            }
            row["drops"] = drops(endpoint)
            row["reject_answers"] = reject_answers(endpoint.maps)
            if entry is not None:
                row["pending"] = pending_note(endpoint, entry.interface)
    except BrokenEndpointError as error:
        row["reason"] = str(error)
        return row, None
    if row["reason"] is None:
        row["reason"] = _name_note(name, renamed, entry)
    if row["reason"] is None and manifest is None:
        row["reason"] = (
            f"{paths.manifest(vm)} is lost or damaged; apply the policy to write it anew"
        )
    return row, config


def _name_note(
    name: str, renamed: InterfaceFacts | None, entry: EndpointEntry | None
) -> str | None:
    """Return that an interface has another name than the policy or its pins say, if it has."""
    if renamed is not None:
        return f"interface {name} is called {renamed.name} now; correct its name in the policy"
    if entry is not None and entry.interface.name != name:
        return f"the policy calls it {entry.interface.name}; correct its name there"
    return None


def _read_attachments(row: Row, endpoint: OpenEndpoint, ifindex: int | None) -> str | None:
    """Fill in how an endpoint is attached; return what is wrong with that, None if nothing is."""
    if ifindex is None:
        elsewhere = links.linked_ifindex(endpoint.directory)
        if elsewhere is None:
            return f"interface {endpoint.interface} does not exist"
        return (
            f"interface {endpoint.interface} was moved to another network namespace (its index "
            f"is {elsewhere}); the programs still run on it"
        )
    problem = None
    for path in abi.Path:
        key = path.name.lower()
        attachment = endpoint.attachment(ifindex, path)
        if attachment is None:
            problem = f"its {key} program is not on the interface; attach {endpoint.vm} again"
        else:
            row[key] = _attachment_row(attachment)
            if attachment.ahead:
                problem = f"programs of others run before its {key} program and may bypass it"
    return problem


def _attachment_row(attachment: Attachment) -> Row:
    row: Row = {
        "hook": attachment.hook,
        "mode": attachment.mode,
        "link": attachment.link,
        "prog_id": attachment.prog_id,
    }
    if attachment.ahead:
        row["ahead"] = list(attachment.ahead)
    if attachment.shield is not None:
        row["shield"] = attachment.shield
    return row


def _known_programs(row: Row) -> set[int]:
    """Return the programs of which a row speaks: vgw's, and those that run before them."""
    there = [row[path.name.lower()] for path in abi.Path]
    known = {attachment["prog_id"] for attachment in there if attachment is not None}
    known |= {each["shield"] for each in there if each is not None and "shield" in each}
    return known.union(*(attachment.get("ahead", ()) for attachment in there if attachment))


def _rule_counts(manifest: Manifest | None) -> dict[str, int] | None:
    """Return how many rules a VM has in each direction; None when that is lost."""
    entry = None if manifest is None else manifest.current()
    if entry is None:
        return None
    return {str(direction): entry.rules[path] for direction, path in PATH_OF_DIRECTION.items()}


def _not_seen(interface: str, hook: str) -> dict[str, str]:
    """Return what a VM can do unseen where its packets are judged at a hook."""
    if hook != Hook.XDP:
        return {}
    unseen = {"checksum": "XDP does not see which bytes a VM leaves for others to fill in; use tc"}
    if links.find_interface(interface).kind != "tun":  # a TAP has every tag in the frame
        unseen["vlan"] = "XDP does not see tags held beside a frame; use tc"
    return unseen


def _guards_off(interface: Interface) -> dict[str, str]:
    """Return why each guard that is off is off."""
    asked = dataclasses.asdict(interface.guards)
    by_policy = {name: "the policy turns it off" for name, on in asked.items() if not on}
    return missing_guards(interface) | by_policy


def reject_answers(maps: EndpointMaps) -> dict[str, int]:
    """Return what became of the answers to rejected packets, by the names that users see."""
    return answers_of(maps.reject_meter())


def answers_of(meter: abi.RejectMeter) -> dict[str, int]:
    """Return what a meter of answers to rejected packets counted, by the names that users see."""
    return {"sent": meter.sent, "suppressed": meter.suppressed, "failed": meter.failed}


def drops(endpoint: OpenEndpoint) -> int:
    """Return how many packets an endpoint has dropped or rejected, for whatever reason."""
    return sum(
        counter.packets
        for (_, verdict, _), counter in endpoint.maps.stats().items()
        if verdict in (abi.Verdict.DROP, abi.Verdict.REJECT)
    )


def rule_report(
    manifest: Manifest,
    store: PolicyStore,
    counts: RuleCounts,
    endpoints: Sequence[OpenEndpoint],
) -> Row:
    """Return the rules that a VM has now, in their order, with packets and bytes they decided.

    Counts are sums over the VM's interfaces and over policies; `last_hit` is in seconds before
    now. Raises VgwError when the names of the rules are lost.
    """
    labels_of = manifest.in_generation(RuleNames(store).labels)
    totals = dict(counts.carried)
    for endpoint in endpoints:
        add(totals, counted_now(endpoint.maps, counts, labels_of))
    now = coarse_now_ns()
    rows: list[Row] = []
    for path in PATH_OF_DIRECTION.values():
        labels = labels_of(manifest.generation, path)
        if labels is None:
            raise VgwError(
                f"the names of {manifest.vm}'s rules are lost or damaged; the VM stays protected, "
                "apply its policy to write them anew"
            )
        rows += [_rule_row(label, totals.get(label.key, NO_COUNT), now) for label in labels]
    return {"schema": SCHEMA, "vm": manifest.vm, "rules": rows}


def _rule_row(label: RuleLabel, count: RuleCount, now_ns: int) -> Row:
    last = count.last_hit_ns
    return {
        "direction": label.direction,
        "tier": label.tier,
        "policy": label.policy,
        "rule": label.name,
        "action": label.action,
        "log": label.log,
        "packets": count.packets,
        "bytes": count.bytes,
        "last_hit": round(max(0, now_ns - last) / SECOND_NS, 3) if last else None,
    }
