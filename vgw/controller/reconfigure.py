# SPDX-License-Identifier: Apache-2.0
"""Another configuration for a VM's endpoints, under the policy that they have: all or none."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from vgw import abi, libbpf
from vgw.controller import endpoint as endpoints
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.images import Images
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.pins import quietly
from vgw.controller.policy_store import PolicyStore
from vgw.controller.recovery import recovered
from vgw.controller.rule_counts import settle_spares
from vgw.errors import VgwError

_logger = logging.getLogger(__name__)


def reconfigure(
    paths: Paths,
    store: PolicyStore,
    vm: str,
    opened: Sequence[OpenEndpoint],
    edit: Callable[[abi.EndpointConfig], None],
) -> None:
    """Have `edit` change the configurations of a VM's endpoints, and put them in force.

    Raises VgwError, and all of them have the configuration from before then. What was in force
    before and cannot be freed is no error: the next change does that.
    """
    manifest = load_manifest(paths.manifest(vm)) or recovered(paths, vm, opened)
    settle_spares(
        paths.counts(vm),
        [endpoint.maps for endpoint in opened],
        manifest.in_generation(store.labels),
    )
    images = Images(paths.images)
    staged: list[tuple[OpenEndpoint, int]] = []
    with contextlib.ExitStack() as undo:
        for endpoint in opened:
            config = endpoint.maps.config()
            edit(config)
            undo.callback(quietly, endpoint.maps.release, 1 - endpoint.maps.active_slot())
            policies = images.in_force(endpoint.maps)
            staged.append((endpoint, endpoints.restage(endpoint, config, policies)))
        # Switched back, no packet is judged any more by what is released then.
        undo.callback(quietly, libbpf.wait_for_programs)
        for endpoint, slot in staged:
            undo.callback(quietly, endpoint.maps.switch, 1 - slot)
            endpoint.maps.switch(slot)
        libbpf.wait_for_programs()
        undo.pop_all()
    for endpoint, slot in staged:
        try:
            endpoint.maps.release(1 - slot)
        except (OSError, VgwError, MemoryError) as error:
            _logger.warning(
                "%s %s: what was in force before stays until the next change: %s",
                vm,
                endpoint.interface,
                error,
            )
