# SPDX-License-Identifier: Apache-2.0
"""What the tests of the fuzzer share: the programs, compiled once."""

from __future__ import annotations

import pytest

from vgw import loader


@pytest.fixture(scope="session")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> loader.Artefact:
    return loader.load_artefact(tmp_path_factory.mktemp("cache"))
