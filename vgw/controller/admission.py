# SPDX-License-Identifier: Apache-2.0
"""Which policies this host takes: none that is for another host, none older than the one in force.

A policy can say both itself, by the keys `host` and `revision`.
"""

from __future__ import annotations

import socket

from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument


class NotAdmittedError(VgwError):
    """A valid policy that is not for this host, or not for now."""


def require_admission(
    document: PolicyDocument, revision: int | None, *, host: str | None = None
) -> None:
    """Raise NotAdmittedError unless a policy may follow one of a revision (None: it has none).

    A policy without a revision does not follow one that has one: whoever leaves the key out could
    bring back any older policy. `host` is the name of this host, None: as the kernel has it.
    """
    name = (host or socket.gethostname()).lower()
    if document.hosts and name not in document.hosts and _short(name) not in document.hosts:
        wanted = ", ".join(document.hosts)
        raise NotAdmittedError(
            f"the policy is for host {wanted} and this is {name}; apply it there, correct its "
            "`host`, or use --force"
        )
    if revision is None:
        return
    if document.revision is None:
        raise NotAdmittedError(
            f"the policy has no `revision` and the one in force has {revision}; give it a higher "
            "one, or use --force"
        )
    if document.revision < revision:
        raise NotAdmittedError(
            f"the policy is revision {document.revision} and {revision} is in force; give it a "
            "higher one, use --force, or `vgw rollback`"
        )


def _short(name: str) -> str:
    return name.partition(".")[0]
