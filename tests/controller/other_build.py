# SPDX-License-Identifier: Apache-2.0
"""Another build of vgw with the same tables: a copy of bpf/ in which a text is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vgw.loader import bpf_dir, cache

#: A change that no packet notices: UDP flows end up with the same state, by other instructions.
FILE = "conntrack.h"
OLD = "flow->packets[path & 1]++;"
NEW = "flow->packets[path & 1] += 1 + (flow->claim >> 63);"
#: A change that every packet notices: nothing is judged as it should be.
DEAF = ("pipeline.h", "if (config->mode == VGW_MODE_QUARANTINE) {", "if (config->generation) {")


def build(target: Path, file: str = FILE, old: str = OLD, new: str = NEW) -> Path:
    """Copy the sources of the programs to a directory and change a text that is there once."""
    shutil.copytree(bpf_dir(), target)
    text = (target / file).read_text()
    assert text.count(old) == 1
    (target / file).write_text(text.replace(old, new))
    return target


def use(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Have this process use the sources in a directory from now on."""
    monkeypatch.setattr(cache, "bpf_dir", lambda: directory)
