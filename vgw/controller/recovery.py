# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a VM: found out anew when it is lost, put together, removed at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from vgw import abi
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.images import pinned_images
from vgw.controller.manifest import Manifest, PolicyEntry, load_manifest, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore
from vgw.controller.state_file import remove_state
from vgw.policy.model import EffectivePolicy

#: Modes from that which lets most through to that which lets nothing through.
STRICTNESS: Final = (abi.Mode.MONITOR, abi.Mode.ENFORCE, abi.Mode.QUARANTINE)


def recovered(paths: Paths, vm: str, opened: Sequence[OpenEndpoint]) -> Manifest:
    """Return what the kernel knows of a VM whose manifest is lost.

    The mode that it runs counts as ordered. Its policies are those whose images it has.
    """
    if not opened:
        return Manifest(vm)
    configs = [endpoint.maps.config() for endpoint in opened]
    return Manifest(
        vm,
        generation=max(config.generation for config in configs),
        mode_override=max((abi.Mode(config.mode) for config in configs), key=STRICTNESS.index),
        policies=_policies(paths, opened),
    )


def _policies(paths: Paths, opened: Iterable[OpenEndpoint]) -> dict[int, PolicyEntry]:
    digests = pinned_images(paths)
    found: dict[int, PolicyEntry] = {}
    for endpoint in opened:
        for slot in range(abi.CONFIG_SLOTS):
            images = {
                path: digests[map_id]
                for path, map_id in endpoint.maps.policy_ids(slot).items()
                if map_id in digests
            }
            if images:
                # Whether it needs the stages is lost too; those that it does not need do no harm.
                entry = PolicyEntry(images, {}, staged=True)
                found[endpoint.maps.config(slot).generation] = entry
    return found


def policy_of(manifest: Manifest, generation: int, store: PolicyStore) -> EffectivePolicy | None:
    """Return the policy that a VM had in a generation, None when it is lost.

    Rules that could match nothing are not in it.
    """
    entry = manifest.policies.get(generation)
    rules_of = manifest.in_generation(store.rules)
    ingress = rules_of(generation, abi.Path.TO_VM)
    egress = rules_of(generation, abi.Path.FROM_VM)
    if entry is None or entry.defaults is None or ingress is None or egress is None:
        return None
    return EffectivePolicy(manifest.vm, ingress, egress, entry.defaults)


def restore_manifest(file: Path, manifest: Manifest | None) -> None:
    """Have what was remembered in a file before a change, None: nothing. Raises VgwError."""
    if manifest is None:
        remove_state(file)
    else:
        save_manifest(file, manifest)


def forget(paths: Paths, manifest: Manifest) -> None:
    """Remove what is remembered of a VM without endpoints, but for what the user ordered."""
    remove_state(paths.counts(manifest.vm))
    remove_state(paths.flow_import(manifest.vm))
    left = dataclasses.replace(manifest.only(manifest.extra), policies={})
    if left.mode_override is None and not left.extra:
        remove_state(paths.manifest(manifest.vm))
    else:
        save_manifest(paths.manifest(manifest.vm), left)


def remove_unused_records(paths: Paths, store: PolicyStore) -> None:
    """Forget the rules of images that are neither pinned nor in a manifest.

    To be called when the images that are in use no more are unpinned.
    """
    unused = store.digests()
    unused.difference_update(pinned_images(paths).values() if unused else ())
    for file in paths.manifests.glob("*.json"):
        if not unused:
            return
        manifest = load_manifest(file)
        if manifest is not None:
            unused -= manifest.digests()
    for digest in unused:
        store.remove(digest)
