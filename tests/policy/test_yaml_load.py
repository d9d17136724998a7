# SPDX-License-Identifier: Apache-2.0
"""Hostile YAML is refused in bounded time."""

import gc
import random
import time
from pathlib import Path

import pytest

from tests.policy.texts import (
    problems_of,
    whole,
)
from vgw.errors import PolicyError
from vgw.policy.parse import parse_sources
from vgw.policy.report import MAX_PROBLEMS

EXAMPLES = Path(__file__).parents[2] / "examples"

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (BOMB, (1, 5), "the anchor '&a0' is not allowed"),
        ("schema: vgw/v1\nvms: {a: *b}", (2, 10), "the alias '*b' is not allowed"),
        ("schema: !!str vgw/v1", (1, 9), "the tag 'tag:yaml.org,2002:str' is not allowed"),
        ("vms: !!python/object/apply:os.system ['true']", (1, 6), "python/object/apply:os.system"),
        ("vms: ! {}", (1, 6), "the tag '!' is not allowed"),
        ("schema: vgw/v1\nvms: " + "[" * 10_000, (2, 21), "more than 16 levels"),
        ("- " * 10_000, (1, 33), "more than 16 levels"),
        ("a:\n " + "{b: " * 100_000, (2, 62), "more than 16 levels"),
        ("schema: vgw/v1\nvms: {a\0: {}}", (2, 8), "character U+0000"),
        ("\ufeffschema: vgw/v1", (1, 1), "byte order mark"),
        ("schema: vgw/v1\n# \udcff", (2, 3), "not valid UTF-8"),
        ("schema: vgw/v1\r\n# \x1b[2J", (2, 3), "character U+001B"),
        ("schema: vgw/v1\n---\nschema: vgw/v1", (2, 1), "one document"),
        ("schema: vgw/v1\nschema: vgw/v1", (2, 1), "duplicate key 'schema'"),
        ("%YAML 1.1\n---\nschema: vgw/v1", (1, 1), "leave out YAML directives"),
        ("# x\n" + "".join(f"%TAG !a{n}! x\n" for n in range(50_000)), (2, 1), "directives"),
        ("schema: vgw/v1\n\tvms: {}", (2, 1), "not valid YAML"),
        ("schema: 'vgw/v1", (1, 16), "not valid YAML"),
        ("x" * (32 * 1024 * 1024 + 1), (0, 0), "vgw reads at most 33554432"),
        ("a: [" + "1," * 3_100_000 + "]", (1, 5_999_999), "more than 3000000 values"),
        ("\n".join(f"k{n}: ~" for n in range(100_000)), (1, 1), "unknown key 'k0'"),
    ],
    ids=lambda value: (
        value[:24].encode("unicode_escape").decode() if isinstance(value, str) else None
    ),
)
def test_catalogue_N1_hostile_text_is_refused_in_bounded_time(
    text: str, place: tuple[int, int], message: str
) -> None:
    started = time.process_time()
    found = problems_of(text)
    assert time.process_time() - started < 60
    assert len(found) <= MAX_PROBLEMS + 1
    assert any(
        (problem.line, problem.column) == place and message in problem.message for problem in found
    )


def test_fifty_thousand_rules_in_each_direction_are_read() -> None:
    sides = []
    for direction, peer in (("ingress", "from"), ("egress", "to")):
        rules = (
            f"      - {{name: {direction}-{number}, action: accept, local: [10.20.0.0/16, "
            f"'2001:db8:20::/48'], {peer}: [10.{number >> 8}.{number & 255}.0/24, 192.0.2.0/24], "
            "services: [tcp/443, udp/443], source_ports: [53, 1024-65535], log: true, "
            f"enabled: true, comment: 'ticket {number}'}}\n"
            for number in range(50_000)
        )
        sides.append(f"    {direction}:\n{''.join(rules)}")
    head = "policies:\n  - name: p\n    tier: vm\n    applies_to: {all: true}\n"
    (policy,) = parse_sources([("p.yaml", whole(head + "".join(sides)))]).policies
    assert len(policy.ingress) == len(policy.egress) == 50_000


def test_garbage_is_collected_again_afterwards() -> None:
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        try:
            problems_of("- no policy")
            parse_sources([("p.yaml", whole("vms: {}"))])
            assert gc.isenabled() is was_enabled
        finally:
            gc.enable()


def test_problems_beyond_the_limit_are_counted() -> None:
    found = problems_of(whole("\n".join(f"k{number}: 1" for number in range(1500))))
    assert len(found) == MAX_PROBLEMS + 1
    assert "500 more problem(s)" in found[-1].message


def test_catalogue_N17_mutated_policies_are_accepted_or_refused_with_problems() -> None:
    texts = [path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))]
    pieces = ["{", "}", "[", "]", ":", ",", "- ", "? ", "&a ", "*a", "! ", "'", '"', "\n", "~", "|"]
    chance = random.Random(4711)
    lines: list[str] = []
    for _ in range(500):
        text = chance.choice(texts)
        for _ in range(chance.randint(1, 5)):
            place = chance.randrange(len(text))
            cut = chance.choice([0, 0, 1, 8])
            text = text[:place] + chance.choice(pieces) + text[place + cut :]
        try:
            parse_sources([("mutated.yaml", text)])
        except PolicyError as error:
            lines.extend(str(problem) for problem in error.problems)
    assert len(lines) > 500
    assert all(line.isprintable() for line in lines)
