# SPDX-License-Identifier: Apache-2.0
"""What the tests of the packet programs share: the programs, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vgw import loader


@pytest.fixture(scope="session")
def artefact(program_cache: Path) -> loader.Artefact:
    return loader.load_artefact(program_cache)
