# SPDX-License-Identifier: Apache-2.0
"""Policy texts to put mistakes into, and the check of where a mistake is reported."""

import pytest

from vgw.errors import PolicyError, Problem
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

RULE = """\
schema: vgw/v1
vms: {web01: {labels: {role: web}, interfaces: [{name: tap1, mac: 52:54:00:00:00:11, \
addresses: [10.20.0.11]}]}}
groups:
  office: {cidrs: [192.0.2.0/24]}
services:
  http: [tcp/80]
  ping: [icmp/echo-request]
policies:
  - name: p1
    tier: vm
    applies_to: {all: true}
    INGRESS:
      - {name: r1, action: accept, FIELD}
"""
INTERFACE = """\
schema: vgw/v1
vms:
  web01:
    interfaces:
      - {name: tap1, FIELD}
"""


def parse(text: str) -> PolicyDocument:
    return parse_sources([("policy.yaml", text)])


def problems_of(*texts: str) -> tuple[Problem, ...]:
    sources = [(f"{number}.yaml", text) for number, text in enumerate(texts, start=1)]
    with pytest.raises(PolicyError) as caught:
        parse_sources(sources)
    return caught.value.problems


def assert_one_problem(text: str, path: str, message: str) -> None:
    """Check the only problem of a text, in which a mark § stands where it is."""
    before, _, after = text.partition("§")
    expected = (before.count("\n") + 1, len(before) - before.rfind("\n"))
    (problem,) = problems_of(before + after)
    assert message in problem.message
    assert (problem.line, problem.column) == expected
    assert problem.path == path


def rule(field: str, direction: str = "ingress") -> str:
    return RULE.replace("FIELD", field).replace("INGRESS", direction)


def interface(field: str) -> str:
    return INTERFACE.replace("FIELD", field)


def whole(text: str) -> str:
    return f"schema: vgw/v1\n{text}\n"
