# SPDX-License-Identifier: Apache-2.0
"""What the numbers in events stand for: VMs, interfaces and rules, as their manifests say.

A manifest is written before an event can carry its numbers, so a number that is not known is
looked for in the files that changed. Names of what is detached stay known until such a look, for
events that were under way.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from vgw.controller.events import RuleName
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.paths import Paths

#: A directory changed this recently may change again without its time of change showing it.
_SETTLED_NS: Final = 50_000_000

_Stamp = tuple[int, int]


class EventNames:
    """Names by number, read from the manifests when they are needed; for use by one thread."""

    def __init__(self, paths: Paths) -> None:
        """Know nothing yet; the manifests under `paths` are read when first asked."""
        self._paths = paths
        self._looked_at = 0
        self._files: dict[Path, _Stamp] = {}
        self._vms: dict[Path, str] = {}
        self._endpoints: dict[int, tuple[str, str]] = {}
        self._rules: dict[str, dict[int, RuleName]] = {}

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        """Return the VM and the interface of an endpoint's identity."""
        if endpoint not in self._endpoints:
            self._look()
        return self._endpoints.get(endpoint)

    def rule(self, endpoint: int, rule: int) -> RuleName | None:
        """Return the name of a rule id of an endpoint."""
        where = self.endpoint(endpoint)
        if where is None:
            return None
        if rule not in self._rules_of(where[0]):
            self._look()
        return self._rules_of(where[0]).get(rule)

    def _rules_of(self, vm: str) -> dict[int, RuleName]:
        """Return the names of a VM's rules; most VMs never log one, so they are read on demand."""
        if vm not in self._rules:
            manifest = load_manifest(self._paths.manifest(vm))
            rules = () if manifest is None else manifest.rules.values()
            self._rules[vm] = {
                rule.id: RuleName(rule.policy, rule.tier, rule.name) for rule in rules
            }
        return self._rules[vm]

    def _look(self) -> None:
        """Read the manifests that changed since the last look, if any did."""
        try:
            changed = self._paths.manifests.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed == self._looked_at:
            return
        self._looked_at = changed if time.time_ns() - changed > _SETTLED_NS else 0
        there: set[Path] = set()
        for file in self._paths.manifests.glob("*.json"):
            there.add(file)
            self._read(file)
        for file in self._files.keys() - there:
            del self._files[file]
            self._forget(self._vms.pop(file, None))

    def _read(self, file: Path) -> None:
        try:
            status = file.stat()
        except FileNotFoundError:
            return
        stamp = status.st_ino, status.st_mtime_ns
        if self._files.get(file) == stamp:
            return
        manifest = load_manifest(file)
        if manifest is not None:
            self._files[file] = stamp
            self._vms[file] = manifest.vm
            self._learn(manifest)

    def _learn(self, manifest: Manifest) -> None:
        self._forget(manifest.vm)
        for name, entry in manifest.endpoints.items():
            self._endpoints[entry.endpoint] = manifest.vm, name

    def _forget(self, vm: str | None) -> None:
        self._rules.pop(vm or "", None)
        for endpoint in [key for key, (owner, _) in self._endpoints.items() if owner == vm]:
            del self._endpoints[endpoint]
