# SPDX-License-Identifier: Apache-2.0
"""What several sources find as one, and how it fills a document without overriding it."""

from __future__ import annotations

from typing import Any

import pytest

from vgw.controller.finding.fill import fill
from vgw.controller.finding.found import FoundInterface, FoundVm, clean_interface, merged
from vgw.controller.finding.told import told, told_vm
from vgw.controller.parameters import Parameters
from vgw.errors import VgwError
from vgw.policy.model import Interface, PolicyDocument
from vgw.policy.parse import parse_sources
from vgw.policy.resolve import effective_policy

POLICIES = """\
policies:
  - {name: all, tier: vm, applies_to: {all: true}}
  - {name: web, tier: vm, applies_to: {labels: {role: web}}}
"""
MAC, OTHER_MAC = "52:54:00:00:00:11", "52:54:00:00:00:12"


def vm(name: str, *interfaces: tuple[str, str | None], source: str = "libvirt") -> FoundVm:
    return FoundVm(
        name, source, bool(interfaces), tuple(FoundInterface(*each) for each in interfaces)
    )


def document(vms: str = "{}", protect: str = "listed") -> PolicyDocument:
    policy = f"schema: vgw/v1\nvms: {vms}\n"
    inventory = f"schema: vgw/v1\nprotect: {protect}\nfind: [libvirt]\n"
    return parse_sources([("policy", policy + POLICIES)], ("inventory", inventory))


def interfaces(found: PolicyDocument, name: str = "web01") -> list[tuple[str, str | None]]:
    return [(each.name, each.mac) for each in found.vms[name].interfaces]


def texts(filled: Any) -> list[str]:
    return [each.text for each in filled.differences]


# --- several sources ------------------------------------------------------------------------------


def test_sources_complete_each_other() -> None:
    first = [vm("a", ("tap1", None)), vm("b")]
    second = [vm("a", ("tap1", MAC), ("tap2", None), source="qemu"), vm("c", ("tap3", None))]
    assert merged([first, second]) == (
        FoundVm("a", "libvirt", True, (FoundInterface("tap1", MAC), FoundInterface("tap2"))),
        FoundVm("b", "libvirt", False),
        vm("c", ("tap3", None)),
    )


def test_the_earlier_source_is_believed() -> None:
    first, second = [vm("a", ("tap1", MAC))], [vm("a", ("tap1", OTHER_MAC), source="qemu")]
    assert merged([first, second]) == tuple(first)
    # The same interface under another name is the same VM: it does not come twice.
    assert merged([first, [vm("b", ("tap1", MAC))]]) == tuple(first)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 16, "tap 1", "tap\n1", None])
def test_what_is_no_name_of_an_interface_is_none(name: object) -> None:
    assert clean_interface(name, MAC) is None


def test_what_is_no_mac_is_not_known() -> None:
    for mac in (None, "", "00:00:00:00:00:00", "01:00:5e:00:00:01", "52:54:00:00:00", "x"):
        assert clean_interface("tap1", mac) == FoundInterface("tap1")
    assert clean_interface("tap1", MAC.upper()) == FoundInterface("tap1", MAC)


# --- filling --------------------------------------------------------------------------------------


def test_a_vm_without_interfaces_gets_those_that_are_found() -> None:
    written = document("{web01: {labels: {role: web}, conntrack: {grace: 5s}}}")
    filled = fill(written, (vm("web01", ("vnet0", MAC), ("vnet1", None)),))

    assert interfaces(filled.document) == [("vnet0", MAC), ("vnet1", None)]
    assert filled.document.vms["web01"].labels == {"role": "web"}
    assert filled.document.vms["web01"].interfaces[0].tracking.grace_seconds == 5
    assert not filled.differences


def test_a_mac_that_is_not_written_is_filled_in() -> None:
    written = document("{web01: {interfaces: [{name: vnet0}]}}")
    filled = fill(written, (vm("web01", ("vnet0", MAC)),))
    assert interfaces(filled.document) == [("vnet0", MAC)]


def test_an_interface_without_a_name_is_the_one_with_its_mac() -> None:
    text = f"{{web01: {{interfaces: [{{mac: '{MAC}', addresses: [10.0.0.1]}}]}}}}"
    filled = fill(document(text), (vm("web01", ("vnet0", OTHER_MAC), ("vnet1", MAC)),))
    assert interfaces(filled.document) == [("vnet1", MAC)]
    assert fill(document(text), ()).document.vms["web01"].interfaces[0].name == ""


def test_what_is_written_is_not_overridden() -> None:
    text = f"{{web01: {{interfaces: [{{name: vnet0, mac: '{MAC}', addresses: [10.0.0.1]}}]}}}}"
    written = document(text)
    filled = fill(written, (vm("web01", ("vnet0", OTHER_MAC), ("vnet1", None)),))

    assert filled.document is written, "nothing is missing, so nothing changes"
    assert texts(filled) == [f"it is found with the MAC {OTHER_MAC}, and {MAC} is written"]


def test_an_interface_stays_with_the_vm_that_it_is_written_for() -> None:
    written = document("{web01: {interfaces: [{name: vnet0}]}, db01: {}}", protect="all")
    filled = fill(written, (vm("db01", ("vnet0", MAC)), vm("app", ("vnet0", MAC), ("vnet5", None))))

    assert interfaces(filled.document) == [("vnet0", None)]
    assert filled.document.vms["db01"].interfaces == ()
    assert interfaces(filled.document, "app") == [("vnet5", None)]
    assert len(filled.differences) == 2
    assert "says that it is of 'db01', not of web01 as written" in texts(filled)[0]


def test_a_mac_of_another_vm_is_reported() -> None:
    text = f"{{web01: {{interfaces: [{{name: vnet0, mac: '{MAC}'}}]}}}}"
    filled = fill(document(text, protect="all"), (vm("app", ("vnet5", MAC)),))
    assert texts(filled) == [f"libvirt says that it has the MAC of VM web01, {MAC}"]


def test_others_are_protected_when_all_are() -> None:
    found = (vm("app", ("vnet5", MAC)), vm("off"))
    listed, everything = (
        fill(document(), found).document,
        fill(document(protect="all"), found).document,
    )

    assert "app" not in listed.vms
    assert everything.vms["app"].found == "libvirt"
    assert everything.vms["app"].interfaces == (Interface("vnet5", MAC),)
    assert "off" not in everything.vms
    names = {rule.policy for rule in effective_policy(everything, "app").ingress}
    assert names <= {"all"}, "a policy for labels is not for what has none"


def test_more_interfaces_of_a_written_vm_are_protected_when_all_are() -> None:
    text, found = (
        "{web01: {interfaces: [{name: vnet0}]}}",
        (vm("web01", ("vnet0", None), ("vnet1", MAC)),),
    )
    assert interfaces(fill(document(text), found).document) == [("vnet0", None)]
    both = [("vnet0", None), ("vnet1", MAC)]
    assert interfaces(fill(document(text, protect="all"), found).document) == both


@pytest.mark.parametrize("name", ["../../etc", "a b", "", "x" * 65536, "-a", "ü", "a\n\x1b[31m"])
def test_catalogue_N6_a_found_name_that_is_none_is_reported_and_not_used(name: str) -> None:
    filled = fill(document(protect="all"), (vm(name, ("vnet0", MAC)),))
    assert list(filled.document.vms) == []
    (difference,) = filled.differences
    assert difference.vm is None, "it is no label of a metric"
    assert "is no name that vgw can use" in difference.text
    assert difference.text.isprintable()
    assert len(difference.text) < 200


# --- told -----------------------------------------------------------------------------------------


def test_a_request_may_tell_of_a_vm() -> None:
    asked = {"vm": "web01", "told": [["vnet0", MAC], ["vnet1", None]]}
    assert told_vm(Parameters(asked)) == told("web01", [("vnet0", MAC), ("vnet1", None)])
    assert told_vm(Parameters({"vm": "web01"})) is None


@pytest.mark.parametrize(
    "interfaces",
    ["vnet0", [["vnet0"]], [["vnet0", 7]], [[None, MAC]], [["a/b", MAC]], [7], {"a": 1}],
)
def test_what_else_a_request_tells_is_refused(interfaces: object) -> None:
    with pytest.raises(VgwError, match="told"):
        told_vm(Parameters({"vm": "web01", "told": interfaces}))
    with pytest.raises(VgwError, match="not a name"):
        told("a/b", [])
