# SPDX-License-Identifier: Apache-2.0
"""Verdict tables: modules of data that every engine is held against."""

from __future__ import annotations

from tests.cases import (
    checksum,
    fragments,
    host_services,
    icmp_errors,
    identity,
    ipv4,
    ipv6,
    layer2,
    learning,
    limits,
    odd_fragments,
    policy,
    policy_stories,
    stories,
    tcp,
    tcp_numbers,
    tcp_stories,
    udp_icmp,
)
from tests.cases.table import Case

TABLES: dict[str, tuple[Case, ...]] = {
    "layer2": layer2.CASES,
    "ipv4": ipv4.CASES,
    "ipv6": ipv6.CASES,
    "identity": identity.CASES,
    "tcp": tcp.CASES,
    "udp_icmp": udp_icmp.CASES,
    "policy": policy.CASES,
    "stories": stories.CASES,
    "policy_stories": policy_stories.CASES,
    "tcp_stories": tcp_stories.CASES,
    "limits": limits.CASES,
    "fragments": fragments.CASES,
    "odd_fragments": odd_fragments.CASES,
    "tcp_numbers": tcp_numbers.CASES,
    "icmp_errors": icmp_errors.CASES,
    "host_services": host_services.CASES,
    "checksum": checksum.CASES,
    "learning": learning.CASES,
}
