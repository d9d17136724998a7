# SPDX-License-Identifier: Apache-2.0
"""Which policy is this host's now, for the controller: its file's, or one that is held.

A policy that was rolled back to holds until the text of the file is another than it was then; so
does one that was applied from elsewhere, but only over restarts, for a reload asks for the file.
While a policy waits to be confirmed the file is not looked at. A file that cannot be used changes
nothing: the policy in force, or after a start the last good one, goes on to be the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vgw.controller.admission import require_admission
from vgw.controller.history import Entry
from vgw.controller.inventory import InventoryUnreadableError, read_inventory
from vgw.controller.last_inventory import last_document
from vgw.controller.paths import Paths
from vgw.controller.policy_keeper import PolicyKeeper, holds
from vgw.controller.policy_source import Texts
from vgw.errors import PolicyError, VgwError
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import Sources, digest_of, parse_sources

#: The event of a load that no user asked for.
START: Final = "start"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of looking for the host's policy.

    `sources` are its texts where they are those of the file, to be remembered. `everywhere`: VMs
    that are attached get it too, not only those that come.
    """

    sources: Sources | None = None
    everywhere: bool = False


class HostPolicy:
    """The policy of this host; not for use from several threads at once."""

    def __init__(self, keeper: PolicyKeeper, paths: Paths) -> None:
        """Use what a keeper remembers, its source, and the inventory under `paths`."""
        self._keeper = keeper
        self._paths = paths
        self._seen: list[int] = []
        self.document: PolicyDocument | None = None
        #: Why the file cannot be used, None when it can.
        self.problem: str | None = None
        #: Whether the file or the inventory could not even be read, so that it is worth to try
        #: again by itself.
        self.is_unreadable = False
        #: Whether a load was left for when no policy waits to be confirmed.
        self.is_put_off = False

    def read_file(self) -> Texts | VgwError:
        """Return the texts of the file, or why there are none. Takes a limited time."""
        try:
            return self._keeper.source.read()
        except VgwError as error:
            return error

    def load(self, event: str, texts: Texts | VgwError) -> Loaded:
        """Find out what the policy is, with `texts` as `read_file` returned them.

        To be called after `refresh`. `event` is START or reload. `problem` says afterwards why the
        file was not used.
        """
        current = self._keeper.history.current()
        self.is_put_off = self._keeper.waiting() is not None
        if self.is_put_off:
            return Loaded()
        self.is_unreadable = isinstance(texts, VgwError)
        try:
            if isinstance(texts, VgwError):
                raise texts
            if current is not None and holds(current, digest_of(texts), at_start=event == START):
                _logger.info("policy %d is in force until the file changes", current.number)
                if self.document is not None:
                    self.document = self._made(
                        current.digest, lambda: self._keeper.history.sources(current)
                    )
                self.problem = None
                return Loaded(everywhere=self.document is not None)
            document = self._made(digest_of(texts), lambda: texts)
            require_admission(document, None if current is None else current.revision)
        except VgwError as error:
            self.problem = _on_one_line(error)
            self.is_unreadable |= isinstance(error, InventoryUnreadableError)
            return Loaded()
        self.problem, self.document = None, document
        return Loaded(texts, everywhere=True)

    def refresh(self) -> None:
        """Take over what other processes have made the host's policy meanwhile."""
        numbers = self._keeper.history.numbers()
        if numbers != self._seen:
            self._seen = numbers
            current = self._keeper.history.current()
            if current is not None:
                self._use(current)

    def may_be_back(self) -> bool:
        """Tell whether the file, which was there once, may be readable again."""
        return self.is_unreadable and self.document is not None and not self._keeper.source.hangs

    def _made(self, digest: str, texts: Callable[[], Texts]) -> PolicyDocument:
        """Return the document that texts of a digest make with the inventory as it is now."""
        inventory = read_inventory(self._paths)
        digests = digest, "" if inventory is None else digest_of([inventory])
        known = self.document
        if known is not None and (known.digest, known.inventory.digest) == digests:
            return known
        return parse_sources(texts(), inventory)

    def _use(self, entry: Entry) -> None:
        """Make the policy of an entry the host's, unless it is damaged."""
        if self.document is not None and self.document.digest == entry.digest:
            return
        try:
            self.document = last_document(self._paths, self._keeper.history.sources(entry))
        except VgwError as error:
            _logger.error("%s", error)


def _on_one_line(error: VgwError) -> str:
    if isinstance(error, PolicyError) and len(error.problems) > 1:
        return f"{error.problems[0]}; and {len(error.problems) - 1} more; see `vgw check`"
    return " ".join(str(error).splitlines())
