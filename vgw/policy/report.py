# SPDX-License-Identifier: Apache-2.0
"""The problems found in a policy, gathered by node and turned into text at the end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vgw.errors import Problem
from vgw.policy.yaml_nodes import Node, Source, path_of, show

#: Problems that are listed; those beyond are counted.
MAX_PROBLEMS: Final = 1000
#: A near name is searched for only so often and among so many, because the search is slow.
_MAX_SUGGESTIONS: Final = 50
_MAX_CANDIDATES: Final = 2000


class Report:
    """Collects problems; `roots` holds the tree of each file, which gives the paths."""

    def __init__(self) -> None:
        self.roots: dict[Source, Node] = {}
        self.unread_files = False
        #: Values that were read, of all files.
        self.values = 0
        self._found: list[tuple[Source, int, int, Node | None, str]] = []
        self._dropped = 0
        self._suggestions = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, node: Node, message: str) -> None:
        """Add a problem with a node."""
        self._add(node.source, node.line, node.column, node, message)

    def add_at(self, source: Source, line: int, column: int, message: str) -> None:
        """Add a problem with a place in the text that is no node."""
        self._add(source, line, column, None, message)

    def _add(self, source: Source, line: int, column: int, node: Node | None, message: str) -> None:
        if len(self._found) < MAX_PROBLEMS:
            self._found.append((source, line, column, node, message))
        else:
            self._dropped += 1

    def suggestion(self, text: str, candidates: Collection[str]) -> str:
        """Return `; did you mean 'x'?` for the candidate nearest to a text, or nothing."""
        if len(candidates) > _MAX_CANDIDATES or self._suggestions >= _MAX_SUGGESTIONS:
            return ""
        # difflib is needed for wrong files only.
        from difflib import get_close_matches  # noqa: PLC0415

        self._suggestions += 1
        near = get_close_matches(text[:64], candidates, n=1)
        return f"; did you mean {show(near[0])}?" if near else ""

    def problems(self) -> list[Problem]:
        """Return the problems in the order of the files and of their positions there."""
        found = sorted(self._found, key=lambda entry: (entry[0].order, entry[1], entry[2]))
        problems = [
            Problem(source.name, line, column, self._path(source, node), message)
            for source, line, column, node, message in found
        ]
        if self._dropped:
            message = f"{self._dropped} more problem(s) are not listed; correct these first"
            problems.append(Problem(problems[-1].file, 0, 0, "document", message))
        return problems

    def _path(self, source: Source, node: Node | None) -> str:
        root = self.roots.get(source)
        return "document" if node is None or root is None else path_of(root, node)
