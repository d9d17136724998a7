# SPDX-License-Identifier: Apache-2.0
"""What each rule of each endpoint has counted, for scrapes that show rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

from vgw.controller.kept_maps import KeptEndpoint, KeptLook
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.metrics import RuleReading
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore, RuleNames
from vgw.controller.rule_counts import NO_COUNT, RuleCounts, add, counted_now, read_steadily
from vgw.policy.model import PATH_OF_DIRECTION

#: Counts by VM and interface.
RulesOf = Mapping[tuple[str, str], tuple[RuleReading, ...]]


class RuleReadings:
    """Reads the counts of the rules in force; for one thread at a time.

    The maps are those that are kept open, and what rules are called is read once for each policy.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._names = RuleNames(PolicyStore(paths.policies))

    def of(self, look: KeptLook) -> RulesOf:
        """Return the counts of all endpoints of a look. Raises VgwError."""
        found: dict[tuple[str, str], tuple[RuleReading, ...]] = {}
        used: set[str] = set()
        for vm, group in groupby(look.endpoints, lambda each: each.vm):
            endpoints = list(group)
            counts = read_steadily(
                self._paths.counts(vm),
                [endpoint.maps for endpoint in endpoints],
                partial(self._of_vm, vm, endpoints, used),
            )
            for endpoint, one in zip(endpoints, counts, strict=True):
                found[vm, endpoint.interface] = one
        self._names.keep_only(used)
        return found

    def _of_vm(
        self, vm: str, endpoints: Sequence[KeptEndpoint], used: set[str], counts: RuleCounts
    ) -> list[tuple[RuleReading, ...]]:
        manifest = load_manifest(self._paths.manifest(vm))
        if manifest is None:
            return [()] * len(endpoints)
        used |= manifest.digests()
        return [
            self._of_endpoint(endpoint, manifest, counts, first=number == 0)
            for number, endpoint in enumerate(endpoints)
        ]

    def _of_endpoint(
        self, endpoint: KeptEndpoint, manifest: Manifest, counts: RuleCounts, *, first: bool
    ) -> tuple[RuleReading, ...]:
        """Return the counts of the rules in force.

        What counters that are gone had counted is remembered for the whole VM; it is shown with the
        VM's first interface, so that sums over interfaces are right.
        """
        labels_of = manifest.in_generation(self._names.labels)
        totals = dict(counts.carried) if first else {}
        add(totals, counted_now(endpoint.maps, counts, labels_of))
        return tuple(
            RuleReading(
                label.direction, label.policy, label.name, totals.get(label.key, NO_COUNT).packets
            )
            for path in PATH_OF_DIRECTION.values()
            for label in labels_of(manifest.generation, path) or ()
        )
