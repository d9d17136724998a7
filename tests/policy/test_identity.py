# SPDX-License-Identifier: Apache-2.0
"""What a policy says of itself: its revision and the hosts that it is for."""

from __future__ import annotations

import pytest

from tests.policy.texts import assert_one_problem, parse, problems_of, whole
from vgw.policy.parse import parse_sources


def test_without_a_word_it_is_for_every_host_and_has_no_revision() -> None:
    document = parse(whole("vms: {}"))
    assert (document.revision, document.hosts) == (None, ())


def test_revision_and_host_are_read_from_any_file() -> None:
    files = [("a", whole("revision: 17")), ("b", whole("host: [Host1, host2.example.org]"))]
    document = parse_sources(files)
    assert (document.revision, document.hosts) == (17, ("host1", "host2.example.org"))
    assert parse(whole("revision: 0\nhost: one")).hosts == ("one",)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("revision: §-1", "revision", "not a revision"),
        ("revision: §1.5", "revision", "not a revision"),
        ("revision: §0x10", "revision", "not a revision"),
        ("revision: §1234567890123456789", "revision", "up to 18 digits"),
        ("revision: §[1]", "revision", "a single value is expected"),
        ("revision: §~", "revision", "null value"),
        ("host: §[]", "host", "the list is empty"),
        ("host: [§'a b']", "host[0]", "not a name of a host"),
        ("host: §{a: b}", "host", "a single value is expected"),
        ("host: §'*'", "host", "not a name of a host"),
    ],
)
def test_mistakes(text: str, path: str, message: str) -> None:
    assert_one_problem(whole(text), path, message)


def test_each_can_be_given_once_in_all_files() -> None:
    found = problems_of(whole("revision: 1\nhost: a"), whole("revision: 1\nhost: a"))
    assert [(each.file, each.line, each.path) for each in found] == [
        ("2.yaml", 2, "revision"),
        ("2.yaml", 3, "host"),
    ]
