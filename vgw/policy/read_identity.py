# SPDX-License-Identifier: Apache-2.0
"""What a policy file says of the policy itself: its `revision`, and the `host` that it is for."""

from __future__ import annotations

import re
from typing import Final

from vgw.policy.draft import Draft
from vgw.policy.fields import read_list, read_scalar
from vgw.policy.yaml_nodes import ListNode, Node, show

_REVISION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def read_revision(draft: Draft, key: Node, node: Node) -> None:
    """Read the `revision` of the policy into the draft; `key` is where it begins."""
    draft.define_once("revision", key)
    draft.revision = read_scalar(draft.report, node, _revision)


def read_host(draft: Draft, key: Node, node: Node) -> None:
    """Read the name or list of names of `host` into the draft, in lower case."""
    draft.define_once("host", key)
    items = read_list(draft.report, node) if isinstance(node, ListNode) else [node]
    if not items:
        draft.report.add(node, "the list is empty; leave `host` out for a policy of every host")
    found = (read_scalar(draft.report, item, _host) for item in items)
    draft.hosts = tuple(name for name in found if name is not None)


def _revision(text: str) -> int:
    if not _REVISION.fullmatch(text):
        raise ValueError(f"{show(text)} is not a revision; write a whole number of up to 18 digits")
    return int(text)


def _host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError(f"{show(text)} is not a name of a host; write what `hostname` prints")
    return text.lower()
