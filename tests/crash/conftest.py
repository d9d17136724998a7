# SPDX-License-Identifier: Apache-2.0
"""Worlds for the tests of changes that are killed or fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.world import World, world


@pytest.fixture
def a_world(tmp_path: Path, program_cache: Path) -> Iterator[World]:
    """A host with one VM on a TAP, under traffic."""
    with world(tmp_path, program_cache) as made:
        yield made


@pytest.fixture
def staged(
    request: pytest.FixtureRequest, tmp_path: Path, program_cache: Path
) -> Iterator[tuple[World, Scenario]]:
    """A scenario, by its name, and a world for it."""
    scenario = SCENARIOS[request.param]
    with ExitStack() as stack:
        made = world(tmp_path, program_cache, prefer_link=scenario.prefer_link)
        yield stack.enter_context(made), scenario
