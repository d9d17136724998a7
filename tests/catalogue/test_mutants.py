# SPDX-License-Identifier: Apache-2.0
"""The rows of each group of the catalogue notice builds of the programs that are wrong there."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.catalogue.ids import CATALOGUE
from tests.catalogue.mutants import MUTANTS, Mutant
from tests.catalogue.rows import rows_of_group
from tests.engine_pool import Engines
from vgw import loader
from vgw.loader import SourceTree, bpf_dir
from vgw.policy.model import Hook

FROM_VM = {Hook.XDP: "xdp_from_vm", Hook.TC: "tc_from_vm"}


def build(mutant: Mutant, directory: Path) -> loader.Artefact:
    """Compile the programs of a mutant from a changed copy of the sources."""
    programs = [FROM_VM[mutant.hook], "tc_to_vm"]
    flat = SourceTree(bpf_dir()).flatten(programs[0])
    assert flat.count(mutant.old) == 1, f"{mutant.file} does not have this text once: {mutant.old}"
    copy = directory / "bpf"
    shutil.copytree(bpf_dir(), copy)
    file = copy / mutant.file
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    return loader.load_artefact(directory / "cache", programs=programs, source=SourceTree(copy))


@pytest.mark.bpf
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.group}-{mutant.name}")
def test_a_wrong_build_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    engines = Engines(build(mutant, tmp_path), mutant.hook)
    try:
        played = engines.play(rows_of_group(mutant.group), until_different=True)
    finally:
        engines.close()
    assert played.differences, f"no row of group {mutant.group} notices that {mutant.name}"
    print(f"{mutant.group}: {mutant.name}: {played.differences[0]}")


def test_each_group_has_wrong_builds() -> None:
    counts = Counter(mutant.group for mutant in MUTANTS)
    assert set(counts) == {identity[0] for identity in CATALOGUE}
    assert min(counts.values()) >= 2


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not have this text once"):
        build(Mutant("A", "nothing", "cursor.h", "no such text", ""), tmp_path)
