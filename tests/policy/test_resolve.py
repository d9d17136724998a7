# SPDX-License-Identifier: Apache-2.0
"""What a policy means for one VM: order of rules, groups as addresses, services spelt out."""

import time
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.texts import parse, whole
from vgw.abi import Action
from vgw.policy.groups import collapse
from vgw.policy.model import (
    ANY_SERVICE,
    ANYWHERE,
    ICMP,
    TCP,
    Direction,
    Network,
    Service,
    Tier,
)
from vgw.policy.resolve import effective_policy, empty_groups, group_networks

DOCUMENT = parse("""\
schema: vgw/v1
vms:
  web01:
    labels: {role: web, env: prod}
    interfaces:
      - name: tap1
        mac: 52:54:00:00:00:11
        addresses: [10.20.0.11, "2001:db8:20::11", "fe80::1"]
        allowed_pairs: [{address: 10.20.0.100}]
      - {name: tap2, addresses: [10.21.0.11]}
  web02:
    labels: {role: web, env: test}
    interfaces: [{name: tap3, addresses: [10.20.0.10]}]
  db01:
    labels: {role: db}
    interfaces: [{name: tap4, addresses: [10.20.0.21]}]
groups:
  web: {labels: {role: web}}
  prod-web: {labels: {role: web, env: prod}}
  ghosts: {labels: {role: ghost}}
  office: {cidrs: [192.0.2.0/25, 192.0.2.128/25, 192.0.2.7, "2001:db8:1::/48"]}
  inside: {groups: [web, office], vms: [db01], cidrs: [10.20.0.8/31]}
  only-ghosts: {groups: [ghosts]}
services:
  http: [tcp/80, tcp/443]
  ping: [icmp/echo-request]
policies:
  - name: last
    tier: baseline
    applies_to: {all: true}
    ingress: [{name: z, action: drop}]
  - name: second
    tier: vm
    applies_to: {vms: [web01]}
    ingress: [{name: e, action: accept}]
  - name: first
    tier: admin
    applies_to: {all: true}
    ingress:
      - {name: a, action: pass, from: [office], services: [http, tcp/80, ping], log: true}
      - {name: off, action: drop, enabled: false}
      - {name: b, action: drop, from: [only-ghosts], local: [10.20.0.12/31, 10.20.0.14/31]}
    egress:
      - {name: c, action: reject, to: [prod-web, 10.0.0.1], services: [tcp/25], comment: mail}
  - name: by-label
    tier: vm
    applies_to: {labels: {role: web, env: prod}}
    ingress:
      - {name: d, action: accept, services: [udp/53], source_ports: [53, 1024-65535]}
defaults: {ingress: reject, egress: drop, log: true}
""")


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ip_network, texts))


def names(vm: str | None, direction: Direction) -> list[str]:
    return [rule.name for rule in effective_policy(DOCUMENT, vm).rules(direction)]


@pytest.mark.parametrize(
    ("vm", "ingress"),
    [
        # Tiers in their order, then policies in the order of the file, which has `e` before `d`.
        ("web01", ["a", "b", "e", "d", "z"]),
        ("web02", ["a", "b", "z"]),
        ("unknown", ["a", "b", "z"]),
        (None, ["a", "b", "z"]),
    ],
)
def test_the_rules_of_a_vm_in_the_order_of_evaluation(vm: str | None, ingress: list[str]) -> None:
    assert names(vm, Direction.INGRESS) == ingress
    assert names(vm, Direction.EGRESS) == ["c"]
    assert effective_policy(DOCUMENT, vm).vm == (vm or "")
    assert effective_policy(DOCUMENT, vm).defaults == DOCUMENT.defaults


def test_a_rule_with_everything_resolved() -> None:
    first, second, *_ = effective_policy(DOCUMENT, "web01").ingress
    assert first.peers == networks("192.0.2.0/24", "2001:db8:1::/48")
    assert first.services == (
        Service(TCP, (80, 80)),
        Service(TCP, (443, 443)),
        Service(ICMP, icmp_type=8),
    )
    assert (first.action, first.log, first.tier) == (Action.PASS, True, Tier.ADMIN)
    assert first.key == "ingress/admin/first/a"
    assert first.local == ANYWHERE
    assert (first.file, first.line) == ("policy.yaml", 40)
    assert second.local == networks("10.20.0.12/30")
    assert second.services == (ANY_SERVICE,)
    (egress,) = effective_policy(DOCUMENT, "web01").egress
    assert egress.peers == networks("10.0.0.1", "10.20.0.11", "10.21.0.11", "2001:db8:20::11")
    assert egress.comment == "mail"


def test_a_peer_without_members_matches_nothing_and_no_peer_matches_everything() -> None:
    rules = {rule.name: rule for rule in effective_policy(DOCUMENT, "web01").ingress}
    assert rules["b"].peers == ()
    assert rules["e"].peers == ANYWHERE
    assert rules["d"].source_ports == ((53, 53), (1024, 65535))


@pytest.mark.parametrize(
    ("group", "members"),
    [
        ("web", ["10.20.0.10/31", "10.21.0.11", "2001:db8:20::11"]),
        ("prod-web", ["10.20.0.11", "10.21.0.11", "2001:db8:20::11"]),
        ("ghosts", []),
        ("only-ghosts", []),
        ("office", ["192.0.2.0/24", "2001:db8:1::/48"]),
        (
            "inside",
            [
                "10.20.0.8/30",
                "10.20.0.21",
                "10.21.0.11",
                "192.0.2.0/24",
                "2001:db8:1::/48",
                "2001:db8:20::11",
            ],
        ),
    ],
)
def test_groups_are_the_addresses_of_their_members(group: str, members: list[str]) -> None:
    # Without the link-local address and the allowed pair of web01.
    assert group_networks(DOCUMENT, group) == networks(*members)


def test_empty_groups() -> None:
    assert empty_groups(DOCUMENT) == ("ghosts", "only-ghosts")


def test_an_unknown_group_is_an_error() -> None:
    with pytest.raises(KeyError):
        group_networks(DOCUMENT, "nobody")


def test_documents_are_not_confused() -> None:
    text = "groups: {{g: {{cidrs: [{}]}}}}"
    one, other = (parse(whole(text.format(cidr))) for cidr in ("10.0.0.0/8", "10.1.0.0/16"))
    for _ in range(2):
        assert group_networks(one, "g") == networks("10.0.0.0/8")
        assert group_networks(other, "g") == networks("10.1.0.0/16")


def test_a_long_chain_of_groups() -> None:
    count = 5000
    chain = "\n".join(f"  g{number}: {{groups: [g{number + 1}]}}" for number in range(count))
    document = parse(whole(f"groups:\n{chain}\n  g{count}: {{cidrs: [10.0.0.0/8]}}"))
    assert group_networks(document, "g0") == networks("10.0.0.0/8")
    assert not document.warnings


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 255), st.integers(24, 32)).map(
                lambda pair: ip_network((0x0A000000 | pair[0], pair[1]), strict=False)
            ),
            st.tuples(st.integers(0, 255), st.integers(119, 128)).map(
                lambda pair: ip_network((0x20010DB8 << 96 | pair[0], pair[1]), strict=False)
            ),
            st.sampled_from(ANYWHERE),
        ),
        max_size=24,
    )
)
def test_networks_are_collapsed_as_ipaddress_does(found: list[Network]) -> None:
    ipv4 = [network for network in found if isinstance(network, IPv4Network)]
    ipv6 = [network for network in found if isinstance(network, IPv6Network)]
    assert collapse(found) == (*collapse_addresses(ipv4), *collapse_addresses(ipv6))


def test_two_hundred_vms_share_the_work() -> None:
    vms = "\n".join(
        f"  vm{number}: {{labels: {{role: web}}, interfaces: "
        f"[{{name: tap{number}, mac: 52:54:00:00:00:{number:02x}, addresses: [10.0.0.{number}]}}]}}"
        for number in range(1, 201)
    )
    rules = "\n".join(
        f"      - {{name: r{number}, action: accept, from: [web], services: [tcp/{number}]}}"
        for number in range(1, 1001)
    )
    document = parse(
        whole(
            f"vms:\n{vms}\ngroups: {{web: {{labels: {{role: web}}}}}}\npolicies:\n"
            f"  - name: p\n    tier: vm\n    applies_to: {{all: true}}\n    ingress:\n{rules}"
        )
    )
    started = time.process_time()
    for name in document.vms:
        assert len(effective_policy(document, name).ingress) == 1000
    assert time.process_time() - started < 20
