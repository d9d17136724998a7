# SPDX-License-Identifier: Apache-2.0
"""The loaded programs as a quick engine: a verdict costs two system calls.

tests/program_engine.py reads all counters for each packet. This one reads the decision from the
work memory of the CPU that it is pinned to, and holds the counters against the sum of what it
read with `audit`.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, Unpack

from tests.engines import Beside, CannotRunError, Outcome
from tests.fuzz.work_memory import FIELDS, WorkMemory
from tests.program_engine import (
    LONGEST_FRAME,
    NO_POLICY,
    SHORTEST_FRAME,
    SHORTEST_SKB,
    TC_CODES,
    XDP_CODES,
    ProgramEngine,
    _gso_context,
    is_tagged,
)
from vgw import abi, libbpf, loader
from vgw.abi import Path, Reason, Verdict
from vgw.libbpf import MapType
from vgw.libbpf.library import check, library
from vgw.libbpf.programs import _TestRunOpts
from vgw.policy.compile import PolicyImage
from vgw.policy.guards import EndpointFacts
from vgw.policy.model import EffectivePolicy, Hook

#: Arrays that are no state of connections: what judges and what counts. All others are zeroed
#: between sequences, so that state that is added to the programs needs no word here.
NO_STATE: Final = frozenset({"active", "configs", "stats", "scratch", "event_meter"})
_ARRAYS: Final = (MapType.ARRAY, MapType.PERCPU_ARRAY)
#: Map types that this module tells from the others and libbpf.MapType does not name.
_LRU_HASH: Final = 9
_TABLES: Final = (MapType.HASH, _LRU_HASH)
#: Maps of maps, programs and readers.
_REFERENCES: Final = (*libbpf.MAPS_OF_MAPS, MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY)
_MOST_ELEMENTS: Final = 16
_VERDICTS: Final = tuple(Verdict)
_REASONS: Final = tuple(Reason)
_OUTPUT_ROOM: Final = 512
_FIRST: Final = bytes(4)
_MOST_SIZES: Final = LONGEST_FRAME + _OUTPUT_ROOM


#: Reasons of accepted packets of flows; those that were judged anew were accepted by a rule again.
_OF_FLOWS: Final = frozenset({Reason.CT_ESTABLISHED, Reason.CT_RELATED})
#: The fields of the work memory that are numbers.
NUMBERS: Final = tuple(name for name in FIELDS if name != "key")
_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_Key = ctypes.Array[ctypes.c_char]
_Reader = Callable[[Any, int], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Held:
    """What a slot of policies holds."""

    policy: EffectivePolicy | None
    images: dict[Path, PolicyImage]


class AuditError(AssertionError):
    """The counters do not say what was read from the work memory."""


class _Runner:
    """Test runs of one program, with the buffers of the one before."""

    def __init__(self, fd: int, context: bytes) -> None:
        self._fd = fd
        self._output = ctypes.create_string_buffer(_MOST_SIZES)
        self._address = ctypes.addressof(self._output)
        self._opts = _TestRunOpts(ctypes.sizeof(_TestRunOpts), data_out=self._address, repeat=1)
        if context:
            self._opts.ctx_in = context
            self._opts.ctx_size_in = len(context)
        self._reference = ctypes.byref(self._opts)
        self._call = library().bpf_prog_test_run_opts

    def run(self, frame: bytes) -> int:
        """Run the program on a frame and return its code."""
        opts = self._opts
        opts.data_in = frame
        opts.data_size_in = len(frame)
        opts.data_size_out = _MOST_SIZES
        check(self._call(self._fd, self._reference), "run a program on a packet")
        code: int = opts.retval
        return code

    def left(self) -> bytes:
        """Return the frame as the program left it."""
        return ctypes.string_at(self._address, self._opts.data_size_out)


class QuickEngine(ProgramEngine):
    """A ProgramEngine for millions of packets, to be used on one CPU only."""

    def __init__(
        self,
        artefact: loader.Artefact,
        hook: Hook,
        facts: EndpointFacts,
        policy: EffectivePolicy | None,
        *,
        conntrack_max: int,
        memory: WorkMemory,
    ) -> None:
        """Make the engine; the caller has pinned itself to one CPU."""
        (self._cpu,) = os.sched_getaffinity(0)
        self._held: dict[int, _Held] = {}
        super().__init__(artefact, hook, facts, policy, conntrack_max)
        spec = artefact.maps["scratch"]
        assert spec.value_size == memory.size, "struct scratch is not what gcc makes of it"
        self._scratch = ctypes.create_string_buffer(memory.size * libbpf.possible_cpus())
        self._base = self._cpu * memory.size
        self._key_place = memory.places["key"]
        self._unpack, self._in_order = _reader(memory)
        programs = {Path.FROM_VM: self._from_vm, Path.TO_VM: "tc_to_vm"}
        self._runners = {
            (path, gso): _Runner(self._instance.programs[name], _gso_context() if gso else b"")
            for path, name in programs.items()
            for gso in (False, True)
            if not (gso and name == "xdp_from_vm")
        }
        self._pass_codes = {
            path: (XDP_CODES if name == "xdp_from_vm" else TC_CODES)[True]
            for path, name in programs.items()
        }
        self._lookup = library().bpf_map_lookup_elem
        self._scratch_fd = self.fd("scratch")
        self._tables, self._arrays = _state_maps(artefact, self._instance.maps)

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        is_xdp = path is Path.FROM_VM and self._hook is Hook.XDP
        if len(frame) < SHORTEST_FRAME or len(frame) > LONGEST_FRAME:
            raise CannotRunError("a test run takes no frame of this length")
        if not is_xdp and len(frame) < SHORTEST_SKB.get(frame[12] << 8 | frame[13], 0):
            raise CannotRunError("a test run takes no frame of this length")
        runner = self._runners.get((path, beside.get("gso", False)))
        if runner is None or is_tagged(beside):
            raise CannotRunError("a test run has no such metadata")
        code = runner.run(frame)
        outcome = self._decision(path)
        passes = outcome.verdict in {Verdict.ACCEPT, Verdict.WOULD_DROP}
        assert (code == self._pass_codes[path]) is passes, f"{outcome} but return code {code}"
        # What is rejected may be turned into its answer.
        if outcome.verdict is not Verdict.REJECT:
            assert runner.left() == frame, "the program changed the packet"
        return outcome

    def set_policy(self, policy: EffectivePolicy | None) -> None:
        """Put a policy in force; quick for one that a slot holds already."""
        active = self.maps.active_slot()
        for slot, held in self._held.items():
            if held.policy is policy:
                self._flip(slot, held)
                break
        else:
            super().set_policy(policy)
            self._held[1 - active] = _Held(policy, self._images)
        self._start_counting()

    def set_facts(self, facts: EndpointFacts) -> None:
        super().set_facts(facts)
        self._forget_the_spare_slot()

    def set_grace(self, seconds: float) -> None:
        before = self._grace_until_ns
        super().set_grace(seconds)
        if self._grace_until_ns != before:
            self._forget_the_spare_slot()

    def _forget_the_spare_slot(self) -> None:
        """Take note of a change of the configuration alone: the other slot has the one before."""
        self._held = {self.maps.active_slot(): _Held(self._policy, self._images)}
        self._start_counting()

    def _start_counting(self) -> None:
        self._keys = {path: [rule.key for rule in self._images[path].rules] for path in Path}
        self._known: dict[tuple[Path, tuple[int, ...]], Outcome] = {}
        self._counts: Tally[tuple[Path, Verdict, Reason]] = Tally()
        self._stats_before = self.maps.stats()
        self._rule_counts = Tally(self._rule_hits())

    def _flip(self, slot: int, held: _Held) -> None:
        """Put in force, under a new generation, what a slot holds."""
        self._policy, self._images = held.policy, held.images
        self._generation += 1
        config = self.maps.config(slot)
        config.generation = NO_POLICY if held.policy is None else self._generation
        libbpf.map_update(self.fd("configs"), slot.to_bytes(4, sys.byteorder), bytes(config))
        self.maps.switch(slot)

    def reset(self) -> None:
        """Forget all state: every entry of every table, and what the arrays hold."""
        for fd, key in self._tables:
            while library().bpf_map_get_next_key(fd, None, key) == 0:
                libbpf.map_delete(fd, key.raw)
        for fd, index, zeros in self._arrays:
            libbpf.map_update(fd, index, zeros)

    def audit(self) -> None:
        """Hold the counters against the decisions since the policy came into force."""
        before, after = self._stats_before, self.maps.stats()
        moved = {
            labels: counter.packets - (before[labels].packets if labels in before else 0)
            for labels, counter in after.items()
        }
        moved = {labels: count for labels, count in moved.items() if count}
        if moved != self._counts:
            raise AuditError(f"counters: {moved}, decisions: {dict(self._counts)}")
        hits = self._rule_hits()
        if hits != self._rule_counts:
            raise AuditError(f"rule counters: {hits}, decisions: {dict(self._rule_counts)}")

    def _decision(self, path: Path) -> Outcome:
        """Read what was decided last on this CPU."""
        check(self._lookup(self._scratch_fd, _FIRST, self._scratch), "read the work memory")
        values = self._in_order(self._unpack(self._scratch, self._base))
        verdict, reason, rule, asked, rejudge, rule_path = values
        if asked and rejudge and reason in _OF_FLOWS:
            rule = self._rule_of_flow()
        memo = (path, (verdict, reason, rule, rule_path if rule != abi.NO_RULE else 0))
        outcome = self._known.get(memo)
        if outcome is None:
            rule_key = None if rule == abi.NO_RULE else self._keys[Path(rule_path)][rule]
            outcome = Outcome(_VERDICTS[verdict], _REASONS[reason], rule_key)
            self._known[memo] = outcome
        self._counts[path, outcome.verdict, outcome.reason] += 1
        if outcome.rule_key is not None:
            self._rule_counts[outcome.rule_key] += 1
        return outcome

    def _rule_of_flow(self) -> int:
        """Return the rule that confirmed the flow of the last packet, which its entry holds."""
        start = self._base + self._key_place.offset
        key = self._scratch.raw[start : start + self._key_place.size]
        value = libbpf.map_lookup(self.fd("conntrack"), key, ctypes.sizeof(abi.Flow))
        return abi.NO_RULE if value is None else int(abi.Flow.from_buffer_copy(value).rule)


def _reader(
    memory: WorkMemory,
) -> tuple[_Reader, Callable[[tuple[int, ...]], tuple[int, ...]]]:
    """Return what unpacks the numbers of a decision, and what puts them in the order of FIELDS."""
    places = [memory.places[name] for name in NUMBERS]
    by_offset = sorted(range(len(places)), key=lambda number: places[number].offset)
    layout, end = "=", 0
    for number in by_offset:
        place = places[number]
        layout += f"{place.offset - end}x{_CODES[place.size]}"
        end = place.offset + place.size
    order = sorted(range(len(places)), key=by_offset.__getitem__)
    return struct.Struct(layout).unpack_from, itemgetter(*order)


def _state_maps(
    artefact: loader.Artefact, fds: Mapping[str, int]
) -> tuple[list[tuple[int, _Key]], list[tuple[int, bytes, bytes]]]:
    """Return the tables with room for a key, and every element of the arrays with its zeros."""
    tables, arrays = [], []
    for name, fd in fds.items():
        spec = artefact.maps[name]
        if spec.map_type in _TABLES:
            tables.append((fd, ctypes.create_string_buffer(spec.key_size)))
        elif spec.map_type in _ARRAYS and name not in NO_STATE:
            copies = libbpf.possible_cpus() if spec.map_type in libbpf.PER_CPU else 1
            zeros = bytes(-(-spec.value_size // 8) * 8 * copies)
            for index in range(spec.max_entries):
                arrays.append((fd, index.to_bytes(4, sys.byteorder), zeros))
        else:
            assert name in NO_STATE or spec.map_type in _REFERENCES, f"is {name} any state?"
    assert len(arrays) <= _MOST_ELEMENTS, "so many elements take too long to zero"
    return tables, arrays
