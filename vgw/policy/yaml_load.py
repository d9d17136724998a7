# SPDX-License-Identifier: Apache-2.0
"""Reading YAML without trusting it: text in, a tree of nodes or problems out.

PyYAML's C parser delivers events; none of PyYAML's resolvers and constructors runs, so a scalar
never becomes anything but its text (`on`, `22:22`, `0o17` and an unquoted MAC address stay as they
are). Anchors, aliases, tags and further documents are refused; size, depth and number of values
are limited.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import yaml

from vgw.policy.report import Report
from vgw.policy.yaml_nodes import Broken, ListNode, MapNode, Node, Scalar, Source, show

if TYPE_CHECKING:
    from yaml._yaml import Mark as CMark
    from yaml.error import Mark

#: Limits of one file; that of values is of all files together. 50,000 rules in each direction are
#: about 25 million characters and 2,500,000 values if every rule uses every key; the tree of so
#: many takes half a gigabyte while it is read.
MAX_CHARACTERS: Final = 32 * 1024 * 1024
MAX_VALUES: Final = 3_000_000
MAX_DEPTH: Final = 16

_FORBIDDEN: Final = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
#: The parser's work grows with the square of the number of directives, so they never reach it.
_DIRECTIVE: Final = re.compile("(?:\\A|(?<=[\n\r\x85\u2028\u2029]))%")
_BYTE_ORDER_MARK: Final = 0xFEFF
_SURROGATES: Final = range(0xD800, 0xE000)
_EMPTY: Final = "the file is empty; a policy begins with `schema: vgw/v1`"


class _Refusal(Exception):  # noqa: N818  (not an error of the program: it ends reading one file)
    """The file cannot be read any further; line and column are 0 when there is no place."""

    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.column = column
        self.message = message


def load(source: Source, text: str, report: Report) -> MapNode | None:
    """Return the tree of one file, or None when it cannot be read as a mapping.

    Mistakes that leave the rest readable (duplicate keys, anchors, aliases, tags) are reported
    as well; a refused value is a Broken node.
    """
    try:
        _check_characters(text)
        root = _Builder(source, report).build(text)
    except _Refusal as refusal:
        report.add_at(source, refusal.line, refusal.column, refusal.message)
        report.unread_files = True
        return None
    report.roots[source] = root
    if isinstance(root, MapNode):
        return root
    if isinstance(root, Scalar) and root.is_null:
        report.add(root, _EMPTY)
    elif not isinstance(root, Broken):
        report.add(root, "a policy file is a mapping that begins with `schema: vgw/v1`")
    report.unread_files = True
    return None


def _check_characters(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        message = f"the file has {len(text)} characters; vgw reads at most {MAX_CHARACTERS}"
        raise _Refusal(0, 0, message)
    bad = _FORBIDDEN.search(text) or _DIRECTIVE.search(text)
    if bad is None:
        return
    start = bad.start()
    code = ord(bad.group())
    if code == ord("%"):
        message = "a line cannot begin with %; leave out YAML directives"
    elif code == _BYTE_ORDER_MARK:
        message = "a byte order mark is not allowed; save the file as UTF-8 without it"
    elif code in _SURROGATES:
        message = "the file is not valid UTF-8 here; save it as UTF-8"
    else:
        message = f"the character U+{code:04X} is not allowed in a policy file; remove it"
    line = text.count("\n", 0, start) + 1
    raise _Refusal(line, start - text.rfind("\n", 0, start), message)


@dataclass(slots=True, eq=False)
class _Open:
    """A collection that is being filled: the key that waits for its value, the lines of keys."""

    node: ListNode | MapNode
    key: Node | None = None
    lines: dict[str, int] = field(default_factory=dict)


class _Builder:
    """Builds the tree from the parser's events, without recursion."""

    def __init__(self, source: Source, report: Report) -> None:
        self._source = source
        self._report = report
        self._root: Node | None = None
        self._open: list[_Open] = []

    def build(self, text: str) -> Node:
        """Return the root of the only document."""
        try:
            for event in yaml.parse(text, Loader=yaml.CSafeLoader):
                if isinstance(event, yaml.NodeEvent):
                    self._add(event)
                elif isinstance(event, yaml.CollectionEndEvent):
                    self._open.pop()
                elif isinstance(event, yaml.DocumentStartEvent) and self._root is not None:
                    message = "a file holds one document; put the next one into its own file"
                    raise _Refusal(*_place(event.start_mark), message)
        except yaml.MarkedYAMLError as error:
            place = _place(error.problem_mark or error.context_mark)
            reason = " ".join(str(part) for part in (error.problem, error.context) if part)
            raise _Refusal(*place, f"not valid YAML: {reason}") from error
        except yaml.YAMLError as error:
            raise _Refusal(0, 0, f"not valid YAML: {' '.join(str(error).split())}") from error
        if self._root is None:
            raise _Refusal(1, 1, _EMPTY)
        return self._root

    def _add(self, event: yaml.NodeEvent) -> None:
        line, column = _place(event.start_mark)
        self._report.values += 1
        if self._report.values > MAX_VALUES:
            raise _Refusal(line, column, f"the policy has more than {MAX_VALUES} values")
        if isinstance(event, yaml.ScalarEvent):
            self._admit(event, Scalar(self._source, line, column, event.value, not event.style))
        elif isinstance(event, yaml.CollectionStartEvent):
            make = MapNode if isinstance(event, yaml.MappingStartEvent) else ListNode
            node = make(self._source, line, column)
            self._admit(event, node)
            if len(self._open) == MAX_DEPTH:
                raise _Refusal(line, column, f"values are nested more than {MAX_DEPTH} levels deep")
            self._open.append(_Open(node))
        else:
            self._admit(event, Broken(self._source, line, column))

    def _admit(self, event: yaml.NodeEvent, node: Node) -> None:
        mistake = _mistake(event)
        if mistake is not None:
            # A refused collection is filled all the same, apart from the tree.
            node = Broken(node.source, node.line, node.column)
            self._report.add(node, mistake)
        self._attach(node)

    def _attach(self, node: Node) -> None:
        if not self._open:
            self._root = node
            return
        parent = self._open[-1]
        if isinstance(parent.node, ListNode):
            parent.node.items.append(node)
        elif parent.key is None:
            self._check_key(parent, node)
            parent.key = node
        else:
            parent.node.entries.append((parent.key, node))
            parent.key = None

    def _check_key(self, parent: _Open, node: Node) -> None:
        if isinstance(node, Scalar):
            if node.text in parent.lines:
                first = f"it is already on line {parent.lines[node.text]}"
                self._report.add(node, f"duplicate key {show(node.text)}; {first}")
            else:
                parent.lines[node.text] = node.line
        elif not isinstance(node, Broken):
            self._report.add(node, "a key must be a text, not a list or a mapping")


def _place(mark: Mark | CMark | None) -> tuple[int, int]:
    """Return line and column of a mark of the parser, counted from 1; 0 without one."""
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)


def _mistake(event: yaml.NodeEvent) -> str | None:
    """Return why a value is refused whatever it is."""
    if isinstance(event, yaml.AliasEvent):
        return f"the alias {show('*' + str(event.anchor))} is not allowed; write the value out"
    if event.anchor is not None:
        return f"the anchor {show('&' + event.anchor)} is not allowed; write the value out"
    tag: str | None = getattr(event, "tag", None)
    if tag is not None:
        return f"the tag {show(tag)} is not allowed; write the value without it"
    return None
