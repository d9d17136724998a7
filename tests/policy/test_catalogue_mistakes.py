# SPDX-License-Identifier: Apache-2.0
"""Policies that the packet catalogue wants refused before any packet meets them."""

from __future__ import annotations

import pytest

from tests.policy.texts import assert_one_problem, interface, parse, rule


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0"])
def test_catalogue_F24_a_pair_that_covers_everything_is_refused(network: str) -> None:
    """It would switch the address guard off in disguise."""
    assert_one_problem(
        interface(f"allowed_pairs: [{{address: §'{network}'}}]"),
        "vms.web01.interfaces[0].allowed_pairs[0].address",
        "guards: {address: false}",
    )


@pytest.mark.parametrize("network", ["10.0.0.0/8", "2001:db8::/32"])
def test_catalogue_F24_a_pair_that_covers_less_is_not(network: str) -> None:
    document = parse(interface(f"allowed_pairs: [{{address: '{network}'}}]"))
    (pair,) = document.vms["web01"].interfaces[0].allowed_pairs
    assert str(pair.network) == network


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("services: [§proto/47/80]", "services[0]", "has no ports"),
        ("services: [§proto/50/1-2]", "services[0]", "has no ports"),
        ("services: [proto/47], §source_ports: ['53']", "source_ports", "protocol 47 has none"),
        ("services: [any], §source_ports: ['53']", "source_ports", "has none"),
        ("§source_ports: ['53']", "source_ports", "has none"),
    ],
)
def test_catalogue_I16_ports_of_a_protocol_without_ports_are_refused(
    field: str, path: str, message: str
) -> None:
    """Never are they read as "all of it"."""
    assert_one_problem(rule(field), f"policies[0].ingress[0].{path}", message)
