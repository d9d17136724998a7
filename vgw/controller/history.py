# SPDX-License-Identifier: Apache-2.0
"""The last policies that were applied: texts, number, when, by whom, and what became of the VMs.

An entry is written before its policy can be in force anywhere, and completed afterwards: without an
outcome, whoever applied it was killed on the way. The newest entry for the whole host is the
policy of this host, and so the last good one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vgw import files
from vgw.controller.actor import Actor, actor_from_json, one_line
from vgw.controller.batch import AttachResult
from vgw.controller.documents import Documents
from vgw.controller.events import timestamp
from vgw.controller.machine import machine_id
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.pins import entries
from vgw.controller.state_file import read_state, remove_state, write_state
from vgw.controller.window import load_window
from vgw.errors import VgwError
from vgw.policy.parse import Sources

#: Policies that are kept, and bytes that their texts may take on disk; the one in force and the one
#: to go back to stay whatever they take.
KEPT: Final = 20
KEPT_BYTES: Final = 256 << 20
#: Entry.confirm of a policy that waits to be confirmed.
ARMED: Final = "armed"
_UNDONE: Final = ("rolled_back", "superseded")
_SCHEMA: Final = "vgw/history/v1"
#: VMs that an outcome names; the others are only counted.
_NAMED: Final = 100
_DAMAGED: Final = (ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the VMs: how many, and which of them, up to a limit.

    `failures` says why a VM failed, `kept` are those that the policy does not name (any more).
    """

    changed: int = 0
    unchanged: int = 0
    failed: int = 0
    vms: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One applied policy. `time` is the wall clock's, `names` are the files its texts came from.

    `source` is the digest of this host's policy file or directory as it was then, None when it
    could not be read. `vms` None: it is the host's policy, otherwise only that of some VMs. `back`
    is the number that a rollback went back to, or that is gone back to unless this is confirmed.
    `window` is the id of the window for that, and `confirm` what became of it: armed, confirmed,
    superseded, rolled_back or failed.
    """

    event: str
    digest: str
    names: tuple[str, ...]
    who: Actor
    source: str | None = None
    vms: tuple[str, ...] | None = None
    revision: int | None = None
    back: int | None = None
    window: str | None = None
    confirm: str | None = None
    number: int = 0
    time: str = ""
    outcome: Outcome | None = None

    @property
    def is_held(self) -> bool:
        """Whether a user put it in force although this host's policy file said something else."""
        return self.event in ("apply", "rollback") and self.digest != self.source


def outcome_of(results: Sequence[AttachResult], failures: Mapping[str, str]) -> Outcome:
    """Return what became of VMs, in a bounded size."""
    changed = [each.vm for each in results if each.changed]
    named = sorted(failures)[:_NAMED]
    return Outcome(
        changed=len(changed),
        unchanged=len(results) - len(changed),
        failed=len(failures),
        vms=tuple(changed[:_NAMED]),
        failures={vm: one_line(failures[vm]) for vm in named},
        kept=tuple(each.vm for each in results if each.kept)[:_NAMED],
    )


class History:
    """The entries in the state directory. Whoever writes holds the host's writer lock."""

    def __init__(self, paths: Paths) -> None:
        """Use the state directory of `paths`."""
        self._paths = paths
        self._directory = paths.state_dir / "history"
        self.documents = Documents(self._directory / "texts")

    def numbers(self) -> list[int]:
        """Return the numbers of all entries, damaged ones too, in their order."""
        names = (file.stem for file in entries(self._directory) if file.suffix == ".json")
        return sorted(int(name) for name in names if name.isdecimal())

    def entries(self) -> list[Entry]:
        """Return the entries in their order, without those that are damaged."""
        found = map(self.entry, self.numbers())
        return [entry for entry in found if entry is not None]

    def entry(self, number: int) -> Entry | None:
        """Return an entry by its number, None when there is none or it is damaged."""
        body = read_state(self._file(number), _SCHEMA)
        try:
            return None if body is None else _from_json(body, number)
        except _DAMAGED:
            return None

    def get(self, number: int) -> Entry:
        """Return an entry by its number. Raises VgwError when it is not known or damaged."""
        entry = self.entry(number)
        if entry is not None:
            return entry
        known = self.numbers()
        if number in known:
            raise VgwError(f"policy {number} is damaged and cannot be used; choose another one")
        kept = f"{known[0]} to {known[-1]} are" if known else "none is"
        raise VgwError(f"policy {number} is not kept, {kept}; see `vgw history`")

    def current(self) -> Entry | None:
        """Return the entry of this host's policy; None when there is none, or it is damaged."""
        for number in reversed(self.numbers()):
            entry = self.entry(number)
            if entry is None:
                return None  # perhaps it was the one: an older one is not taken instead
            if entry.vms is None:
                return entry
        return None

    def before(self) -> Entry:
        """Return the newest other policy of this host before the current one. Raises VgwError.

        Not one that was undone because nobody confirmed it.
        """
        current = self.current()
        if current is None:
            raise VgwError("the policy in force is not known; name one, see `vgw history`")
        for entry in reversed(self.entries()):
            was_in_force = entry.vms is None and entry.confirm not in _UNDONE
            if was_in_force and entry.number < current.number and entry.digest != current.digest:
                return entry
        raise VgwError(f"there is no other policy before {current.number}; see `vgw history`")

    def sources(self, entry: Entry) -> list[tuple[str, str]]:
        """Return (name, text) of an entry's files. Raises VgwError when they are damaged."""
        texts = self.documents.texts(entry.digest)
        if texts is None:
            raise VgwError(
                f"the texts of policy {entry.number} are lost or damaged; choose another one"
            )
        return list(zip(entry.names, texts, strict=True))

    def find(self, wanted: Callable[[Entry], bool]) -> Entry | None:
        """Return the newest entry that is wanted."""
        newest_first = map(self.entry, reversed(self.numbers()))
        return next((each for each in newest_first if each is not None and wanted(each)), None)

    def begin(self, draft: Entry, sources: Sources, needed: Sequence[int] = ()) -> Entry:
        """Write an entry without an outcome, under the next number. Raises VgwError.

        Older ones than the last KEPT are forgotten, but for `needed`, the current one, one that
        waits to be confirmed and the one before it.
        """
        self.documents.keep(draft.digest, [text for _, text in sources])
        number = max(self.numbers(), default=0) + 1
        entry = dataclasses.replace(draft, number=number, time=timestamp(time.time_ns()))
        self.save(entry)
        self._prune({*needed, number})
        return entry

    def save(self, entry: Entry) -> None:
        """Write an entry anew, with its outcome or what became of its window."""
        body = {"machine": machine_id(), "entry": dataclasses.asdict(entry)}
        write_state(self._file(entry.number), _SCHEMA, body)

    def withdraw(self, entry: Entry) -> None:
        """Forget an entry whose policy is in force nowhere."""
        remove_state(self._file(entry.number))
        self._forget_texts()

    def _prune(self, needed: set[int]) -> None:
        known = self.entries()
        current = next((entry for entry in reversed(known) if entry.vms is None), None)
        needed = needed if current is None else {*needed, current.number}
        for entry in known:
            if entry.confirm == ARMED:
                needed |= {entry.number, entry.back or 0}
        for number in set(self.numbers()[:-KEPT]) - needed:
            self._remove(number, known)
        sizes = self.documents.sizes()
        for entry in list(known):
            digests = {other.digest for other in known}
            if sum(sizes.get(digest, 0) for digest in digests) <= KEPT_BYTES:
                break
            if entry.number not in needed:
                self._remove(entry.number, known)
        self._forget_texts()

    def _remove(self, number: int, known: list[Entry]) -> None:
        remove_state(self._file(number))
        known[:] = [entry for entry in known if entry.number != number]

    def _forget_texts(self) -> None:
        """Forget texts of policies that no entry has and no VM runs."""
        wanted = {entry.digest for entry in self.entries()}
        if not wanted.issuperset(self.documents.sizes()):
            manifests = (load_manifest(file) for file in self._paths.manifests.glob("*.json"))
            wanted |= {manifest.policy for manifest in manifests if manifest is not None}
            window = load_window(self._paths)
            wanted.update(() if window is None else window.others.values())
            self.documents.remove_but(wanted)
        with contextlib.suppress(OSError):
            files.rmdir(self._directory)

    def _file(self, number: int) -> Path:
        return self._directory / f"{number}.json"


def _from_json(body: Mapping[str, Any], number: int) -> Entry:
    fields = dict(body["entry"])
    if body["machine"] != machine_id() or fields["number"] != number:
        raise ValueError("the state of another host, or of another entry")
    outcome, vms = fields["outcome"], fields["vms"]
    if outcome is not None:
        outcome = Outcome(
            **{**outcome, "vms": tuple(outcome["vms"]), "kept": tuple(outcome["kept"])}
        )
    return Entry(
        **{
            **fields,
            "names": tuple(fields["names"]),
            "who": actor_from_json(fields["who"]),
            "vms": None if vms is None else tuple(vms),
            "outcome": outcome,
        }
    )
