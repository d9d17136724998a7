# SPDX-License-Identifier: Apache-2.0
"""What vgw remembers on disk: manifests, rules of policies, what they had counted."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from pathlib import Path

import pytest

from tests.controller.policies import document
from vgw.abi import Action, Mode
from vgw.abi import Path as PacketPath
from vgw.controller import manifest as manifests
from vgw.controller.event_names import EventNames
from vgw.controller.inventory import read_document
from vgw.controller.manifest import (
    EndpointEntry,
    Manifest,
    PolicyEntry,
    load_manifest,
    save_manifest,
)
from vgw.controller.paths import Paths
from vgw.controller.policy_files import read_sources
from vgw.controller.policy_store import PolicyStore, labels_of_rules
from vgw.controller.rule_counts import RuleCounts, load_counts, save_counts
from vgw.errors import PolicyError, VgwError
from vgw.maps import RuleCount
from vgw.policy.model import (
    AllowedPair,
    Defaults,
    Direction,
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
    return Manifest(
        vm="web01",
        generation=7,
        mode=Mode.MONITOR,
        mode_override=Mode.QUARANTINE,
        policy="abc",
        named=True,
        endpoints={"tap0": EndpointEntry(1 << 61, INTERFACE, Hook.TC)},
        extra=("tap1",),
        policies={
            6: policy_entry("old"),
            7: policy_entry("new", Defaults(Action.REJECT, log=True)),
        },
    )


def policy_entry(digest: str, defaults: Defaults | None = None) -> PolicyEntry:
    return PolicyEntry(
        {PacketPath.TO_VM: digest, PacketPath.FROM_VM: "both"},
        {PacketPath.TO_VM: 3},
        True,
        defaults,
    )


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
    return text.replace("vgw/manifest/v2", "vgw/manifest/v9")


@pytest.mark.parametrize("damage", [truncate, flip, other_schema, lambda _: "", lambda _: "[]"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: Callable[[str], str]) -> None:
    file = tmp_path / "web01.json"
    save_manifest(file, full_manifest())
    file.write_text(damage(file.read_text()))

    assert load_manifest(file) is None
    assert load_manifest(tmp_path / "nope.json") is None


def long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all files that were written by now been written long ago."""
    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)


def test_a_manifest_that_is_the_same_still_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "web01.json"
    save_manifest(file, full_manifest())
    long_ago(monkeypatch)
    before = load_manifest(file)
    with monkeypatch.context() as patched:
        patched.delattr(manifests, "read_state")
        assert load_manifest(file) is before
    file.unlink()
    assert load_manifest(file) is None
    save_manifest(file, full_manifest())
    assert load_manifest(file) is not before


def test_a_manifest_that_was_written_again_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "web01.json"
    save_manifest(file, full_manifest())
    long_ago(monkeypatch)
    assert load_manifest(file) == full_manifest()
    other = dataclasses.replace(full_manifest(), generation=8)  # a file of the same size
    save_manifest(file, other)
    assert load_manifest(file) == other
    file.write_text(file.read_text().replace('"generation":8', '"generation":9'))
    assert load_manifest(file) is None


def test_a_manifest_that_was_just_written_is_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "web01.json"
    save_manifest(file, full_manifest())
    status = os.stat(file)  # noqa: PTH116 - as it is asked for
    assert load_manifest(file) == full_manifest()
    file.write_text(flip(file.read_text()))
    # Of the same size, and in the same tick of the file's clock: nothing tells them apart.
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda _: status)
        after = load_manifest(file)
    assert after is None


def test_a_file_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "vms").write_text("in the way")

    with pytest.raises(VgwError, match=r"cannot write .*web01.json: .*VGW_STATE_DIR"):
        save_manifest(tmp_path / "vms" / "web01.json", full_manifest())


def test_what_a_manifest_refers_to() -> None:
    manifest = full_manifest()
    assert manifest.digests() == {"old", "new", "both"}
    assert manifest.current() == manifest.policies[7]
    assert manifest.digest(6, PacketPath.TO_VM) == "old"
    assert manifest.digest(5, PacketPath.TO_VM) is None
    read = manifest.in_generation({"new": 1}.get)
    assert [read(number, PacketPath.TO_VM) for number in (5, 6, 7)] == [None, None, 1]


RULES = (
    rule("a", peers=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")), log=True),
    rule("b", peers=(), services=(Service(6, (80, 81)), Service(1, None, 8, 0))),
    rule("c", local=(ip_network("10.1.1.1/32"),), source_ports=((1, 2), (5, 5))),
    rule("d", action=Action.PASS, tier=Tier.ADMIN, policy="other"),
    rule("e", peers=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))),
)


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    return PolicyStore(tmp_path / "policies")


def test_rules_are_read_as_they_were_written(store: PolicyStore, tmp_path: Path) -> None:
    store.keep_names("one", RULES)
    assert store.labels("one") == labels_of_rules(RULES)
    assert store.rules("one") is None
    store.keep_matches("one", RULES)
    assert store.rules("one") == RULES
    assert [label.key for label in labels_of_rules(RULES)] == [each.key for each in RULES]
    assert store.labels("two") is None
    assert store.digests() == {"one"}
    store.remove("one")
    assert not (tmp_path / "policies").exists()


def test_rules_of_a_document_are_read_as_they_were_written(store: PolicyStore) -> None:
    effective = effective_policy(document(), "web01")

    store.keep_names("x", effective.ingress)
    store.keep_matches("x", effective.ingress)

    # Where a rule was written is not kept: only what it means.
    assert store.rules("x") == tuple(
        dataclasses.replace(each, file="", line=0) for each in effective.ingress
    )


@pytest.mark.parametrize("file", ["names.json", "matches.json"])
def test_damaged_rules_count_as_lost(store: PolicyStore, tmp_path: Path, file: str) -> None:
    store.keep_names("one", RULES)
    store.keep_matches("one", RULES)
    path = tmp_path / "policies" / "one" / file
    path.write_text(path.read_text()[:-10])

    assert store.rules("one") is None
    assert (store.labels("one") is None) == (file == "names.json")


def test_what_many_rules_share_is_kept_once(store: PolicyStore, tmp_path: Path) -> None:
    group = tuple(ip_network(f"10.{n}.0.0/16") for n in range(200))
    for name, count in (("few", 10), ("many", 1000)):
        copies = [rule(f"r{n}", peers=tuple(group)) for n in range(count)]
        store.keep_matches(name, copies)
    few, many = (
        (tmp_path / "policies" / name / "matches.json").stat().st_size for name in ("few", "many")
    )
    assert many - few < 990 * 20


def test_rules_that_are_there_are_not_written_again(store: PolicyStore, tmp_path: Path) -> None:
    for _ in range(2):
        store.keep_names("one", RULES)
        stamp = (tmp_path / "policies" / "one" / "names.json").stat().st_ino
    store.keep_names("one", RULES)
    assert (tmp_path / "policies" / "one" / "names.json").stat().st_ino == stamp


@pytest.mark.parametrize("file", ["names.json", "matches.json"])
def test_damaged_rules_are_written_anew(store: PolicyStore, tmp_path: Path, file: str) -> None:
    store.keep_names("one", RULES)
    store.keep_matches("one", RULES)
    path = tmp_path / "policies" / "one" / file
    path.write_text(path.read_text().replace("ingress", "egress")[:-1])
    store.keep_names("one", RULES)
    store.keep_matches("one", RULES)
    assert store.rules("one") is None  # what was whole a moment ago is not looked at again

    later = PolicyStore(tmp_path / "policies")
    later.keep_names("one", RULES)
    later.keep_matches("one", RULES)

    assert later.rules("one") == RULES


def test_counts_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "counts" / "web01.json"
    counts = RuleCounts({"a": RuleCount(1, 60, 9), "b": RuleCount(2, 120, 8)}, {7: 3, 8: 1})
    assert load_counts(file) == RuleCounts()
    save_counts(file, counts)
    assert load_counts(file) == counts
    assert counts.only({"a"}, {8}) == RuleCounts({"a": RuleCount(1, 60, 9)}, {8: 1})
    file.write_text(file.read_text().replace("60", "61"))
    assert load_counts(file) == RuleCounts()


@pytest.fixture
def places(tmp_path: Path) -> Paths:
    return Paths.from_environment({}, state_dir=tmp_path)


def test_names_are_looked_up_again_when_one_is_unknown(places: Paths) -> None:
    names = EventNames(places)
    assert names.endpoint(1 << 61) is None

    save_manifest(places.manifest("web01"), full_manifest())

    assert names.endpoint(1 << 61) == ("web01", "tap0")


def test_names_survive_a_damaged_neighbour(places: Paths) -> None:
    save_manifest(places.manifest("web01"), full_manifest())
    places.manifest("web02").write_text(json.dumps({"schema": "other"}))

    assert EventNames(places).endpoint(1 << 61) == ("web01", "tap0")


def test_a_policy_directory_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("schema: vgw/v1\nvms: {two: {}}\n")
    (tmp_path / "a.yaml").write_text("schema: vgw/v1\nvms: {one: {}}\n")
    (tmp_path / "notes.txt").write_text("not a policy")

    assert [Path(name).name for name, _ in read_sources(tmp_path)] == ["a.yaml", "b.yaml"]


def test_a_policy_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VgwError, match=r"policy .*nope.yaml cannot be read: No such file"):
        read_sources(tmp_path / "nope.yaml")
    with pytest.raises(VgwError, match=r"has no \*.yaml files"):
        read_sources(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"schema: vgw/v1\n# \xff\n")
    with pytest.raises(VgwError, match="line 2 is not UTF-8"):
        read_sources(tmp_path)
    (tmp_path / "x.yaml").write_text("schema: vgw/v1\nnonsense: 1\n")
    places = Paths.from_environment({}, policy=tmp_path, inventory=tmp_path / "none")
    with pytest.raises(PolicyError, match=r"x\.yaml:2:1"):
        read_document(places)
