# SPDX-License-Identifier: Apache-2.0
"""What the README tells users to type and to write is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vgw.cli import cli
from vgw.policy.parse import parse_sources

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_come_first() -> None:
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["scripts/netns-lab.sh demo", "scripts/test.sh"]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_policies_are_valid(text: str) -> None:
    source = ("README.md", text)
    is_inventory = "\nfind:" in text
    document = parse_sources((), source) if is_inventory else parse_sources([source])
    assert document.vms
    assert not document.warnings


def test_commands_exist() -> None:
    code = "\n".join(blocks("sh")) + "\n".join(re.findall(r"`(vgw [^`]*)`", README))
    used = set(re.findall(r"\bvgw ([a-z]+)", code))
    shown = {name for name, command in cli.commands.items() if not command.hidden}
    assert used == shown | {"conntrack"}


def test_files_exist() -> None:
    named = set(re.findall(r"(?<![\w/])(?:scripts|bpf|examples|tests)/[\w./-]*", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
