# SPDX-License-Identifier: Apache-2.0
"""The kernel's verdicts on both nftables forms of a rule set are those of the rules."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bench import nft
from bench.headers import Header, headers
from bench.lab import VM_MAC, Lab, lab
from bench.rulesets import generate
from scripts.lab import wire
from tests.bench.judge import address, verdict_of_rules
from vgw.policy.frame import build_frame
from vgw.policy.model import TCP, UDP

pytestmark = pytest.mark.lab

PROTOCOLS = {TCP: "tcp", UDP: "udp"}
#: Notes the packets that the chains before it have let pass.
WITNESS = """
table inet witness {
  set seen { typeof ip saddr . ip daddr . meta l4proto . th sport . th dport; flags dynamic; }
  chain input {
    type filter hook input priority 10; policy accept;
    add @seen { ip saddr . ip daddr . meta l4proto . th sport . th dport }
  }
}
"""


@pytest.fixture(scope="module")
def built() -> Iterator[Lab]:
    """A lab whose client takes every IPv4 address for its own."""
    with lab() as made:
        route = ("ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo")
        subprocess.run(made.command("client", *route), check=True)
        yield made


def load(made: Lab, text: str) -> None:
    subprocess.run(made.command("client", "nft", "-f", "-"), input=text, text=True, check=True)


def on_loopback(text: str) -> str:
    """Return a rule set for packets that come in on loopback, each judged by the rules alone."""
    kept = (line for line in text.splitlines(keepends=True) if "ct state" not in line)
    return "".join(kept).replace("hook forward", "hook input").replace(f"ether daddr {VM_MAC} ", "")


def seen(made: Lab) -> set[tuple[Any, ...]]:
    command = made.command("client", "nft", "-j", "-n", "list", "set", "inet", "witness", "seen")
    output = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (found,) = [entry["set"] for entry in output["nftables"] if "set" in entry]
    return {tuple(element["concat"]) for element in found.get("elem", [])}


def send(made: Lab, header: Header) -> None:
    description = {
        "src": str(address(header, header.remote)),
        "dst": str(address(header, header.local)),
        "proto": header.protocol,
        "sport": header.sport,
        "dport": header.dport,
    }
    frame = build_frame(description, source_mac=bytes(6), destination_mac=bytes(6))
    with (
        wire.inside(f"{made.name}-client"),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):
        raw.sendto(frame[14:], (description["dst"], 0))


def key(header: Header) -> tuple[Any, ...]:
    addresses = (str(address(header, value)) for value in (header.remote, header.local))
    return (*addresses, header.protocol, header.sport, header.dport)


@pytest.mark.parametrize("form", [nft.linear, nft.ordered_maps])
@pytest.mark.parametrize("shape", ["acl", "fw"])
def test_verdicts(built: Lab, form: nft.Form, shape: str) -> None:
    rules = generate(400, shape)
    packets = {
        header
        for trace in ("random", "shuffled")
        for header in headers(trace, rules, 4, 200)
        if header.protocol in PROTOCOLS
    }
    load(built, f"flush ruleset\n{on_loopback(form(rules, 4, VM_MAC).text)}{WITNESS}")
    for packet in packets:
        send(built, packet)
    wanted = {key(packet) for packet in packets if verdict_of_rules(rules, packet)}
    found = seen(built) & {key(packet) for packet in packets}
    assert found == wanted
    assert 0 < len(wanted) < len(packets)
