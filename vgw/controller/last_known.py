# SPDX-License-Identifier: Apache-2.0
"""By which policy a VM is judged: the given one, or the last that had it where that has not.

A VM that vanishes from the policy is more likely to have been lost on the way than to be meant to
have fewer rules, so it keeps what it has; `vgw detach` is how a VM is given up.
"""

from __future__ import annotations

import dataclasses

from vgw.controller.desired import Desired
from vgw.controller.documents import Documents
from vgw.controller.history import History
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources


class LastKnown:
    """Finds the policy of each VM for one change of many; reads each policy once."""

    def __init__(self, paths: Paths, document: PolicyDocument) -> None:
        """`document` is the policy that is asked for."""
        self._paths = paths
        self.asked = document
        self._texts: Documents = History(paths).documents
        self._read: dict[str, PolicyDocument | None] = {}

    def document_of(self, vm: str) -> PolicyDocument | None:
        """Return the policy of a VM; None when the last that had it is lost."""
        if vm in self.asked.vms:
            return self.asked
        manifest = load_manifest(self._paths.manifest(vm))
        if manifest is None or not manifest.named:
            return self.asked
        if manifest.policy not in self._read:
            self._read[manifest.policy] = self._load(manifest.policy)
        found = self._read[manifest.policy]
        return found if found is not None and vm in found.vms else None

    def keeping(self, desired: Desired, document: PolicyDocument) -> Desired:
        """Return what a VM shall have under what `document_of` returned.

        The interfaces of one that keeps its policy are remembered as if it was ordered by name, for
        no policy lists them: they are protected again when they come back.
        """
        if document is self.asked:
            return desired
        names = {*desired.extra, *desired.interfaces, *desired.missing}
        return dataclasses.replace(desired, kept=True, extra=tuple(sorted(names)))

    def _load(self, digest: str) -> PolicyDocument | None:
        texts = self._texts.texts(digest)
        if texts is None:
            return None
        try:
            return parse_sources([("", text) for text in texts])
        except VgwError:  # written by a version that read another language
            return None
