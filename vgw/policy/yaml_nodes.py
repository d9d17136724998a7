# SPDX-License-Identifier: Apache-2.0
"""A policy file as a tree of nodes that know where they stand in the text."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A file of the policy: its name and its place in the order of files."""

    name: str
    order: int


@dataclass(slots=True, eq=False)
class Node:
    """A value of a file and where it begins; line and column count from 1."""

    source: Source
    line: int
    column: int

    @property
    def position(self) -> tuple[int, int]:
        """Line and column, for comparing."""
        return self.line, self.column

    @property
    def place(self) -> str:
        """File and line, for messages about something else."""
        return f"{self.source.name}:{self.line}"


@dataclass(slots=True, eq=False)
class Scalar(Node):
    """A text exactly as written; `plain` tells an unquoted one."""

    text: str
    plain: bool

    @property
    def is_null(self) -> bool:
        """Whether YAML takes it for a null value."""
        return self.plain and self.text in _NULLS


@dataclass(slots=True, eq=False)
class ListNode(Node):
    """A sequence."""

    items: list[Node] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class MapNode(Node):
    """A mapping as written: a key that is repeated is in `entries` each time."""

    entries: list[tuple[Node, Node]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Broken(Node):
    """A node whose mistake is already reported; whoever reads the tree passes over it."""


def show(text: str) -> str:
    """Return a text of a file for use in a message: quoted, escaped and cut to 64 characters."""
    return ascii(text if len(text) <= 64 else text[:61] + "...")


def path_of(root: Node, node: Node) -> str:
    """Return the path of a node in its tree, as in `policies[0].ingress[2].from[0]`.

    The path of a key is that of its value; of the root, `document`. Nodes stand in the tree in the
    order of their positions, so each level takes one bisection.
    """
    path = ""
    current = root
    while current is not node:
        if isinstance(current, ListNode) and current.items:
            items = current.items
            index = bisect_right(items, node.position, key=lambda item: item.position) - 1
            path += f"[{index}]"
            current = items[index]
        elif isinstance(current, MapNode) and current.entries:
            entries = current.entries
            index = bisect_right(entries, node.position, key=lambda entry: entry[0].position) - 1
            key, value = entries[index]
            path += f".{_label(key)}"
            if key is node:
                break
            current = value
        else:
            break
    return path.removeprefix(".") or "document"


def _label(key: Node) -> str:
    if not isinstance(key, Scalar):
        return "?"
    return key.text if _BARE_KEY.fullmatch(key.text) else show(key.text)
