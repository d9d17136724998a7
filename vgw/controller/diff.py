# SPDX-License-Identifier: Apache-2.0
"""What applying a policy would change, for `apply --dry-run`: each VM's rules, groups and settings.

It is compared with what is in force: the rules and facts that are remembered of a VM's images and
endpoints, never with the policy file. Nothing is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from vgw.abi import Path
from vgw.controller.batch import ApplyResult, AttachResult
from vgw.controller.desired import Order, desired_interfaces, sources_of
from vgw.controller.diff_rules import (
    Row,
    RuleChanges,
    changed,
    changed_fields,
    changed_set,
    compare_rules,
    modified_row,
    rule_row,
)
from vgw.controller.last_known import LastKnown
from vgw.controller.manifest import Manifest
from vgw.controller.reconcile import Host
from vgw.controller.recording import results_of
from vgw.errors import PartlyAppliedError
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.model import (
    PATH_OF_DIRECTION,
    REJECT_PER_SECOND,
    Defaults,
    EffectiveRule,
    Interface,
    PolicyDocument,
    Rule,
)
from vgw.policy.resolve import effective_policy, group_networks

#: Kinds of changes of rules, in the order in which they are shown.
KINDS: Final = ("removed", "added", "modified", "moved")
_INTERFACE: Final = ("mac", "addresses", "allowed_pairs", "vlans", "conntrack_max", "hook")
_Rules = tuple[EffectiveRule, ...]


def plan(host: Host, document: PolicyDocument, limit: int | None = None) -> Row:
    """Return what applying `document` would change, without changing anything.

    {"vms": [...], "waiting", "failures"}. Each VM has "vm", "changed", "generation" (that it would
    run), "named", "kept", "pending" as in AttachResult; "counts" and lists of the rules "added",
    "removed", "modified" and "moved", all null when the rules in force are not remembered;
    "omitted", how many of those are left out because all VMs together have more than `limit`;
    "defaults", "settings" and "interfaces", by what differs; and "groups" whose change is behind
    modified rules. Raises what Host.apply raises unless it is only about some VMs.
    """
    failures: Mapping[str, str] = {}
    try:
        outcome = host.apply(document, dry_run=True)
    except PartlyAppliedError as error:
        outcome, failures = ApplyResult(results_of(error)), error.failures
    planner = _Planner(host, document, limit)
    rows = [planner.row(result) for result in outcome.vms]
    return {"vms": rows, "waiting": outcome.waiting, "failures": dict(failures)}


class _Planner:
    """Compares VM by VM; what many VMs have in common is read and compared once."""

    def __init__(self, host: Host, document: PolicyDocument, limit: int | None) -> None:
        self._host = host
        self._known = LastKnown(host.paths, document, host.overlay)
        self._left = limit
        self._rules: dict[str, _Rules | None] = {}
        self._changes: dict[tuple[str | None, str], RuleChanges | None] = {}

    def row(self, result: AttachResult) -> Row:
        """Return what would change for a VM."""
        fields = ("vm", "changed", "generation", "named", "kept", "pending")
        row: Row = {name: getattr(result, name) for name in fields}
        document = self._known.document_of(result.vm)
        if document is None:  # it is left alone
            return row | self._rule_rows([]) | _NOTHING_ELSE
        manifest = self._host.manifest(result.vm)
        wanted, _ = desired_interfaces(self._host.paths, document, result.vm, Order())
        effective = effective_policy(document, result.vm)
        images = compile_policy(effective, sources=sources_of(wanted.values()))
        changes = [self._compare(manifest, path, image) for path, image in images.items()]
        entry = manifest.current()
        row |= self._rule_rows(changes)
        row["defaults"] = _defaults(None if entry is None else entry.defaults, effective.defaults)
        row["settings"] = self._settings(manifest, document)
        row["interfaces"] = _interfaces(manifest, wanted)
        row["groups"] = self._groups(manifest, document, changes)
        return row

    def _compare(self, manifest: Manifest, path: Path, image: PolicyImage) -> RuleChanges | None:
        """Return how the rules of one direction change; None: those in force are lost."""
        digest = manifest.digest(manifest.generation, path)
        if digest == image.digest:
            return RuleChanges()
        key = (digest, image.digest)
        if key not in self._changes:
            old = None if digest is None else self._rules_of(digest)
            self._changes[key] = None if old is None else compare_rules(old, image.rules)
        return self._changes[key]

    def _rules_of(self, digest: str) -> _Rules | None:
        if digest not in self._rules:
            self._rules[digest] = self._host.store.rules(digest)
        return self._rules[digest]

    def _rule_rows(self, changes: Sequence[RuleChanges | None]) -> Row:
        """Return the changes of both directions as JSON, no more of them than are left to show."""
        found = [each for each in changes if each is not None]
        if len(found) < len(changes):
            return dict.fromkeys(("counts", *KINDS)) | {"omitted": 0}
        row: Row = {}
        omitted = 0
        counts = {kind: sum(len(getattr(each, kind)) for each in found) for kind in KINDS}
        for kind in KINDS:
            room = counts[kind] if self._left is None else min(self._left, counts[kind])
            every = (item for each in found for item in getattr(each, kind))
            row[kind] = [
                _change_row(kind, item) for _, item in zip(range(room), every, strict=False)
            ]
            omitted += counts[kind] - room
            self._left = None if self._left is None else self._left - room
        return {"counts": counts, **row, "omitted": omitted}

    def _settings(self, manifest: Manifest, document: PolicyDocument) -> Row:
        """Return which settings of a VM as a whole differ."""
        vm = document.vms.get(manifest.vm)
        found: Row = {}
        mode = "enforce" if vm is None else vm.mode.name.lower()
        if manifest.mode.name.lower() != mode:
            found["mode"] = changed(manifest.mode.name.lower(), mode)
        limit = REJECT_PER_SECOND if vm is None else vm.reject_per_second
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(e) for e in self._host.open_endpoints(manifest.vm)]
            limits = {endpoint.maps.config().reject_per_second for endpoint in opened}
        if limits.difference({limit}):
            found["reject_per_second"] = changed(min(limits), limit)
        return found

    def _groups(
        self, manifest: Manifest, document: PolicyDocument, changes: Iterable[RuleChanges | None]
    ) -> list[Row] | None:
        """Return the groups whose addresses differ and that modified rules name.

        None: the policy in force is not kept, so nobody knows what its groups were.
        """
        modified = [old.key for each in changes if each is not None for old, _ in each.modified]
        if not modified:
            return []
        before = self._known.document(manifest.policy)
        if before is None:
            return None
        keys = set(modified)
        names = {name for each in (before, document) for name in _groups_of(each, keys)}
        rows = []
        for name in sorted(names):
            old, new = (
                group_networks(each, name) if name in each.groups else ()
                for each in (before, document)
            )
            if old != new:
                rows.append({"group": name, **changed_set(old, new)})
        return rows


_NOTHING_ELSE: Final[Row] = {"defaults": {}, "settings": {}, "interfaces": {}, "groups": []}


def _change_row(kind: str, item: Any) -> Row:
    """Return one change of a rule as JSON."""
    if kind == "modified":
        return modified_row(*item)
    if kind == "moved":
        rule, old, new = item
        return {"rule": rule.key, **changed(old, new)}
    return rule_row(*item)


def _defaults(old: Defaults | None, new: Defaults) -> Row | None:
    """Return which defaults differ, None when those in force are lost."""
    return None if old is None else changed_fields(old, new, ("ingress", "egress", "log"))


def _interfaces(manifest: Manifest, wanted: Mapping[str, Interface]) -> Row:
    """Return which interfaces come, go and differ, by name."""
    now = {name: entry.interface for name, entry in manifest.endpoints.items()}
    found: Row = {name: "added" for name in wanted if name not in now}
    found |= {name: "removed" for name in now if name not in wanted}
    for name in set(now).intersection(wanted):
        fields = changed_fields(now[name], wanted[name], _INTERFACE)
        for part in ("guards", "tracking"):
            old, new = getattr(now[name], part), getattr(wanted[name], part)
            differs = changed_fields(old, new, [field.name for field in dataclasses.fields(old)])
            fields |= {f"{part}.{field}": values for field, values in differs.items()}
        if fields:
            found[name] = fields
    return dict(sorted(found.items()))


def _groups_of(document: PolicyDocument, keys: set[str]) -> Iterator[str]:
    """Yield the groups that rules name, by the keys of the rules."""
    for policy in document.policies:
        for direction in PATH_OF_DIRECTION:
            start = f"{direction}/{policy.tier}/{policy.name}/"
            for rule in policy.rules(direction):
                if f"{start}{rule.name}" in keys:
                    yield from _names(rule)


def _names(rule: Rule) -> Iterator[str]:
    return (peer for peer in rule.peers if isinstance(peer, str))
