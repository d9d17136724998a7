# SPDX-License-Identifier: Apache-2.0
"""Rule lookup alone, in the kernel: an image and many queries in, answers and times out.

bpf/policy_probe.c runs the lookup of the packet programs on a table of queries, one each run; tests
compare its answers, measurements its times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vgw import abi, libbpf, loader
from vgw.controller.images import PrivateImage
from vgw.maps_images import ImagePlace

#: struct policy_query in bpf/abi.h.
QUERY: Final = np.dtype(
    [
        ("fields", "=u4", (4, 4)),
        ("path", "u1"),
        ("ipv6", "u1"),
        ("ordinary", "u1"),
        ("pad", "u1", (5,)),
    ]
)
#: struct probe_answer in bpf/policy_probe.c.
ANSWER: Final = np.dtype([("verdict", "=u4"), ("reason", "=u4"), ("rule", "=u4"), ("flags", "=u4")])
_STATE: Final = np.dtype([("next", "=u8"), ("last", "=u8"), ("look", "=u8"), ("unused", "=u8")])
_FRAME: Final = bytes(64)
_PROGRAM: Final = "policy_probe"

Queries = npt.NDArray[np.void]
Answers = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class LookupTimes:
    """Mean ns of a lookup, by run: what a program takes that reads a query, less one without."""

    net_ns: list[float]
    harness_ns: list[float]


class PolicyProbe:
    """The probe program with maps of its own, for at most `size` queries at a time."""

    def __init__(self, artefact: loader.Artefact, size: int = 1 << 16) -> None:
        """Load the program; `size` is a power of two. Raises KernelError."""
        self._artefact = artefact
        self._size = size
        entries = {"probe_queries": size, "probe_answers": size}
        self._instance = loader.instantiate(artefact, (_PROGRAM,), max_entries=entries)

    def __enter__(self) -> PolicyProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back to the kernel."""
        self._instance.close()

    def set_image(self, path: abi.Path, image: bytes) -> None:
        """Judge queries of a path by a compiled policy from now on."""
        place = ImagePlace(self._instance.maps, abi.policy_place(0, path))
        PrivateImage(self._artefact, image).put(place)

    def ask(self, queries: Queries) -> Answers:
        """Return the answer to each of at most `size` queries."""
        count = len(queries)
        self._put_queries(queries)
        self._set_state(look=True)
        self._run(count)
        return self._answers()[:count]

    def measure(self, queries: Queries, runs: int, lookups: int) -> LookupTimes:
        """Time lookups of queries, whose number is a power of two, in turn with doing nothing.

        `lookups` are made in each of `runs`, after each query was looked up once.
        """
        self._put_queries(queries)
        self._set_state(look=True, last=len(queries) - 1)
        self._run(len(queries))
        times = LookupTimes([], [])
        for _ in range(runs):
            self._set_state(look=False, last=len(queries) - 1)
            harness = self._run(lookups)
            self._set_state(look=True, last=len(queries) - 1)
            whole = self._run(lookups)
            times.harness_ns.append(float(harness))
            times.net_ns.append(float(whole - harness))
        return times

    def _run(self, times: int) -> int:
        program = self._instance.programs[_PROGRAM]
        return libbpf.prog_test_run(program, _FRAME, repeat=times).duration_ns

    def _put_queries(self, queries: Queries) -> None:
        libbpf.map_fill(self._instance.maps["probe_queries"], queries.tobytes(), QUERY.itemsize)

    def _set_state(self, *, look: bool, last: int | None = None) -> None:
        state = np.zeros(1, _STATE)
        state["last"] = self._size - 1 if last is None else last
        state["look"] = look
        libbpf.map_update(self._instance.maps["probe_state"], bytes(4), state.tobytes())

    def _answers(self) -> Answers:
        fd = self._instance.maps["probe_answers"]
        values = b"".join(value for _, value in libbpf.map_entries(fd, 4, ANSWER.itemsize))
        return np.frombuffer(values, ANSWER)
