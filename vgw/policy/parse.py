# SPDX-License-Identifier: Apache-2.0
"""Policy text to PolicyDocument, or every mistake in it at once."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from vgw.errors import PolicyError, Problem
from vgw.policy.checks import check_draft, warn
from vgw.policy.draft import Draft
from vgw.policy.fields import Fields, Keys, read_entries
from vgw.policy.model import Defaults, PolicyDocument
from vgw.policy.quotas import check_quotas, check_sources
from vgw.policy.read_identity import read_host, read_revision
from vgw.policy.read_inventory import read_inventory
from vgw.policy.read_policies import read_defaults, read_policies, read_services
from vgw.policy.read_vms import read_groups, read_vms
from vgw.policy.report import Report
from vgw.policy.yaml_load import load
from vgw.policy.yaml_nodes import MapNode, Scalar, Source, show

#: Texts of a policy: (file name, YAML).
Sources = Sequence[tuple[str, str]]

SCHEMA: Final = "vgw/v1"
_KEYS: Final = Keys(
    "a policy file",
    ("schema", "revision", "host", "vms", "groups", "services", "policies", "defaults"),
    ("schema",),
)
#: Sections that can be given once in all files.
_SINGLE: Final = {"revision": read_revision, "host": read_host, "defaults": read_defaults}
_READERS: Final = {
    "vms": read_vms,
    "groups": read_groups,
    "services": read_services,
    "policies": read_policies,
}


def parse_sources(sources: Sources, inventory: tuple[str, str] | None = None) -> PolicyDocument:
    """Return the policy that files, given as (name, text), make together with a host's inventory.

    The order of files is the order of their policies within a tier. Raises PolicyError with all
    problems in the order of files and positions, those of the inventory last; nothing of a policy
    with a problem is used.
    """
    if not sources and inventory is None:
        message = "no policy file was found; a policy is a file or a directory of *.yaml"
        raise PolicyError([Problem("policy", 0, 0, "document", message)])
    check_sources(sources)
    check_sources([] if inventory is None else [inventory])
    with _collector_paused():
        return _parse(sources, inventory)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Do without garbage collection: it would walk a growing tree without cycles again and again.

    With a large policy that takes longer than all the rest.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse(sources: Sources, inventory: tuple[str, str] | None) -> PolicyDocument:
    draft = Draft(Report())
    for order, (name, text) in enumerate(sources):
        _read_policy(draft, Source(name, order), text)
    if inventory is not None:
        name, text = inventory
        _read_inventory(draft, Source(name, len(sources)), text)
    check_draft(draft)
    check_quotas(draft)
    if draft.report:
        raise PolicyError(draft.report.problems())
    document = PolicyDocument(
        vms=draft.vms,
        groups=draft.groups,
        services=draft.services,
        policies=tuple(draft.policies),
        defaults=draft.defaults or Defaults(),
        inventory=draft.inventory,
        digest=digest_of(sources),
        revision=draft.revision,
        hosts=draft.hosts,
    )
    return replace(document, warnings=tuple(warn(draft, document).problems()))


def _read_policy(draft: Draft, source: Source, text: str) -> None:
    root = _read_root(draft, source, text)
    if root is None:
        return
    found = Fields(draft.report, root, _KEYS)
    for section, read in _READERS.items():
        node = found.value(section)
        if node is not None:
            read(draft, node)
    for section, read_single in _SINGLE.items():
        node = found.value(section)
        if node is not None:
            read_single(draft, found.key(section), node)


def _read_inventory(draft: Draft, source: Source, text: str) -> None:
    root = _read_root(draft, source, text)
    if root is not None:
        read_inventory(draft, root)
        draft.inventory = replace(draft.inventory, digest=digest_of([(source.name, text)]))


def _read_root(draft: Draft, source: Source, text: str) -> MapNode | None:
    """Return the mapping that a file of this schema is, None when it is something else."""
    root = load(source, text, draft.report)
    if root is None:
        return None
    for key, value in read_entries(draft.report, root):
        if key.text == "schema" and not (isinstance(value, Scalar) and value.text == SCHEMA):
            # The keys of another schema are not judged by this one.
            given = show(value.text) if isinstance(value, Scalar) else "not a text"
            message = (
                f"the schema is {given}; this version of vgw reads only {SCHEMA}, so the rest of "
                "the file was not checked"
            )
            draft.report.add(value, message)
            draft.report.unread_files = True
            return None
    return root


def digest_of(sources: Sources) -> str:
    """Return the SHA-256 of the texts; names do not count, but where each text ends does."""
    digest = hashlib.sha256()
    for _, text in sources:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
