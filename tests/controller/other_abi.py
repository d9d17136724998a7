# SPDX-License-Identifier: Apache-2.0
"""Another version of vgw whose tables are of another ABI: a changed copy that runs by itself.

Fields are added, moved and given other neighbours, and members of enumerations other numbers, in
abi.h and abi.py alike; nothing else knows. `OtherVersion` is a process of that copy, which takes
over what is attached, or attaches, when it is told to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vgw import abi
from vgw.controller.paths import Paths

ROOT = Path(__file__).parents[2]
ABI = abi.ABI_VERSION + 1
#: Names of which each takes the other's number.
_SWAPPED = (("UDP_SINGLE", "UDP_REPLIED"), ("ARP", "RARP"))
#: Structure in abi.h and abi.py -> the field that moves to its beginning.
_MOVED = {"flow": "created_ns", "conntrack_meta": "created", "flow_key": "remote"}
#: Structures that get one more field at their beginning.
_LONGER = ("flow", "endpoint_config")
_RUN = """
import dataclasses, json, sys
from pathlib import Path
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.policy.parse import parse_sources
host = Host(Paths(**{name: Path(text) for name, text in json.loads(sys.argv[1]).items()}))
def attach(vm, text):
    host.attach(parse_sources([("policy.yaml", text)]), vm)
verbs = {
    "upgrade": lambda: dataclasses.asdict(host.upgrade()),
    "attach": attach,
    "status": lambda: host.status(),
    "detach": lambda vm: host.detach(vm),
}
for line in sys.stdin:
    verb, *arguments = json.loads(line)
    try:
        answer = {"result": verbs[verb](*arguments)}
    except VgwError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=str), flush=True)
"""


def copy(target: Path) -> Path:
    """Make a changed copy of the package and of the programs' sources in a new directory."""
    for name in ("vgw", "bpf"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    _edit(target / "bpf/abi.h", _changed_header)
    _edit(target / "vgw/abi.py", _changed_mirror)
    return target


def _edit(file: Path, change: Callable[[str], str]) -> None:
    text = file.read_text()
    changed = change(text)
    assert changed != text
    file.write_text(changed)


def _changed_header(text: str) -> str:
    text = _once(rf"(VGW_ABI_VERSION) {abi.ABI_VERSION}$", rf"\1 {ABI}", text)
    for structure, field in _MOVED.items():
        text = _once(
            rf"(struct {structure} {{\n)((?:.*\n)*?)(\t[^\n]* {field}(?:\[.*?\])?;.*\n)",
            r"\1\3\2",
            text,
        )
    for structure in _LONGER:
        text = _once(rf"(struct {structure} {{\n)", r"\1\t__u64 weight;\n", text)
    for one, other in _SWAPPED:
        text = _once(rf"X\({one}\)((?:.*\n)*?.*)X\({other}\)", rf"X({other})\1X({one})", text)
    return text


def _changed_mirror(text: str) -> str:
    text = _once(rf"(ABI_VERSION: Final) = {abi.ABI_VERSION}$", rf"\1 = {ABI}", text)
    for structure, field in _MOVED.items():
        fields = _fields_of(structure)
        text = _once(rf'({fields})((?:.*\n)*?)(        \("{field}".*\n)', r"\1\3\2", text)
    for structure in _LONGER:
        text = _once(rf"({_fields_of(structure)})", r'\1        ("weight", c_uint64),\n', text)
    for one, other in _SWAPPED:
        text = _once(
            rf"    {one} = (\d+)\n    {other} = (\d+)\n",
            rf"    {one} = \2\n    {other} = \1\n",
            text,
        )
    return text


def _fields_of(structure: str) -> str:
    name = "".join(part.capitalize() for part in structure.split("_"))
    return rf"class {name}\(ctypes.Structure\):\n(?:.*\n)*?    _fields_ = \[\n"


def _once(pattern: str, replacement: str, text: str) -> str:
    changed, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert count == 1, pattern
    return changed


class OtherVersion:
    """A process of the copy in a directory, in the network namespace of whoever made it."""

    def __init__(self, directory: Path, paths: Paths) -> None:
        places = json.dumps({name: str(path) for name, path in asdict(paths).items()})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, places],
            env={**os.environ, "PYTHONPATH": str(directory)},
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> OtherVersion:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(self, verb: str, *arguments: str) -> Any:
        """Return what a verb answers; AssertionError when it fails."""
        answer = self.ask(verb, *arguments)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def ask(self, verb: str, *arguments: str) -> dict[str, Any]:
        """Return {"result"} or {"error"} of a verb."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer
