# SPDX-License-Identifier: Apache-2.0
"""The rows of each group of the catalogue notice builds of the programs that are wrong there."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.catalogue.ids import CATALOGUE
from tests.catalogue.mutant import Mutant
from tests.catalogue.mutants_of_flows import FLOW_MUTANTS
from tests.catalogue.mutants_of_packets import PACKET_MUTANTS
from tests.catalogue.rows import rows_of_group
from tests.engine_pool import Engines
from vgw import loader
from vgw.loader import SourceTree, bpf_dir
from vgw.loader.artefact import merge
from vgw.policy.model import Hook

MUTANTS = (*PACKET_MUTANTS, *FLOW_MUTANTS)


def build(mutant: Mutant, directory: Path) -> loader.Artefact:
    """Compile the program of a mutant from a changed copy of the sources."""
    copy = directory / "bpf"
    shutil.copytree(bpf_dir(), copy)
    file, tree = copy / mutant.file, SourceTree(copy)
    text = file.read_text()
    found = text.count(mutant.old), tree.flatten(mutant.program).count(mutant.old)
    assert found == (1, 1), f"{mutant.file} does not have this text once: {mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))
    return loader.load_artefact(directory / "cache", programs=[mutant.program], source=tree)


def chosen(request: pytest.FixtureRequest) -> list[Mutant]:
    """Return the mutants of the tests of this run."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    found = (call.params.get("mutant") for call in calls if call is not None)
    return [mutant for mutant in found if isinstance(mutant, Mutant)]


@pytest.fixture(scope="module")
def builds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Mutant, Future[loader.Artefact]]]:
    """The programs of all mutants, compiled on all CPUs while the first are played already."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            mutant: pool.submit(build, mutant, tmp_path_factory.mktemp("mutant"))
            for mutant in chosen(request)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.bpf
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.group}-{mutant.name}")
def test_a_wrong_build_is_noticed(
    artefact: loader.Artefact, builds: Mapping[Mutant, Future[loader.Artefact]], mutant: Mutant
) -> None:
    hook = Hook.TC if mutant.program == "tc_from_vm" else Hook.XDP
    engines = Engines(merge([artefact, builds[mutant].result()]), hook)
    try:
        played = engines.play(rows_of_group(mutant.group), until_different=True)
    finally:
        engines.close()
    assert played.differences, f"no row of group {mutant.group} notices that {mutant.name}"
    print(f"{mutant.group}: {mutant.name}: {played.differences[0]}")


#: Their packets are none: what is wrong there is tried in the tests of the controller.
CONTROL_GROUPS = {"M", "N"}


def test_each_group_has_wrong_builds() -> None:
    counts = Counter(mutant.group for mutant in MUTANTS)
    assert set(counts) == {identity[0] for identity in CATALOGUE} - CONTROL_GROUPS
    assert min(counts.values()) >= 2


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not have this text once"):
        build(Mutant("A", "nothing", "cursor.h", "no such text", ""), tmp_path)
