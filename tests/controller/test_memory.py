# SPDX-License-Identifier: Apache-2.0
"""What vgw remembers on disk: ids of rules, policies in force, names for events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from pathlib import Path

import pytest

from tests.controller.policies import document
from vgw.abi import Action, Mode, RuleCounter
from vgw.controller.event_names import EventNames
from vgw.controller.inventory import read_policy, read_sources
from vgw.controller.manifest import EndpointEntry, Manifest, load_manifest, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import load_policy, save_policy
from vgw.errors import PolicyError, VgwError
from vgw.policy.model import (
    AllowedPair,
    Defaults,
    Direction,
    EffectivePolicy,
    EffectiveRule,
    Guards,
    Hook,
    Interface,
    Service,
    Tier,
)
from vgw.policy.resolve import effective_policy

INTERFACE = Interface(
    name="tap0",
    mac="52:54:00:00:00:11",
    addresses=(IPv4Address("10.0.0.1"), IPv6Address("2001:db8::1")),
    allowed_pairs=(AllowedPair(IPv6Network("2001:db8:1::/64"), "00:00:5e:00:01:01"),),
    vlans=(5, 7),
    guards=Guards(ra=False),
    conntrack_max=4096,
    hook=Hook.XDP,
)


def rule(name: str, **more: object) -> EffectiveRule:
    plain = EffectiveRule(Direction.INGRESS, Tier.VM, "base", name, Action.ACCEPT)
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def full_manifest() -> Manifest:
    manifest = Manifest(
        vm="web01",
        generation=7,
        mode=Mode.MONITOR,
        mode_override=Mode.QUARANTINE,
        policy="abc",
        named=True,
        endpoints={"tap0": EndpointEntry(1 << 61, INTERFACE, "image", Hook.TC)},
        extra=("tap1",),
        carried={3: (1, 2, 3)},
    )
    return manifest.with_rules([rule("a"), rule("b", log=True)])


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "vms" / "web01.json"

    save_manifest(file, full_manifest())

    assert load_manifest(file) == full_manifest()
    assert [entry.name for entry in file.parent.iterdir()] == ["web01.json"]
    assert file.stat().st_mode & 0o777 == 0o600


def truncate(text: str) -> str:
    return text[: len(text) // 2]


def flip(text: str) -> str:
    return text.replace('"generation":7', '"generation":8')


def other_schema(text: str) -> str:
    return text.replace("vgw/manifest/v1", "vgw/manifest/v9")


@pytest.mark.parametrize("damage", [truncate, flip, other_schema, lambda _: "", lambda _: "[]"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: Callable[[str], str]) -> None:
    file = tmp_path / "web01.json"
    save_manifest(file, full_manifest())
    file.write_text(damage(file.read_text()))

    assert load_manifest(file) is None
    assert load_manifest(tmp_path / "nope.json") is None


def test_a_file_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "vms").write_text("in the way")

    with pytest.raises(VgwError, match=r"cannot write .*web01.json: .*VGW_STATE_DIR"):
        save_manifest(tmp_path / "vms" / "web01.json", full_manifest())


def test_a_rule_keeps_its_id_and_no_id_is_used_twice() -> None:
    first = Manifest("web01").with_rules([rule("a"), rule("b")])
    second = first.with_rules([rule("b"), rule("c")])
    third = second.with_rules([rule("a"), rule("d")])

    assert first.rule_ids() == {"ingress/vm/base/a": 0, "ingress/vm/base/b": 1}
    assert second.rules["ingress/vm/base/b"].id == 1
    assert second.rules["ingress/vm/base/c"].id == 2
    assert not second.rules["ingress/vm/base/a"].current
    assert third.rules["ingress/vm/base/a"].id == 0
    assert third.rules["ingress/vm/base/a"].current
    assert third.rules["ingress/vm/base/d"].id == 3
    assert third.next_rule_id == 4


def test_names_of_rules_that_are_gone_do_not_grow_without_end() -> None:
    manifest = Manifest("web01")
    for number in range(0, 4000, 100):
        manifest = manifest.with_rules([rule(f"r{number + n}") for n in range(100)])

    assert manifest.next_rule_id == 4000
    assert len(manifest.rules) == 1024 + 100
    assert manifest.rules["ingress/vm/base/r3999"].id == 3999


def test_final_counts_are_added_up() -> None:
    final = b"".join(
        bytes(RuleCounter(packets=n, bytes=10 * n, last_hit_ns=100 + n)) for n in range(3)
    )

    carried = Manifest("web01").carrying(final).carrying(final).carried

    assert carried == {1: (2, 20, 101), 2: (4, 40, 102)}


def test_a_policy_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "policies" / "web01.json"
    policy = EffectivePolicy(
        vm="web01",
        ingress=(
            rule("a", peers=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")), log=True),
            rule("b", peers=(), services=(Service(6, (80, 81)), Service(1, None, 8, 0))),
            rule("c", local=(ip_network("10.1.1.1/32"),), source_ports=((1, 2), (5, 5))),
        ),
        egress=(rule("d", direction=Direction.EGRESS, action=Action.PASS, tier=Tier.ADMIN),),
        defaults=Defaults(Action.REJECT, Action.DROP, True),
    )

    save_policy(file, policy, 5)

    assert load_policy(file, 5) == policy
    assert load_policy(file, 6) is None
    file.write_text(file.read_text()[:-10])
    assert load_policy(file, 5) is None


def test_a_policy_of_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    effective = effective_policy(document(), "web01")

    save_policy(tmp_path / "p.json", effective, 1)
    loaded = load_policy(tmp_path / "p.json", 1)

    assert loaded is not None
    # Where a rule was written is not kept: only what it means.
    assert loaded.ingress == tuple(
        dataclasses.replace(each, file="", line=0) for each in effective.ingress
    )


@pytest.fixture
def places(tmp_path: Path) -> Paths:
    return Paths.from_environment({}, state_dir=tmp_path)


def test_names_are_looked_up_again_when_one_is_unknown(places: Paths) -> None:
    names = EventNames(places)
    assert names.endpoint(1 << 61) is None

    save_manifest(places.manifest("web01"), full_manifest())

    assert names.endpoint(1 << 61) == ("web01", "tap0")
    assert names.rule(1 << 61, 1) == ("base", "vm", "b")
    assert names.rule(1 << 61, 9) is None


def test_names_survive_a_damaged_neighbour(places: Paths) -> None:
    save_manifest(places.manifest("web01"), full_manifest())
    places.manifest("web02").write_text(json.dumps({"schema": "other"}))

    assert EventNames(places).endpoint(1 << 61) == ("web01", "tap0")


def test_a_policy_directory_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("schema: vgw/v1\nvms: {two: {}}\n")
    (tmp_path / "a.yaml").write_text("schema: vgw/v1\nvms: {one: {}}\n")
    (tmp_path / "notes.txt").write_text("not a policy")

    assert [Path(name).name for name, _ in read_sources(tmp_path)] == ["a.yaml", "b.yaml"]
    assert set(read_policy(tmp_path).vms) == {"one", "two"}


def test_a_policy_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match=r"policy .*nope.yaml cannot be read: No such file"):
        read_policy(tmp_path / "nope.yaml")
    with pytest.raises(VgwError, match=r"has no \*.yaml files"):
        read_policy(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"schema: vgw/v1\n# \xff\n")
    with pytest.raises(VgwError, match="line 2 is not UTF-8"):
        read_policy(tmp_path)
    (tmp_path / "x.yaml").write_text("schema: vgw/v1\nnonsense: 1\n")
    with pytest.raises(PolicyError, match=r"x\.yaml:2:1"):
        read_policy(tmp_path)
