# SPDX-License-Identifier: Apache-2.0
"""Policy text: read as from disk, and what is valid compiled for its VMs."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.fuzz.inputs.bytes_mutator import replace_token
from tests.fuzz.inputs.target import WrongError, outline, quick_directory
from tests.policy.test_yaml_load import BOMB
from tests.policy.texts import interface, rule
from vgw.controller.inventory import read_policy
from vgw.errors import PolicyError, VgwError
from vgw.policy import parse, read_policies, read_vms
from vgw.policy.compile import compile_policy
from vgw.policy.resolve import effective_policy

_EXAMPLES: Final = Path(__file__).parents[3] / "examples"
#: What makes the rest of an input a file of its own.
_NEXT_FILE: Final = b"\n%%%file\n"
_MOST_FILES: Final = 4
_MOST_VMS: Final = 3
_HOSTILE: Final = (
    b"",
    b"\xff\xfe",
    b"schema: vgw/v1\nvms: " + b"[" * 50,
    BOMB[:2000].encode(),
    b"schema: vgw/v1\n" + _NEXT_FILE + b"schema: vgw/v1\nvms: {a: {}}\n",
    b"schema: vgw/v1\ngroups: {a: {groups: [b]}, b: {groups: [a]}}\n",
)
_VALUES: Final = (
    b"any", b"0.0.0.0/0", b"::/0", b"10.0.0.0/8", b"2001:db8::/32", b"tcp/80", b"tcp/1-65535",
    b"icmp/any", b"proto/47", b"52:54:00:00:00:11", b"true", b"false", b"~", b"{}", b"[]", b"[",
    b"{", b"- ", b": ", b", ", b"'", b'"', b"&a ", b"*a", b"!!str ", b"<<: ", b"|\n", b">\n", b"? ",
    b"\n", b"%YAML 1.1\n", b"---\n", b"learn", b"accept", b"drop", b"pass", b"30s", _NEXT_FILE,
)  # fmt: skip


class PolicyTarget:
    """Reads policies; keys come from the readers themselves, so new ones are tried too."""

    has_structure = True

    def __init__(self) -> None:
        keys = (vars(module) for module in (parse, read_policies, read_vms))
        texts = " ".join(repr(value) for each in keys for value in each.values())
        names = sorted(set(re.findall(r"'([a-z_]{2,24})'", texts)))
        self.words: Sequence[bytes] = (*_VALUES, *(f"{name}: ".encode() for name in names))
        self._directory = Path()

    def seeds(self) -> Sequence[bytes]:
        """Return the examples, small policies with everything in them, and hostile texts."""
        examples = [path.read_bytes() for path in sorted(_EXAMPLES.glob("*.yaml"))]
        small = [rule("from: [office], services: [http, ping]"), interface("vlans: [7]")]
        return [*examples, *(text.encode() for text in small), *_HOSTILE]

    def shape(self, chance: random.Random, data: bytes) -> bytes:
        """Return the input with another token, or a few, and mostly with a schema.

        It would not be read any further without that.
        """
        for _ in range(chance.choice((0, 1, 1, 2))):
            data = replace_token(chance, data, self.words)
        if chance.random() < 0.8 and not data.startswith(b"schema: vgw/v1\n"):
            return b"schema: vgw/v1\n" + data.replace(b"schema: vgw/v1", b"")
        return data

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a directory for the files of a policy."""
        with quick_directory() as directory:
            self._directory = directory
            yield

    def give(self, data: bytes) -> Hashable:
        """Read an input as the files of a policy, and compile what is valid."""
        for file in self._directory.iterdir():
            file.unlink()
        for number, part in enumerate(data.split(_NEXT_FILE)[:_MOST_FILES]):
            (self._directory / f"{number}.yaml").write_bytes(part)
        try:
            document = read_policy(self._directory)
        except PolicyError as error:
            lines = [str(problem) for problem in error.problems]
            if not lines or not all(line.isprintable() for line in lines):
                raise WrongError(f"problems that are no lines: {lines[:3]}") from error
            return frozenset(outline(problem.message) for problem in error.problems[:20])
        except VgwError as error:
            return outline(str(error))
        sizes = []
        for vm in [*document.vms][:_MOST_VMS]:
            try:
                images = compile_policy(effective_policy(document, vm))
            except VgwError as error:
                return outline(str(error))
            sizes.append(tuple(len(image.rules).bit_length() for image in images.values()))
        return (len(document.vms), len(document.groups), len(document.warnings), *sizes)
