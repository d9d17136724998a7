# SPDX-License-Identifier: Apache-2.0
"""Files of the state directory: damaged, or whole with contents that nobody wrote."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

from tests.fuzz.inputs.bytes_mutator import dumped, mutate_json
from tests.fuzz.inputs.target import WrongError, quick_directory
from tests.policy.texts import parse, rule
from vgw import abi
from vgw.abi import Mode
from vgw.controller.endpoint import build_config
from vgw.controller.manifest import (
    EndpointEntry,
    Manifest,
    PolicyEntry,
    load_manifest,
    save_manifest,
)
from vgw.controller.policy_store import PolicyStore
from vgw.controller.rule_counts import RuleCounts, load_counts, save_counts
from vgw.maps import RuleCount
from vgw.policy.compile import compile_policy
from vgw.policy.model import EffectivePolicy, Hook
from vgw.policy.resolve import effective_policy

_BODY: Final = b',"body":'
_DIGEST: Final = "0123456789abcdef" * 4


def _manifest() -> Manifest:
    document = parse(rule("from: [office], services: [http]"))
    (interface,) = document.vms["web01"].interfaces
    entry = EndpointEntry(4711, interface, Hook.TC)
    policy = PolicyEntry(
        dict.fromkeys(abi.Path, _DIGEST), dict.fromkeys(abi.Path, 3), True, document.defaults
    )
    return Manifest(
        "web01",
        generation=7,
        mode=Mode.MONITOR,
        mode_override=Mode.ENFORCE,
        policy=document.digest,
        named=True,
        endpoints={"tap1": entry},
        extra=("tap9",),
        policies={6: replace(policy, defaults=None), 7: policy},
    )


class StateTarget:
    """Gives an input to every reader of state files; what none takes is none."""

    has_structure = True
    words: Sequence[bytes] = (_BODY, b'"schema":', b'"abi":', b"vgw/manifest/v2", b"{", b"}", b"[")

    def __init__(self) -> None:
        self._root = Path()
        #: A whole file of names, beside which one of matches is read.
        self._names = b""

    def seeds(self) -> Sequence[bytes]:
        """Return a file of each kind."""
        with quick_directory() as directory:
            file = directory / "seed"
            save_manifest(file, _manifest())
            found = [file.read_bytes()]
            save_counts(file, RuleCounts({"ingress/vm/p/r": RuleCount(1, 2, 3)}, {4711: 6}))
            found.append(file.read_bytes())
            found += _files_of_rules(directory)
        return [*found, b"", b"{}", _BODY, b'{"schema":1,"checksum":[]' + _BODY + b"{}}"]

    def shape(self, chance: random.Random, data: bytes) -> bytes:
        """Return the input with a right checksum, mostly, and often a change within its body."""
        head, middle, rest = data.partition(_BODY)
        if not middle or chance.random() < 0.25:
            return data
        body = rest.removesuffix(b"}")
        with suppress(ValueError, RecursionError):
            value = json.loads(body)
            for _ in range(chance.choice((0, 1, 1, 2, 4))):
                value = mutate_json(chance, value)
            body = dumped(value)
        with suppress(ValueError, TypeError, RecursionError):
            described = json.loads(head + b"}")
            described["checksum"] = hashlib.sha256(body).hexdigest()
            head = dumped(described).removesuffix(b"}")
        return head + _BODY + body + b"}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a state directory, of which nothing need survive a crash of the host."""
        with (
            quick_directory() as directory,
            mock.patch.object(os, "fsync"),
        ):
            self._root = directory
            self._names, _ = _files_of_rules(self._root)
            yield

    def give(self, data: bytes) -> Hashable:
        """Read an input as each kind of file, and use what comes of it."""
        file = self._root / "state.json"
        file.write_bytes(data)
        manifest = load_manifest(file)
        if manifest is not None:
            _use(manifest)
            _require_equal(manifest, save_manifest, load_manifest, self._root / "again.json")
        counts = load_counts(file)
        if counts != RuleCounts():
            _require_equal(counts, save_counts, load_counts, self._root / "again.json")
        return (manifest is None, counts == RuleCounts(), *self._rules(data))

    def _rules(self, data: bytes) -> tuple[object, ...]:
        """Read an input as the rules of a policy: beside the file of the other kind."""
        store = PolicyStore(self._root / "policies")
        directory = self._root / "policies" / _DIGEST
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "names.json").write_bytes(data)
        labels = store.labels(_DIGEST)
        json.dumps([each.key for each in labels or ()])
        (directory / "names.json").write_bytes(self._names)
        (directory / "matches.json").write_bytes(data)
        rules = store.rules(_DIGEST)
        if rules is not None:
            compile_policy(EffectivePolicy("web01", ingress=rules))
        return labels is None, rules is None


def _files_of_rules(root: Path) -> tuple[bytes, bytes]:
    """Return the files of names and of matches of a policy."""
    document = parse(rule("from: [office], services: [http, ping]"))
    image = compile_policy(effective_policy(document, "web01"))[abi.Path.TO_VM]
    store = PolicyStore(root / "seeds")
    store.keep_names(image.digest, image.rules)
    store.keep_matches(image.digest, image.rules)
    directory = root / "seeds" / image.digest
    return (directory / "names.json").read_bytes(), (directory / "matches.json").read_bytes()


def _use(manifest: Manifest) -> None:
    """Do with a manifest what the controller does first."""
    sorted(manifest.digests())
    sorted(manifest.extra)
    manifest.current()
    for generation in (manifest.generation, manifest.generation + 1):
        manifest.in_generation(str.upper)(generation, abi.Path.TO_VM)
    for entry in manifest.endpoints.values():
        build_config(
            entry.interface, manifest.effective_mode, manifest.generation, entry.endpoint, 0
        )


def _require_equal(
    value: Any, save: Callable[[Path, Any], None], load: Callable[[Path], Any], file: Path
) -> None:
    save(file, value)
    if load(file) != value:
        raise WrongError("what was read is not what it is when it is written and read again")
