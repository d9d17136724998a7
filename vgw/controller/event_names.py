# SPDX-License-Identifier: Apache-2.0
"""What the numbers in events stand for: VMs, interfaces and rules, as their manifests say.

A manifest, and the names of its policies' rules, are written before an event can carry their
numbers, so a number that is not known is looked for in the files that changed. Names of what is
detached stay known until such a look, for events that were under way.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from vgw import abi
from vgw.controller.events import RuleName
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore, RuleLabel

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
        self._manifests: dict[Path, Manifest] = {}
        self._endpoints: dict[int, tuple[str, str, Manifest]] = {}
        #: Endpoint -> the generation of its last event.
        self._generations: dict[int, int] = {}
        self._store = PolicyStore(paths.policies)
        self._labels: dict[str, list[RuleLabel] | None] = {}
        self._outdated = False

    def outdated(self) -> None:
        """Have what changed read before the next answer; may be called by any thread."""
        self._outdated = True

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        """Return the VM and the interface of an endpoint's identity."""
        if self._outdated or endpoint not in self._endpoints:
            self._outdated = False
            self._look()
        found = self._endpoints.get(endpoint)
        return None if found is None else found[:2]

    def rule(self, endpoint: int, generation: int, path: abi.Path, rule: int) -> RuleName | None:
        """Return the name of a rule by its number in the policy of a generation on a path."""
        if self._generations.get(endpoint) != generation:
            # What is known of it may be of a change that failed: the next one has its generation.
            self._look()
            self._generations[endpoint] = generation
        digest = self._digest(endpoint, generation, path)
        if digest is None:
            self._look()
            digest = self._digest(endpoint, generation, path)
        if digest is None:
            return None
        if digest not in self._labels:
            self._labels[digest] = self._store.labels(digest)
        labels = self._labels[digest]
        if labels is None or rule >= len(labels):
            return None
        label = labels[rule]
        return RuleName(label.policy, label.tier, label.name)

    def _digest(self, endpoint: int, generation: int, path: abi.Path) -> str | None:
        found = self._endpoints.get(endpoint)
        return None if found is None else found[2].digest(generation, path)

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
            del self._files[file], self._manifests[file]
        self._learn()

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
            self._manifests[file] = manifest

    def _learn(self) -> None:
        """Know what the manifests say, and forget the rules of policies that none refers to."""
        manifests = self._manifests.values()
        self._endpoints = {
            entry.endpoint: (manifest.vm, name, manifest)
            for manifest in manifests
            for name, entry in manifest.endpoints.items()
        }
        self._generations = {
            endpoint: generation
            for endpoint, generation in self._generations.items()
            if endpoint in self._endpoints
        }
        known = {digest for manifest in manifests for digest in manifest.digests()}
        self._labels = {
            digest: labels for digest, labels in self._labels.items() if digest in known
        }
