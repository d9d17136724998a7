# SPDX-License-Identifier: Apache-2.0
"""Rule sets as iptables rules that protect a VM behind a bridge, found by its port (physdev).

It is how firewalls of hypervisors have long filtered: bridged packets come to the FORWARD chain
by br_netfilter, and a chain for each VM's port has its rules, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from bench.lab import Lab
from bench.rulesets import ALL_PORTS
from vgw.abi import Action
from vgw.policy.model import ANYWHERE, ICMP, ICMPV6, TCP, UDP, EffectiveRule

_COMMANDS: Final = {4: "iptables-restore", 6: "ip6tables-restore"}
_PROTOCOLS: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "ipv6-icmp"}
_TARGETS: Final = {Action.ACCEPT: "ACCEPT", Action.DROP: "DROP"}


def load(lab: Lab, rules: Sequence[EffectiveRule], version: int, interface: str) -> None:
    """Put rules of one IP version toward the VM behind an interface in force."""
    lines = [
        "*filter",
        ":FORWARD ACCEPT",
        ":TO_VM -",
        "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        f"-A FORWARD -m physdev --physdev-is-bridged --physdev-out {interface} -j TO_VM",
        *(" ".join(["-A TO_VM", *_matches(rule), "-j", _TARGETS[rule.action]]) for rule in rules),
        "-A TO_VM -j DROP",
        "COMMIT",
    ]
    lab.run_on_host(_COMMANDS[version], text="\n".join(lines) + "\n")


def _matches(rule: EffectiveRule) -> Iterator[str]:
    for option, networks in (("-s", rule.peers), ("-d", rule.local)):
        if networks != ANYWHERE:
            yield f"{option} {networks[0]}"
    (service,) = rule.services
    if service.protocol is None:
        return
    yield f"-p {_PROTOCOLS[service.protocol]}"
    for option, span in (
        ("--sport", next(iter(rule.source_ports), None)),
        ("--dport", service.ports),
    ):
        if span is not None and span != ALL_PORTS:
            yield f"{option} {span[0]}:{span[1]}"
