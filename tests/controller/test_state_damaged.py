# SPDX-License-Identifier: Apache-2.0
"""Damaged files of the state directory: each is ignored as a whole and written anew."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.controller.observe import received, row, send_to_vm
from tests.controller.policies import document, to_vm
from vgw.controller import state_file
from vgw.controller.manifest import load_manifest, save_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore
from vgw.controller.reconcile import Host
from vgw.controller.rule_counts import RuleCounts, load_counts

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"
Tap = Callable[[str], int]

#: What a file was is all that is ever read of it.
BODY = {"vm": "web01", "numbers": list(range(50)), "text": "ä"}
SCHEMA = "vgw/test/v1"


def damages(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what may become of a file, with a name each."""
    for length in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        yield f"cut at {length}", whole[:length]
    chosen = random.Random(32)
    for place in chosen.sample(range(len(whole)), min(len(whole), 60)):
        for bit in (0, 6):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            yield f"bit {bit} of byte {place}", bytes(flipped)
    yield "zeros", bytes(len(whole))
    yield "twice", whole + whole
    yield "no JSON", b"\xff\xfe{"
    yield "deep", b"[" * 100_000


def test_catalogue_M32_a_damaged_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    state_file.write_state(file, SCHEMA, BODY)
    whole = file.read_bytes()
    assert state_file.read_state(file, SCHEMA) == BODY  # negative control
    for what, data in damages(whole):
        file.write_bytes(data)
        found = state_file.read_state(file, SCHEMA)
        # What is said of the file before the checksum may differ where that means the same.
        assert found is None or (found == BODY and data.endswith(whole[-100:])), what
        assert state_file.is_whole(file, SCHEMA) == (found is not None), what


def test_catalogue_M32_a_file_of_another_version_or_host_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    state_file.write_state(file, "vgw/test/v0", BODY)
    assert state_file.read_state(file, SCHEMA) is None
    monkeypatch.setattr(state_file, "_host", lambda: "another")
    state_file.write_state(file, SCHEMA, BODY)
    assert state_file.read_state(file, SCHEMA) == BODY  # negative control
    monkeypatch.undo()
    assert state_file.read_state(file, SCHEMA) is None


def test_a_draft_that_a_killed_process_left_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    state_file.write_state(file, SCHEMA, BODY)
    draft = tmp_path / ".a.json.tmp"
    draft.write_bytes(file.read_bytes()[:20])
    assert state_file.read_state(file, SCHEMA) == BODY
    state_file.write_state(file, SCHEMA, {})
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.bpf
def test_catalogue_M32_a_manifest_of_another_vm_is_not_taken(
    host: Host, paths: Paths, tap: Tap
) -> None:
    tap("tap0")
    host.attach(document(HTTP), "web01")
    file = paths.manifest("web01")
    manifest = load_manifest(file)
    assert manifest is not None
    file.rename(paths.manifest("web02"))
    assert load_manifest(paths.manifest("web02")) is None
    save_manifest(file, manifest)
    assert load_manifest(file) == manifest  # negative control


@pytest.mark.bpf
@pytest.mark.parametrize("which", ["vms", "counts", "policies"])
def test_catalogue_M32_what_is_damaged_is_made_anew_and_never_opens_anything(
    host: Host, paths: Paths, tap: Tap, which: str
) -> None:
    vm = tap("tap0")
    host.attach(document(HTTP), "web01")
    send_to_vm("tap0", to_vm())
    host.apply(document(HTTPS))
    host.apply(document(HTTP))
    files = sorted((paths.state_dir / which).rglob("*.json"))
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    if which == "vms":
        assert load_manifest(paths.manifest("web01")) is None
    elif which == "counts":
        assert load_counts(paths.counts("web01")) == RuleCounts()
    else:
        store = PolicyStore(paths.policies)
        assert all(store.rules(digest) is None for digest in store.digests())
    assert row(host)["attached"]

    Host(paths).apply(document(HTTP))

    assert received(vm, to_vm())
    send_to_vm("tap0", to_vm(dport=81))
    assert not received(vm, to_vm(dport=81))
    assert host.manifest("web01").current() is not None
    assert [rule["rule"] for rule in host.rules("web01")["rules"]] == ["http"]


def test_the_checksum_is_of_the_body(tmp_path: Path) -> None:
    """Negative control: with its checksum made right, another body is read."""
    file = tmp_path / "a.json"
    state_file.write_state(file, SCHEMA, BODY)
    text = file.read_text()
    other = json.dumps({"vm": "web02"}, separators=(",", ":"))
    head = text.partition(',"body":')[0]
    right = re.sub(r'"checksum":"[0-9a-f]+"', f'"checksum":"{sha(other)}"', head)
    file.write_text(f'{right},"body":{other}}}')
    assert state_file.read_state(file, SCHEMA) == {"vm": "web02"}


def sha(text: str) -> str:
    return state_file._checksum(text.encode())
