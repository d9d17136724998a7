# SPDX-License-Identifier: Apache-2.0
"""How much a policy may hold: no one who may write policies can make a host run out of memory.

Sizes of single things are limited where these are read: of a file (yaml_load.py), an interface
(read_vms.py), the rules and tables of a VM (compile.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vgw.errors import ExitCode, PolicyError, Problem, VgwError
from vgw.policy.draft import Draft

#: Files of one policy, and their characters.
MAX_FILES: Final = 1000
MAX_ALL_CHARACTERS: Final = 64 << 20
#: Definitions of each kind: a policy may be that of a whole cluster.
MAX_DEFINITIONS: Final = 20_000
MAX_INTERFACES: Final = 50_000
#: Addresses and allowed pairs of all interfaces.
MAX_INTERFACE_ADDRESSES: Final = 400_000
#: What groups and lists of peers come to, each with the members of the groups in it.
MAX_MEMBERS: Final = 5_000_000


class PolicyTooLargeError(VgwError):
    """A policy has more, or needs more memory, than there may be of something."""

    exit_code = ExitCode.POLICY_INVALID


def check_sources(sources: Sequence[tuple[str, str]]) -> None:
    """Raise PolicyError when there is too much text to read at all."""
    if len(sources) > MAX_FILES:
        name = sources[MAX_FILES][0]
        message = f"the policy has {len(sources)} files, the limit is {MAX_FILES}; merge some"
        raise PolicyError([Problem(name, 0, 0, "document", message)])
    total = 0
    for name, text in sources:
        total += len(text)
        if total > MAX_ALL_CHARACTERS:
            message = f"with this file the policy has more than {MAX_ALL_CHARACTERS} characters"
            raise PolicyError([Problem(name, 0, 0, "document", f"{message}; shorten it")])


def check_quotas(draft: Draft) -> None:
    """Report of what a policy has more than there may be, at the first that is too many."""
    for kind, places in draft.places.items():
        for node in list(places.values())[MAX_DEFINITIONS : MAX_DEFINITIONS + 1]:
            message = f"the policy has {len(places)} definitions like this {kind}"
            draft.report.add(node, f"{message}; the limit is {MAX_DEFINITIONS}")
    addresses = 0
    for number, place in enumerate(draft.interfaces):
        if number == MAX_INTERFACES:
            message = f"the policy has {len(draft.interfaces)} interfaces"
            draft.report.add(place.node, f"{message}; the limit is {MAX_INTERFACES}")
        before = addresses
        addresses += len(place.interface.addresses) + len(place.interface.allowed_pairs)
        if before <= MAX_INTERFACE_ADDRESSES < addresses:
            message = "up to here interfaces have more addresses and allowed pairs"
            limit = f"than {MAX_INTERFACE_ADDRESSES}, which is the limit"
            draft.report.add(place.node, f"{message} {limit}")


class Members:
    """Counts what the groups of one document come to, as they are asked for."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int, what: str) -> None:
        """Count the members of something. Raises PolicyTooLargeError when all are too many."""
        self._count += count
        if self._count > MAX_MEMBERS:
            raise PolicyTooLargeError(
                f"with {what} the groups of the policy come to more than {MAX_MEMBERS} addresses "
                "and networks, each group counted with those in it; use fewer or larger networks"
            )
