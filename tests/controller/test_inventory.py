# SPDX-License-Identifier: Apache-2.0
"""The inventory of a host on disk, and that whoever needs a document gets it with its VMs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vgw.controller.inventory import read_document, read_host_document, read_inventory
from vgw.controller.paths import Paths
from vgw.errors import PolicyError, VgwError

POLICY = "schema: vgw/v1\nvms: {web01: {interfaces: [{name: tap1}]}}\n"
INVENTORY = "schema: vgw/v1\nvms: {db01: {interfaces: [{name: tap2}]}}\n"


@pytest.fixture
def places(tmp_path: Path) -> Paths:
    environ = {
        "VGW_POLICY": str(tmp_path / "policy.yaml"),
        "VGW_INVENTORY": str(tmp_path / "inventory.yaml"),
    }
    found = Paths.from_environment(environ)
    found.policy.write_text(POLICY)
    found.inventory.write_text(INVENTORY)
    return found


def test_policy_and_inventory_are_one_document(places: Paths) -> None:
    assert list(read_document(places).vms) == ["web01", "db01"]
    assert list(read_document(places, [("other", POLICY.replace("web01", "app"))]).vms) == [
        "app",
        "db01",
    ]


def test_without_a_policy_there_are_the_vms_of_the_inventory(places: Paths) -> None:
    assert list(read_host_document(places).vms) == ["web01", "db01"]
    places.policy.unlink()
    assert list(read_host_document(places).vms) == ["db01"]
    places.inventory.unlink()
    assert list(read_host_document(places).vms) == []


def test_a_host_needs_no_inventory(places: Paths) -> None:
    places.inventory.unlink()
    assert read_inventory(places) is None
    assert list(read_document(places).vms) == ["web01"]


def test_an_inventory_that_cannot_be_read_is_no_missing_one(places: Paths) -> None:
    places.inventory.unlink()
    places.inventory.mkdir()
    with pytest.raises(VgwError, match=r"inventory .* cannot be read: Is a directory"):
        read_document(places)


def test_an_inventory_of_other_bytes_is_refused(places: Paths) -> None:
    places.inventory.write_bytes(b"schema: vgw/v1\nvms: {\xff}\n")
    with pytest.raises(VgwError, match="line 2 is not UTF-8"):
        read_document(places)
    places.inventory.write_text("schema: vgw/v1\nvms: {web01: {}}\n")
    with pytest.raises(PolicyError, match=r"inventory\.yaml:2:7: .*defined twice"):
        read_document(places)
