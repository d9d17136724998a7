# SPDX-License-Identifier: Apache-2.0
"""Reading mappings, lists and scalars of the tree with every mistake reported where it stands.

Nothing here raises: what is wrong is reported and its place taken by a default, so that one run
finds all mistakes. A document with any problem is refused as a whole, so defaults never count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vgw.policy.report import Report
from vgw.policy.yaml_nodes import Broken, ListNode, MapNode, Node, Scalar, show

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a kind of mapping has; `hints` answers keys that people try."""

    what: str
    allowed: Sequence[str]
    required: Sequence[str] = ()
    hints: Mapping[str, str] = field(default_factory=dict)


def read_scalar(report: Report, node: Node, convert: Callable[[str], T]) -> T | None:
    """Return the converted text of a scalar, or None when it is not one or is wrong."""
    if isinstance(node, Scalar):
        if node.is_null:
            report.add(node, _null_message(node))
            return None
        try:
            return convert(node.text)
        except ValueError as error:
            report.add(node, str(error))
    elif not isinstance(node, Broken):
        kind = "a list" if isinstance(node, ListNode) else "a mapping"
        report.add(node, f"a single value is expected here, not {kind}")
    return None


def read_list(report: Report, node: Node) -> Sequence[Node]:
    """Return the items of a list, none when it is not one."""
    if isinstance(node, ListNode):
        return node.items
    _report_kind(report, node, "a list")
    return ()


def read_entries(report: Report, node: Node) -> Iterator[tuple[Scalar, Node]]:
    """Iterate over the entries of a mapping with free keys; repeated keys only once."""
    if not isinstance(node, MapNode):
        _report_kind(report, node, "a mapping")
        return
    seen: set[str] = set()
    for key, value in node.entries:
        if isinstance(key, Scalar) and key.text not in seen:
            seen.add(key.text)
            yield key, value


def _report_kind(report: Report, node: Node, expected: str) -> None:
    if isinstance(node, Scalar):
        if node.is_null:
            report.add(node, _null_message(node))
        else:
            report.add(node, f"{expected} is expected here, not {show(node.text)}")
    elif isinstance(node, ListNode):
        report.add(node, f"{expected} is expected here, not a list")
    elif isinstance(node, MapNode):
        report.add(node, f"{expected} is expected here, not a mapping")


def _null_message(node: Scalar) -> str:
    if node.text:
        return f"{show(node.text)} is a null value; write a value or leave the key out"
    return "the value is missing; write one or leave the key out"


class Fields:
    """The values of one mapping with fixed keys.

    Making it reports unknown and missing keys; each method reads one key and reports its mistakes.
    """

    def __init__(self, report: Report, node: Node, keys: Keys) -> None:
        self.node = node
        self._report = report
        self._entries: dict[str, tuple[Scalar, Node]] = {}
        self.is_mapping = isinstance(node, MapNode)
        for entry in read_entries(report, node):
            text = entry[0].text
            self._entries[text] = entry
            if text not in keys.allowed:
                report.add(entry[0], _unknown(report, text, keys))
        if self.is_mapping:
            for name in keys.required:
                if name not in self._entries:
                    report.add(node, f"{keys.what} needs the key `{name}`")

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def key(self, key: str) -> Node:
        """Return the node of a key, that of the mapping when it has no such key."""
        return self._entries[key][0] if key in self._entries else self.node

    def value(self, key: str) -> Node | None:
        """Return the node of a key's value."""
        return self._entries[key][1] if key in self._entries else None

    def scalar(self, key: str, convert: Callable[[str], T], default: T) -> T:
        """Return a converted scalar, `default` when it is absent or wrong."""
        node = self.value(key)
        if node is None:
            return default
        value = read_scalar(self._report, node, convert)
        return default if value is None else value

    def items(self, key: str) -> Sequence[Node]:
        """Return the items of a list, none when it is absent or wrong."""
        node = self.value(key)
        return () if node is None else read_list(self._report, node)

    def scalars(
        self, key: str, convert: Callable[[str], T], *, if_empty: str = ""
    ) -> list[tuple[Node, T]]:
        """Return the converted scalars of a list with their nodes, without those that are wrong.

        `if_empty` says why an empty list is a mistake; without it an empty list is none.
        """
        found: list[tuple[Node, T]] = []
        whole = self.value(key)
        if whole is None:
            return found
        for node in read_list(self._report, whole):
            value = read_scalar(self._report, node, convert)
            if value is not None:
                found.append((node, value))
        if if_empty and isinstance(whole, ListNode) and not whole.items:
            self._report.add(whole, f"the list is empty; {if_empty}")
        return found

    def unique(self, key: str, convert: Callable[[str], T]) -> tuple[T, ...]:
        """Return the converted scalars of a list in which none may be repeated."""
        seen: dict[T, Node] = {}
        for node, value in self.scalars(key, convert):
            if value in seen:
                self._report.add(node, f"{value} is in this list already")
            seen[value] = node
        return tuple(seen)


def _unknown(report: Report, key: str, keys: Keys) -> str:
    if key in keys.hints:
        return keys.hints[key]
    if key == "<<":
        return "merge keys are not supported; write the keys out"
    allowed = ", ".join(keys.allowed)
    near = report.suggestion(key, keys.allowed)
    return f"unknown key {show(key)} of {keys.what}; allowed: {allowed}{near}"
