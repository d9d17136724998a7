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
from vgw.controller.last_inventory import last_document
from vgw.controller.manifest import load_manifest
from vgw.controller.overlay import Overlay
from vgw.controller.paths import Paths
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument


class LastKnown:
    """Finds the policy of each VM for one change of many; reads each policy once."""

    def __init__(self, paths: Paths, document: PolicyDocument, overlay: Overlay) -> None:
        """`document` is the policy that is asked for; `overlay` is laid over each that is used."""
        self._paths = paths
        self._overlay = overlay
        self.asked = overlay.laid(document)
        self._texts: Documents = History(paths).documents
        self._read: dict[str, PolicyDocument | None] = {}

    def document_of(self, vm: str) -> PolicyDocument | None:
        """Return the policy of a VM; None when the last that had it is lost.

        One that is only found is judged as any other that no file names any more.
        """
        if _has(self.asked, vm):
            return self.asked
        manifest = load_manifest(self._paths.manifest(vm))
        if manifest is None or not manifest.named:
            return self.asked
        found = self.document(manifest.policy)
        return found if found is not None and _has(found, vm) else None

    def document(self, digest: str) -> PolicyDocument | None:
        """Return a policy by its digest, with the overlay; None when it is lost."""
        if digest not in self._read:
            self._read[digest] = self._load(digest)
        return self._read[digest]

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
            document = last_document(self._paths, [("", text) for text in texts])
        except VgwError:  # written by a version that read another language
            return None
        return self._overlay.laid(document)


def _has(document: PolicyDocument, vm: str) -> bool:
    """Tell whether a file names a VM."""
    known = document.vms.get(vm)
    return known is not None and not known.found
