# SPDX-License-Identifier: Apache-2.0
"""What VMs and successive documents share: equal to resolving anew, and the same objects."""

import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.policy.texts import parse, whole
from vgw.policy import resolve
from vgw.policy.model import Direction, EffectivePolicy, Group, Interface, PolicyDocument, Vm
from vgw.policy.resolve import effective_policy, group_networks

TEXT = whole("""\
vms:
  a: {labels: {role: web, env: prod}, interfaces: [{name: t1, addresses: [10.0.0.1]}]}
  b: {labels: {role: web, env: test}, interfaces: [{name: t2, addresses: [10.0.0.2]}]}
  c: {labels: {role: db}, interfaces: [{name: t3, addresses: [10.0.0.3, "2001:db8::3"]}]}
  d: {labels: {role: db}, interfaces: [{name: t4, addresses: [10.0.0.4]}]}
groups:
  web: {labels: {role: web}}
  prod: {labels: {role: web, env: prod}}
  named: {vms: [c]}
  office: {cidrs: [192.0.2.0/25]}
  inside: {groups: [web, named], cidrs: [10.1.0.0/16]}
  all: {groups: [inside, office]}
services: {http: [tcp/80, tcp/443], office: [udp/53]}
policies:
  - name: guard
    tier: admin
    applies_to: {all: true}
    ingress:
      - {name: cidr, action: drop, from: [203.0.113.0/24], services: [office]}
      - {name: off, action: drop, from: [office], enabled: false}
      - {name: office, action: pass, from: [office]}
      - {name: all, action: accept, from: [all], services: [http]}
    egress: [{name: out, action: accept, to: [named, 10.9.0.0/16]}]
  - name: webs
    tier: group
    applies_to: {labels: {role: web}}
    ingress:
      - {name: pair, action: accept, from: [web, office]}
      - {name: pair-again, action: accept, from: [web, office], services: [udp/53]}
      - {name: prod, action: accept, from: [prod]}
  - name: dbs
    tier: vm
    applies_to: {labels: {role: db}}
    ingress: [{name: inside, action: accept, from: [inside], local: [10.0.0.3]}]
""")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    resolve._latest.clear()
    yield
    resolve._latest.clear()


def rules_by_key(policy: EffectivePolicy) -> dict[str, object]:
    return {rule.key: rule for rule in (*policy.ingress, *policy.egress)}


def with_group(document: PolicyDocument, group: Group) -> PolicyDocument:
    return replace(document, groups={**document.groups, group.name: group})


def with_cidr(document: PolicyDocument, name: str, cidr: str) -> PolicyDocument:
    group = document.groups[name]
    return with_group(document, replace(group, cidrs=(*group.cidrs, ip_network(cidr))))


def test_vms_with_the_same_policies_share_their_rules() -> None:
    document = parse(TEXT)
    of_vm = {name: effective_policy(document, name) for name in document.vms}
    for direction in Direction:
        for one, other in (("a", "b"), ("c", "d")):
            assert of_vm[one].rules(direction) is of_vm[other].rules(direction)
    assert of_vm["a"].ingress is not of_vm["c"].ingress
    assert effective_policy(document, None).ingress is effective_policy(document, "x").ingress


def test_the_same_groups_are_the_same_peers() -> None:
    rules = {rule.name: rule for rule in effective_policy(parse(TEXT), "a").ingress}
    assert rules["pair"].peers is rules["pair-again"].peers
    assert len(rules["pair"].peers) == 3


def test_only_rules_of_changed_groups_are_made_again() -> None:
    document = parse(TEXT)
    before = rules_by_key(effective_policy(document, "a"))
    changed = with_cidr(document, "office", "198.51.100.0/24")
    after = rules_by_key(effective_policy(changed, "a"))
    assert {name for name in before if before[name] is not after[name]} == {
        "ingress/admin/guard/office",
        "ingress/admin/guard/all",
        "ingress/group/webs/pair",
        "ingress/group/webs/pair-again",
    }


def test_a_change_without_effect_leaves_everything_as_it_is() -> None:
    document = parse(TEXT)
    before = effective_policy(document, "a")
    changed = with_cidr(document, "office", "192.0.2.1")
    assert effective_policy(changed, "a").ingress is before.ingress
    assert group_networks(changed, "office") is group_networks(changed, "office")


def test_lists_without_a_changed_rule_stay() -> None:
    document = parse(TEXT)
    egress, ingress = (
        effective_policy(document, "a").egress,
        effective_policy(document, "a").ingress,
    )
    changed = effective_policy(with_cidr(document, "office", "198.51.100.0/24"), "a")
    assert changed.egress is egress
    assert changed.ingress is not ingress


def test_a_changed_policy_leaves_the_others() -> None:
    document = parse(TEXT)
    before = rules_by_key(effective_policy(document, "a"))
    first, *rest = document.policies
    changed = replace(document, policies=(replace(first, ingress=first.ingress[:1]), *rest))
    after = rules_by_key(effective_policy(changed, "a"))
    assert after["ingress/group/webs/pair"] is before["ingress/group/webs/pair"]
    assert "ingress/admin/guard/all" not in after


def test_a_changed_service_is_seen() -> None:
    document = parse(TEXT)
    effective_policy(document, "a")
    services = {**document.services, "http": document.services["office"]}
    rules = {
        rule.name: rule
        for rule in effective_policy(replace(document, services=services), "a").ingress
    }
    assert rules["all"].services == document.services["office"]


def test_the_document_in_force_outlives_one_that_is_looked_at() -> None:
    document = parse(TEXT)
    before = rules_by_key(effective_policy(document, "a"))
    effective_policy(parse(whole("vms: {a: {interfaces: [{name: t1}]}}")), "a")
    changed = with_cidr(document, "named", "198.51.100.0/24")
    after = rules_by_key(effective_policy(changed, "a"))
    assert after["ingress/admin/guard/office"] is before["ingress/admin/guard/office"]
    assert len(resolve._latest) == 2


def changed_at_random(document: PolicyDocument, chance: random.Random) -> PolicyDocument:
    groups, vms = dict(document.groups), dict(document.vms)
    kind = chance.randrange(4)
    group = groups[chance.choice(list(groups))]
    if kind == 0:
        cidrs = [ip_network((0x0A010000 | chance.randrange(8), 32)) for _ in range(2)]
        groups[group.name] = replace(group, cidrs=tuple(cidrs))
    elif kind == 1:
        groups[group.name] = replace(group, vms=tuple(chance.sample([*vms, "ghost", "nobody"], 2)))
    elif kind == 2:
        inner = chance.choice([[], ["web"], ["named"], ["web", "office"]])
        groups["inside"] = replace(groups["inside"], groups=tuple(inner))
    else:
        name = chance.choice("abcd")
        if name in vms and chance.randrange(2):
            del vms[name]
        else:
            labels = {"role": chance.choice(["web", "db"]), "env": chance.choice(["prod", "test"])}
            address = ip_address(0x0A000000 | chance.randrange(8))
            vms[name] = Vm(name, labels, interfaces=(Interface("t", addresses=(address,)),))
    return replace(document, groups=groups, vms=vms)


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_of_changes_comes_to_the_same_as_resolving_anew(seed: int) -> None:
    chance = random.Random(seed)
    document = parse(TEXT)
    for _ in range(30):
        document = changed_at_random(document, chance)
        asked = [name for name in ("a", "b", "c", "d", None) if chance.randrange(2)]
        for vm in asked:
            assert effective_policy(document, vm) == resolve._Resolver(document).effective_policy(
                vm
            )
        for name in document.groups:
            fresh = resolve._Resolver(document).groups
            assert chance.randrange(2) or group_networks(document, name) == fresh.networks(name)
