# SPDX-License-Identifier: Apache-2.0
"""What is read of many maps in one go is what single questions answer."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from vgw import abi, libbpf
from vgw.errors import KernelError
from vgw.libbpf import EntryReads, MapType, PartReads
from vgw.libbpf.library import ENOTSUPP

pytestmark = pytest.mark.bpf

ARRAYS = 5


@pytest.fixture
def arrays() -> Iterator[list[int]]:
    """Arrays of two RejectMeters; array n has sent n, and 10 + n in the second."""
    made = []
    for number in range(ARRAYS):
        fd = libbpf.map_create(MapType.ARRAY, "meter", 4, 40, 2)
        for index in range(2):
            meter = abi.RejectMeter(sent=10 * index + number)
            libbpf.map_update(fd, struct.pack("=I", index), bytes(meter))
        made.append(fd)
    yield made
    for fd in made:
        os.close(fd)


def test_an_element_of_each_array_is_read(arrays: list[int]) -> None:
    reads = EntryReads(arrays, abi.RejectMeter, 2)
    assert [meter.sent for meter in reads.read()] == [0, 1, 2, 3, 4]
    assert [meter.sent for meter in reads.read([1, 0, 1, 0, 1])] == [10, 1, 12, 3, 14]
    libbpf.map_update(arrays[0], bytes(4), bytes(abi.RejectMeter(sent=99)))
    assert [meter.sent for meter in reads.read()] == [99, 1, 2, 3, 4]
    assert len(EntryReads([], abi.RejectMeter).read()) == 0


def test_an_array_that_cannot_be_read_is_an_error(arrays: list[int]) -> None:
    reads = EntryReads([*arrays[:2], 99_999], abi.RejectMeter)
    with pytest.raises(KernelError, match="cannot read from a map: Bad file descriptor"):
        reads.read()


@pytest.fixture
def counters() -> Iterator[int]:
    """A per-CPU array of 64 counters, of which some have counted on each CPU."""
    fd = libbpf.map_create(MapType.PERCPU_ARRAY, "stats", 4, 16, 64)
    for index in (0, 3, 40, 63):
        values = [index + cpu for cpu in range(2 * libbpf.possible_cpus())]
        libbpf.map_update(fd, struct.pack("=I", index), struct.pack(f"={len(values)}Q", *values))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("batches", [True, False])
def test_parts_are_those_of_the_whole(
    counters: int, monkeypatch: pytest.MonkeyPatch, batches: bool
) -> None:
    """Also on kernels that read no batches of such arrays."""
    size = 16 * libbpf.possible_cpus()
    whole = libbpf.array_values(counters, size)
    if not batches:
        monkeypatch.setattr(libbpf.library(), "bpf_map_lookup_batch", lambda *_: -ENOTSUPP)
    reads = PartReads(size, [(0, 2), (2, 5), (60, 4)])
    for _ in range(2):
        for first, data in reads.read(counters):
            assert data == whole[first * size : first * size + len(data)]
    assert [len(data) // size for _, data in reads.read(counters)] == [2, 5, 4]


def test_parts_of_what_is_no_map_are_an_error() -> None:
    with pytest.raises(KernelError, match="cannot read an array"):
        list(PartReads(16, [(0, 1)]).read(99_999))


def test_lists_of_many_interfaces_are_those_of_each() -> None:
    """Also while programs and interfaces come and go; in a namespace of its own."""
    code = """
    import os, socket, subprocess
    from vgw import libbpf
    from vgw.libbpf import AttachType, ProgType

    names = [f"tap{n}" for n in range(3)]
    for name in names:
        subprocess.run(["ip", "tuntap", "add", name, "mode", "tap"], check=True)
    indexes = [socket.if_nametoindex(name) for name in names]
    lists = libbpf.TcxLists()
    program = libbpf.prog_load(ProgType.SCHED_CLS, "p", bytes([0xB7] + 7 * [0] + [0x95] + 7 * [0]))
    number = libbpf.prog_info(program).id.to_bytes(4, "little")

    assert lists.read(indexes) == [(b"", b"")] * 3
    ingress = libbpf.link_create(program, indexes[0], AttachType.TCX_INGRESS)
    egress = libbpf.link_create(program, indexes[2], AttachType.TCX_EGRESS)
    attached = [(number, b""), (b"", b""), (b"", number)]
    assert lists.read(indexes) == attached
    assert lists.read(indexes[::-1]) == attached[::-1]
    second = libbpf.link_create(
        libbpf.prog_load(ProgType.SCHED_CLS, "q", bytes([0xB7] + 7 * [0] + [0x95] + 7 * [0])),
        indexes[0], AttachType.TCX_INGRESS,
    )
    (both, _), *rest = lists.read(indexes)
    assert memoryview(both).cast("I").tolist() == libbpf.tcx_programs(indexes[0], 46)
    assert len(both) == 8 and rest == attached[1:]
    os.close(second)
    assert lists.read(indexes) == attached
    subprocess.run(["ip", "link", "del", names[0]], check=True)
    assert lists.read(indexes) == [(b"", b"")] + attached[1:]
    assert lists.read([0, *indexes]) == [(b"", b"")] * 2 + attached[1:]
    assert lists.read([]) == []
    """
    subprocess.run(
        ["unshare", "--net", sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),  # noqa: PTH120
    )
