# SPDX-License-Identifier: Apache-2.0
"""What the guards derive from an interface, and which of them are off for want of facts."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.cases.fixtures import GUARDED, NAMELESS
from tests.frames import OTHER_VM_MAC, PAIR_MAC, VM_MAC
from vgw.abi import MAX_ADDRESSES, MAX_VLANS, FlowState, Guard, Mode
from vgw.errors import VgwError
from vgw.policy.flows import ESTABLISHED_SECONDS
from vgw.policy.guards import endpoint_facts, link_local_address, missing_guards
from vgw.policy.model import AllowedPair, Guards, Interface

ALL = ~Guard(0)


def test_link_local_is_derived_from_the_mac() -> None:
    assert str(link_local_address(VM_MAC)) == "fe80::5054:ff:fe00:11"
    assert str(link_local_address(bytes.fromhex("0200000000ff"))) == "fe80::ff:fe00:ff"


def test_facts_of_a_full_interface() -> None:
    facts = endpoint_facts(replace(GUARDED, vlans=(7,)), Mode.MONITOR)
    assert (facts.mac, facts.mode, facts.vlans) == (VM_MAC, Mode.MONITOR, (7,))
    assert facts.guards == ALL
    assert (ip_network("fe80::5054:ff:fe00:11"), None) in facts.owned
    assert (ip_network("10.20.0.100"), PAIR_MAC) in facts.owned
    assert facts.timeouts_ns[FlowState.TCP_ESTABLISHED] == ESTABLISHED_SECONDS * 10**9
    assert ESTABLISHED_SECONDS > 7200, "hosts send their first keepalive after two hours"
    assert set(facts.timeouts_ns) == set(FlowState)
    assert missing_guards(GUARDED) == {}


def test_an_address_goes_with_its_mac() -> None:
    facts = endpoint_facts(GUARDED, Mode.ENFORCE)
    own, pair = ip_address("10.20.0.11"), ip_address("10.20.0.100")
    assert facts.owns(own, VM_MAC)
    assert facts.owns(pair, PAIR_MAC)
    assert not facts.owns(own, PAIR_MAC)
    assert not facts.owns(pair, VM_MAC)
    assert not facts.owns(ip_address("::ffff:10.20.0.11"), VM_MAC)


def test_guards_without_their_facts_are_off() -> None:
    facts = endpoint_facts(NAMELESS, Mode.ENFORCE)
    assert facts.guards == Guard.DHCP_SERVER | Guard.RA
    assert facts.owned == ()
    assert set(missing_guards(NAMELESS)) == {"mac", "address", "arp", "nd"}
    assert "`mac`" in missing_guards(NAMELESS)["mac"]
    assert "`addresses`" in missing_guards(NAMELESS)["nd"]


def test_a_guard_nobody_asked_for_is_not_missing() -> None:
    unasked = replace(NAMELESS, guards=Guards(mac=False, address=False, arp=False, nd=False))
    assert missing_guards(unasked) == {}
    assert endpoint_facts(unasked, Mode.ENFORCE).guards == Guard.DHCP_SERVER | Guard.RA


def test_without_mac_addresses_are_guarded_but_link_local_is_free() -> None:
    no_mac = replace(GUARDED, mac=None, allowed_pairs=())
    facts = endpoint_facts(no_mac, Mode.ENFORCE)
    assert facts.guards == ALL & ~Guard.MAC
    assert facts.owns(ip_address("fe80::1234"), OTHER_VM_MAC)
    assert not facts.owns(ip_address("10.20.0.12"), OTHER_VM_MAC)


def test_mac_without_addresses() -> None:
    facts = endpoint_facts(Interface("tap0", mac="52:54:00:00:00:11"), Mode.ENFORCE)
    assert facts.guards == Guard.MAC | Guard.DHCP_SERVER | Guard.RA


def test_what_does_not_fit_is_refused() -> None:
    room = MAX_ADDRESSES - 3  # besides two addresses and the link-local one
    pairs = tuple(AllowedPair(ip_network(f"10.1.{i}.0/24")) for i in range(room + 1))
    with pytest.raises(VgwError, match=f"interface tap-web01: {MAX_ADDRESSES + 1} addresses"):
        endpoint_facts(replace(GUARDED, allowed_pairs=pairs), Mode.ENFORCE)
    assert len(endpoint_facts(replace(GUARDED, allowed_pairs=pairs[1:]), Mode.ENFORCE).owned) == (
        MAX_ADDRESSES
    )
    with pytest.raises(VgwError, match=f"{MAX_VLANS + 1} vlans, the limit is"):
        endpoint_facts(replace(GUARDED, vlans=tuple(range(1, MAX_VLANS + 2))), Mode.ENFORCE)
