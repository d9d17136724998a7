# SPDX-License-Identifier: Apache-2.0
"""State files that are whole and hold what no version of vgw wrote: none of it is used."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vgw.abi import Action
from vgw.abi import Path as PacketPath
from vgw.controller import manifest as manifests
from vgw.controller.manifest import (
    EndpointEntry,
    Manifest,
    PolicyEntry,
    load_manifest,
    save_manifest,
)
from vgw.controller.policy_store import PolicyStore
from vgw.controller.rule_counts import RuleCounts, load_counts, save_counts
from vgw.controller.state_file import read_state, write_state
from vgw.maps import RuleCount
from vgw.policy.model import Direction, EffectiveRule, Interface, Service, Tier

DIGEST = "ab" * 32


def changed(body: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    """Return a body with another value at a place such as `endpoints/tap1/endpoint`."""
    copied = copy.deepcopy(body)
    *way, last = place.split("/")
    inner: Any = copied
    for key in way:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copied


def rewrite(file: Path, place: str, value: object) -> None:
    """Change a place in a state file and give it a right checksum."""
    schema = json.loads(file.read_text())["schema"]
    body = read_state(file, schema)
    assert body is not None
    write_state(file, schema, changed(body, place, value))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    interface = Interface("tap1", mac="52:54:00:00:00:11", vlans=(7,))
    policy = PolicyEntry(dict.fromkeys(PacketPath, DIGEST), dict.fromkeys(PacketPath, 1))
    whole = Manifest(
        "web01", generation=7, endpoints={"tap1": EndpointEntry(1, interface)},
        extra=("tap9",), policies={7: policy},
    )  # fmt: skip
    file = tmp_path / "web01.json"
    save_manifest(file, whole)
    assert load_manifest(file) == whole
    return file


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("vm", 1),
        ("generation", "7"),
        ("generation", -1),
        ("generation", 1 << 64),
        ("generation", True),
        ("generation", {}),
        ("named", 1),
        ("extra", [1, "tap9"]),
        ("endpoints/tap1/endpoint", "1"),
        ("endpoints/tap1/interface/mac", "zz:54:00:00:00:11"),
        ("endpoints/tap1/interface/vlans", ["7"]),
        ("endpoints/tap1/interface/conntrack_max", "many"),
        ("endpoints/tap1/interface/guards", {"mac": "yes"}),
        ("policies/7/images/FROM_VM", []),
        ("policies/7/rules/FROM_VM", None),
        ("policies/7/staged", "no"),
    ],
)
def test_catalogue_N17_a_manifest_of_other_types_counts_as_lost(
    manifest: Path, place: str, value: object
) -> None:
    rewrite(manifest, place, value)
    assert load_manifest(manifest) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("carried/ingress~vm~p~r", ["1", 2, 3]),
        ("carried/ingress~vm~p~r", [1, 2]),
        ("carried/ingress~vm~p~r", [-1, 2, 3]),
        ("harvested/1", "6"),
        ("harvested", []),
    ],
)
def test_catalogue_N17_counts_of_other_types_count_as_none(
    tmp_path: Path, place: str, value: object
) -> None:
    file = tmp_path / "counts.json"
    counts = RuleCounts({"ingress~vm~p~r": RuleCount(1, 2, 3)}, {1: 6})
    save_counts(file, counts)
    assert load_counts(file) == counts
    rewrite(file, place, value)
    assert load_counts(file) == RuleCounts()


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("names", "name", [1]),
        ("names", "policies/0", ["ingress", "vm", {}]),
        ("names", "policy", [5]),
        ("matches", "service_sets/0/0", [[], [80, 80], None, None]),
        ("matches", "service_sets/0/0", [6, [80, 65536], None, None]),
        ("matches", "service_sets/0/0", [6, [81, 80], None, None]),
        ("matches", "service_sets/0/0", [256, [80, 80], None, None]),
        ("matches", "port_sets", [[["x", 1]]]),
    ],
)
def test_catalogue_N17_rules_that_are_none_count_as_lost(
    tmp_path: Path, file: str, place: str, value: object
) -> None:
    rules = (
        EffectiveRule(
            Direction.INGRESS, Tier.VM, "p", "r", Action.ACCEPT, services=(Service(6, (80, 80)),)
        ),
    )
    store = PolicyStore(tmp_path)
    store.keep_names(DIGEST, rules)
    store.keep_matches(DIGEST, rules)
    assert store.rules(DIGEST) == rules
    rewrite(tmp_path / DIGEST / f"{file}.json", place, value)
    assert store.rules(DIGEST) is None
    assert (store.labels(DIGEST) is None) is (file == "names")


def test_a_body_that_is_written_again_unchanged_is_whole(manifest: Path) -> None:
    """What makes the others lost is the change, not how it is made."""
    body = read_state(manifest, manifests.SCHEMA)
    assert body is not None
    rewrite(manifest, "generation", body["generation"])
    assert load_manifest(manifest) is not None
