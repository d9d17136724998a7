# SPDX-License-Identifier: Apache-2.0
"""The inventory of a host: read beside the policy, with every mistake of both at once."""

from __future__ import annotations

import pytest

from vgw.abi import Guard, Mode
from vgw.errors import PolicyError, Problem
from vgw.policy.guards import endpoint_facts, missing_guards
from vgw.policy.model import Finder, Interface, Inventory, PolicyDocument
from vgw.policy.parse import digest_of, parse_sources
from vgw.policy.resolve import group_networks

POLICY = """\
schema: vgw/v1
vms:
  web01: {interfaces: [{name: tap1, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]}
groups:
  databases: {labels: {role: db}}
policies:
  - name: only-db
    tier: vm
    applies_to: {vms: [db01]}
    ingress: [{name: sql, action: accept, services: [tcp/5432]}]
"""
INVENTORY = """\
schema: vgw/v1
protect: all
find: [libvirt, qemu]
vms:
  db01:
    labels: {role: db}
    interfaces: [{name: tap2, mac: "52:54:00:00:00:12", addresses: [10.20.0.12]}]
"""


def together(policy: str = POLICY, inventory: str = INVENTORY) -> PolicyDocument:
    return parse_sources([("policy.yaml", policy)], ("inventory.yaml", inventory))


def problems(policy: str = POLICY, inventory: str = INVENTORY) -> tuple[Problem, ...]:
    with pytest.raises(PolicyError) as caught:
        together(policy, inventory)
    return caught.value.problems


def test_vms_of_the_inventory_are_those_of_the_document() -> None:
    document = together()

    assert list(document.vms) == ["web01", "db01"]
    assert document.inventory.protect_all
    assert document.inventory.find == (Finder.LIBVIRT, Finder.QEMU)
    assert [str(each) for each in group_networks(document, "databases")] == ["10.20.0.12/32"]


def test_without_an_inventory_only_what_is_listed_is_protected() -> None:
    text = POLICY.replace("[db01]", "[web01]")
    assert parse_sources([("policy.yaml", text)]).inventory == Inventory(False, ())


def test_a_reference_to_a_vm_that_only_the_inventory_has_needs_the_inventory() -> None:
    with pytest.raises(PolicyError, match="unknown VM 'db01'"):
        parse_sources([("policy.yaml", POLICY)])


def test_policy_and_inventory_have_a_digest_each() -> None:
    other = INVENTORY.replace("protect: all", "protect: listed")
    before, after = together(), together(inventory=other)
    assert before.digest == after.digest == digest_of([("", POLICY)])
    assert len({before.inventory.digest, after.inventory.digest, ""}) == 3
    assert parse_sources([("a", "schema: vgw/v1\n")]).inventory.digest == ""


def test_a_vm_in_both_is_a_mistake_that_names_both_places() -> None:
    found = problems(inventory=INVENTORY.replace("db01:", "web01:"))
    (problem,) = (each for each in found if each.file == "inventory.yaml")

    assert (problem.file, problem.line, problem.column) == ("inventory.yaml", 5, 3)
    assert "the VM 'web01' is defined twice; it is defined at policy.yaml:3" in problem.message


def test_interfaces_and_macs_of_both_are_compared() -> None:
    clash = INVENTORY.replace("tap2", "tap1").replace("00:12", "00:11")
    texts = [problem.message for problem in problems(inventory=clash)]

    assert "the interface 'tap1' belongs to VM 'web01' at policy.yaml:3 already" in texts
    assert any("MAC address 52:54:00:00:00:11 belongs to VM 'web01'" in text for text in texts)


def test_all_mistakes_of_both_files_come_at_once() -> None:
    bad_policy = POLICY.replace("tcp/5432", "tcp/99999")
    bad_inventory = """\
schema: vgw/v1
protect: some
find: [libvirt, vmware, libvirt]
groups: {}
vms:
  db01: {interfaces: [{name: tap2, mac: nonsense}]}
"""
    found = {(each.file, each.line): each.message for each in problems(bad_policy, bad_inventory)}

    assert set(found) == {("policy.yaml", 10), *(("inventory.yaml", n) for n in (2, 3, 4, 6))}
    assert "write listed or all" in found["inventory.yaml", 2]
    assert "belongs into the policy" in found["inventory.yaml", 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: vgw/v2\nnonsense: 1\n", "this version of vgw reads only vgw/v1"),
        ("schema: vgw/v1\nprotect: &a all\nfind: *a\n", "anchor"),
        ("schema: vgw/v1\nprotect: all\n", "write `find` as well"),
        ("schema: vgw/v1\nfind: libvirt\n", "a list is expected"),
        ("schema: vgw/v1\nvms: []\n", "a mapping is expected"),
        ("- vms\n", "a policy file is a mapping"),
        ("schema: vgw/v1\nfind: [qemu, qemu]\n", "qemu is in this list already"),
    ],
)
def test_a_wrong_inventory_is_refused(text: str, message: str) -> None:
    assert any(message in problem.message for problem in problems(inventory=text))


def test_an_inventory_alone_makes_a_document() -> None:
    assert list(parse_sources((), ("inventory.yaml", INVENTORY)).vms) == ["db01"]


def interface(fields: str) -> Interface:
    text = f"schema: vgw/v1\nvms: {{a: {{interfaces: [{{{fields}}}]}}}}"
    (found,) = parse_sources([("p", text)]).vms["a"].interfaces
    return found


def test_an_interface_that_learns_is_guarded_without_a_single_address() -> None:
    learning = interface("name: tap1, mac: '52:54:00:00:00:11', addresses: learn")
    assert learning.learns
    assert learning.addresses == ()

    facts = endpoint_facts(learning, Mode.ENFORCE)
    assert missing_guards(learning) == {}
    assert Guard.ADDRESS | Guard.ARP | Guard.ND in facts.guards
    assert [str(network) for network, _ in facts.owned] == ["fe80::5054:ff:fe00:11/128"]


def test_an_interface_without_addresses_is_not_guarded() -> None:
    """What `learn` is compared with: the same, without the word."""
    assert "address" in missing_guards(interface("name: tap1, mac: '52:54:00:00:00:11'"))


def test_an_interface_may_go_by_its_mac_alone() -> None:
    by_mac = interface("mac: '52:54:00:00:00:11', addresses: learn")
    assert (by_mac.name, by_mac.mac) == ("", "52:54:00:00:00:11")


def test_an_interface_needs_a_name_or_a_mac_of_its_own() -> None:
    with pytest.raises(PolicyError, match="needs the key `name`, or a `mac`"):
        interface("addresses: learn")
    twice = "mac: '52:54:00:00:00:11'}, {mac: '52:54:00:00:00:11'"
    with pytest.raises(PolicyError, match="belongs to VM 'a'"):
        interface(twice)


def test_what_has_to_be_found_is_warned_about_where_nothing_is_looked_for() -> None:
    vm = "vms: {a: {interfaces: [{mac: '52:54:00:00:00:11', addresses: learn}]}}"
    text = f"schema: vgw/v1\n{vm}\n"
    (warning,) = parse_sources([("p", text)]).warnings
    assert "has no `name` and is protected only where the host's inventory" in warning.message
    looking = parse_sources((), ("i", f"{text}find: [libvirt]\n"))
    assert looking.warnings == ()


def test_a_group_of_vms_that_learn_is_not_called_empty() -> None:
    text = """\
schema: vgw/v1
vms: {a: {interfaces: [{name: tap1, mac: '52:54:00:00:00:11', addresses: learn}]}}
groups: {g: {vms: [a]}, outer: {groups: [g]}, none: {labels: {x: y}}}
"""
    (warning,) = parse_sources([("p", text)]).warnings
    assert "the group 'none' has no addresses" in warning.message
