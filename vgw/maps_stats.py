# SPDX-License-Identifier: Apache-2.0
"""The packet counters of endpoints, read out of their `stats` maps and summed over the CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from vgw import abi, libbpf

_WORDS: Final = 2
_WORD_BYTES: Final = 8
#: Counters that are compared with zero at once.
_BLOCK: Final = 32
_PARTS: Final = tuple(abi.stats_parts())
#: What each counter counts that can count.
_LABELS: Final = {
    index: abi.stats_labels(index)
    for first, count in _PARTS
    for index in range(first, first + count)
    if index % abi.REASON_SLOTS < len(abi.Reason)
}


class Counter(NamedTuple):
    """Packets and wire bytes."""

    packets: int
    bytes: int


Stats = Mapping[tuple[abi.Path, abi.Verdict, abi.Reason], Counter]


class StatsReads:
    """Reads the counters of one endpoint after the other; for one thread at a time.

    What is returned are the counters in a map that are not zero. Methods raise KernelError.
    """

    def __init__(self) -> None:
        self._size = _WORDS * _WORD_BYTES * libbpf.possible_cpus()
        judged = [part for part in _PARTS if not _is_monitored(part)]
        self._judged = libbpf.PartReads(self._size, judged)
        self._monitored = libbpf.PartReads(self._size, filter(_is_monitored, _PARTS))

    def all(self, fd: int) -> Stats:
        """Return all counters."""
        return {**self.judged(fd), **self.monitored(fd)}

    def judged(self, fd: int) -> Stats:
        """Return those of what was judged as policy says."""
        return self._counters(self._judged, fd)

    def monitored(self, fd: int) -> Stats:
        """Return those of what would have been dropped, which count in monitor mode alone."""
        return self._counters(self._monitored, fd)

    def _counters(self, reads: libbpf.PartReads, fd: int) -> Stats:
        found: dict[tuple[abi.Path, abi.Verdict, abi.Reason], Counter] = {}
        for first, data in reads.read(fd):
            for place in _used(data, self._size):
                found[_LABELS[first + place]] = _sum_of_cpus(data, place, self._size)
        return found


def flood_drops(fd: int) -> dict[abi.FloodDrop, Counter]:
    """Return what was dropped of floods, by an endpoint's `stats` map. Raises KernelError."""
    size = _WORDS * _WORD_BYTES * libbpf.possible_cpus()
    data = libbpf.array_values(fd, size, abi.FIRST_FLOOD_DROP, len(abi.FloodDrop))
    return {each: _sum_of_cpus(data, each, size) for each in abi.FloodDrop}


def _is_monitored(part: tuple[int, int]) -> bool:
    return _LABELS[part[0]][1] is abi.Verdict.WOULD_DROP


def _used(data: bytes, size: int) -> Iterator[int]:
    """Yield the index of each value that is not zero, of values of `size` bytes; most are."""
    block = _BLOCK * size
    nothing, none = bytes(block), bytes(size)
    for start in range(0, len(data), block):
        part = data[start : start + block]
        if part != nothing[: len(part)]:
            for place in range(start, start + len(part), size):
                if data[place : place + size] != none:
                    yield place // size


def _sum_of_cpus(data: bytes, place: int, size: int) -> Counter:
    """Return a packet counter of several, of which each is `size` bytes with the parts of CPUs."""
    numbers = memoryview(data)[place * size : (place + 1) * size].cast("Q").tolist()
    return Counter(sum(numbers[0::2]), sum(numbers[1::2]))
