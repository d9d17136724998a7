# SPDX-License-Identifier: Apache-2.0
"""The kernel interface: maps, programs, links, pins and perf buffers behave as documented."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from vgw import libbpf
from vgw.errors import KernelError, VerifierError, VgwError
from vgw.libbpf import AttachType, MapFlag, MapType, PerfReader, ProgType, programs
from vgw.libbpf.library import ENOTSUPP
from vgw.libbpf.maps import BATCH_ENTRIES

LOOPBACK = 1
CLONE_NEWNS = 0x00020000
FRAME = bytes(12) + b"\x08\x00" + bytes(50)


def insn(code: int, registers: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, registers, offset, immediate)


def returns(value: int) -> bytes:
    """A program that returns `value`."""
    return insn(0xB7, 0, 0, value) + insn(0x95)


def outputs(map_fd: int) -> bytes:
    """A program that writes its packet's first 12 context bytes' worth of stack to a perf map."""
    return b"".join(
        (
            insn(0x7A, 10, -16, 0x11223344),  # u64 at r10-16
            insn(0x62, 10, -8, 0x55667788),  # u32 at r10-8
            insn(0x18, 0x12, 0, map_fd),
            insn(0),
            insn(0x18, 0x03, 0, -1),  # BPF_F_CURRENT_CPU
            insn(0),
            insn(0xBF, 0xA4),
            insn(0x07, 4, 0, -16),
            insn(0xB7, 5, 0, 12),
            insn(0x85, 0, 0, 25),  # perf_event_output
            insn(0x95),
        )
    )


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def test_every_symbol_exists_in_the_installed_library() -> None:
    library = libbpf.library()
    assert library is libbpf.library()
    assert library.libbpf_major_version() >= 1


def test_a_missing_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("libbpf.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    libbpf.library.cache_clear()
    try:
        with pytest.raises(VgwError, match="apt install libbpf1"):
            libbpf.library()
    finally:
        monkeypatch.undo()
        libbpf.library.cache_clear()


def test_importing_it_loads_no_compiler() -> None:
    code = "import sys, vgw.libbpf; sys.exit('bcc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.bpf
class TestMaps:
    def test_lookup_update_delete(self) -> None:
        with closing(libbpf.map_create(MapType.HASH, "table", 4, 8, 16, MapFlag.NO_PREALLOC)) as fd:
            assert libbpf.map_lookup(fd, u32(1), 8) is None
            libbpf.map_update(fd, u32(1), b"12345678")
            assert libbpf.map_lookup(fd, u32(1), 8) == b"12345678"
            assert libbpf.map_delete(fd, u32(1))
            assert not libbpf.map_delete(fd, u32(1))

    def test_info_is_what_was_created(self) -> None:
        name = "a_name_longer_than_the_kernel_keeps"
        with closing(libbpf.map_create(MapType.HASH, name, 4, 24, 5, MapFlag.NO_PREALLOC)) as fd:
            info = libbpf.map_info(fd)
            assert (info.map_type, info.key_size, info.value_size) == (MapType.HASH, 4, 24)
            assert (info.max_entries, info.flags) == (5, MapFlag.NO_PREALLOC)
            assert info.name == name[:15]
            assert libbpf.map_memory(fd) > 0

    def test_a_full_hash_reports_its_errno(self) -> None:
        with closing(libbpf.map_create(MapType.HASH, "table", 4, 8, 1)) as fd:
            libbpf.map_update(fd, u32(1), bytes(8))
            with pytest.raises(KernelError) as caught:
                libbpf.map_update(fd, u32(2), bytes(8))
        assert caught.value.errno == errno.E2BIG
        assert "\n" not in str(caught.value)

    def test_entries_of_a_large_hash(self) -> None:
        total = 20000
        with closing(libbpf.map_create(MapType.HASH, "table", 4, 8, total)) as fd:
            for index in range(total):
                libbpf.map_update(fd, u32(index), struct.pack("=Q", index * 3))
            found = dict(libbpf.map_entries(fd, 4, 8))
        assert found == {u32(index): struct.pack("=Q", index * 3) for index in range(total)}

    def test_entries_of_an_empty_map(self) -> None:
        with closing(libbpf.map_create(MapType.HASH, "table", 4, 8, 4)) as fd:
            assert list(libbpf.map_entries(fd, 4, 8)) == []

    def test_entries_without_batch_lookups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with closing(libbpf.map_create(MapType.HASH, "table", 4, 8, 100)) as fd:
            for index in range(100):
                libbpf.map_update(fd, u32(index), bytes(8))
            monkeypatch.setattr(libbpf.library(), "bpf_map_lookup_batch", lambda *_: -errno.EINVAL)
            assert {key for key, _ in libbpf.map_entries(fd, 4, 8)} == set(map(u32, range(100)))

    @pytest.mark.parametrize("batches", [0, 1])
    def test_entries_where_holes_end_a_batch(
        self, monkeypatch: pytest.MonkeyPatch, batches: int
    ) -> None:
        """Kernels without "bpf: skip non exist keys in generic_map_lookup_batch" say EINTR."""
        real, left = libbpf.library().bpf_map_lookup_batch, batches

        def old(*arguments: object) -> int:
            nonlocal left
            left -= 1
            return -errno.EINTR if left < 0 else int(real(*arguments))

        indices = {1, 7, BATCH_ENTRIES + 3}
        with (
            closing(libbpf.map_create(MapType.ARRAY, "inner", 4, 8, 1)) as inner,
            closing(
                libbpf.map_create(
                    MapType.ARRAY_OF_MAPS, "outer", 4, 4, BATCH_ENTRIES + 9, inner_fd=inner
                )
            ) as outer,
        ):
            for index in indices:
                libbpf.map_update(outer, u32(index), u32(inner))
            if batches:  # filled, so that the first batch has no hole
                libbpf.map_update_many(outer, {u32(n): u32(inner) for n in range(BATCH_ENTRIES)})
                indices |= set(range(BATCH_ENTRIES))
            monkeypatch.setattr(libbpf.library(), "bpf_map_lookup_batch", old)
            found = [key for key, _ in libbpf.map_entries(outer, 4, 4)]
        assert found == [u32(index) for index in sorted(indices)]

    def test_fill_writes_a_whole_array(self) -> None:
        words = struct.pack("=3000Q", *range(3000))
        with closing(libbpf.map_create(MapType.ARRAY, "words", 4, 8, 3000)) as fd:
            libbpf.map_fill(fd, words, 8)
            assert b"".join(value for _, value in libbpf.map_entries(fd, 4, 8)) == words
            with pytest.raises(KernelError):
                libbpf.map_fill(fd, words + bytes(8), 8)

    def test_fill_without_batch_updates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, keys: object, values: object, count: object, opts: object) -> int:
            del fd, keys, values, opts
            ctypes.cast(count, ctypes.POINTER(ctypes.c_uint32))[0] = 0  # type: ignore[arg-type]
            return -errno.EINVAL

        with closing(libbpf.map_create(MapType.ARRAY, "words", 4, 8, 4)) as fd:
            monkeypatch.setattr(libbpf.library(), "bpf_map_update_batch", refuse)
            libbpf.map_fill(fd, bytes(range(32)), 8)
            assert libbpf.map_lookup(fd, u32(3), 8) == bytes(range(24, 32))

    @pytest.mark.parametrize("batches", [True, False])
    def test_many_entries_are_written_at_once(
        self, monkeypatch: pytest.MonkeyPatch, batches: bool
    ) -> None:
        if not batches:
            refuse = lambda *_: -ENOTSUPP  # noqa: E731
            monkeypatch.setattr(libbpf.library(), "bpf_map_update_batch", refuse)
        with (
            closing(libbpf.map_create(MapType.ARRAY, "inner", 4, 8, 7)) as inner,
            closing(libbpf.map_create(MapType.ARRAY, "inner", 4, 8, 7)) as other,
            closing(
                libbpf.map_create(MapType.ARRAY_OF_MAPS, "outer", 4, 4, 4, inner_fd=inner)
            ) as outer,
        ):
            libbpf.map_update_many(outer, {u32(3): u32(inner), u32(1): u32(other)})
            ids = [libbpf.map_lookup(outer, u32(index), 4) for index in range(4)]
            assert ids == [
                None,
                u32(libbpf.map_info(other).id),
                None,
                u32(libbpf.map_info(inner).id),
            ]
            with pytest.raises(KernelError):
                libbpf.map_update_many(outer, {u32(0): u32(inner), u32(4): u32(inner)})

    @pytest.mark.parametrize("batches", [True, False])
    @pytest.mark.parametrize("entries", [1, 5, 20000])
    def test_all_values_of_an_array(
        self, monkeypatch: pytest.MonkeyPatch, batches: bool, entries: int
    ) -> None:
        words = struct.pack(f"={3 * entries}Q", *range(3 * entries))
        with closing(libbpf.map_create(MapType.ARRAY, "counters", 4, 24, entries)) as fd:
            libbpf.map_fill(fd, words, 24)
            if not batches:
                refuse = lambda *_: -errno.EINVAL  # noqa: E731
                monkeypatch.setattr(libbpf.library(), "bpf_map_lookup_batch", refuse)
            assert libbpf.array_values(fd, 24) == words
            for first in {0, 1, entries // 2, entries - 1} - {entries}:
                assert libbpf.array_values(fd, 24, first) == words[24 * first :]
                for count in {1, entries - first}:
                    part = words[24 * first :][: 24 * count]
                    assert libbpf.array_values(fd, 24, first, count) == part
        with pytest.raises(KernelError):
            libbpf.array_values(fd, 24)

    def test_a_map_of_maps_gives_the_id_of_its_inner_map(self) -> None:
        with (
            closing(libbpf.map_create(MapType.ARRAY, "inner", 4, 8, 7)) as inner,
            closing(
                libbpf.map_create(MapType.ARRAY_OF_MAPS, "outer", 4, 4, 1, inner_fd=inner)
            ) as outer,
        ):
            libbpf.map_update(outer, u32(0), u32(inner))
            value = libbpf.map_lookup(outer, u32(0), 4)
            assert value is not None
            assert int.from_bytes(value, sys.byteorder) == libbpf.map_info(inner).id

    def test_per_cpu_values_have_one_part_for_each_cpu(self) -> None:
        size = 8 * libbpf.possible_cpus()
        with closing(libbpf.map_create(MapType.PERCPU_ARRAY, "counts", 4, 8, 2)) as fd:
            libbpf.map_update(fd, u32(1), b"x" * size)
            assert libbpf.map_lookup(fd, u32(1), size) == b"x" * size

    def test_waiting_for_programs_leaks_nothing(self) -> None:
        before = open_fds()
        libbpf.wait_for_programs()
        assert open_fds() == before

    def test_a_bad_fd_is_an_error_with_its_errno(self) -> None:
        for call in (libbpf.map_info, libbpf.prog_info, libbpf.link_info):
            with pytest.raises(KernelError) as caught:
                call(10**6)
            assert caught.value.errno in {errno.EBADF, errno.EBADFD}
        with pytest.raises(KernelError):
            libbpf.map_memory(10**6)


@pytest.mark.bpf
class TestPrograms:
    def test_load_run_and_describe(self) -> None:
        with closing(libbpf.prog_load(ProgType.XDP, "returns_two", returns(2))) as fd:
            run = libbpf.prog_test_run(fd, FRAME, repeat=10)
            info = libbpf.prog_info(fd)
            with closing(libbpf.prog_fd_by_id(info.id)) as again:
                assert libbpf.prog_info(again) == info
        assert (run.retval, run.data_out) == (2, FRAME)
        assert (info.prog_type, info.name, info.map_ids) == (ProgType.XDP, "returns_two", ())

    def test_a_context_reaches_the_program(self) -> None:
        mark = insn(0x61, 0x10, 8) + insn(0x95)  # r0 = skb->mark
        context = struct.pack("=II", 0, 0) + u32(77) + bytes(180)
        with closing(libbpf.prog_load(ProgType.SCHED_CLS, "mark", mark)) as fd:
            assert libbpf.prog_test_run(fd, FRAME, ctx_in=context).retval == 77
            assert libbpf.prog_test_run(fd, FRAME).retval == 0

    def test_programs_name_their_maps(self) -> None:
        with (
            closing(libbpf.map_create(MapType.PERF_EVENT_ARRAY, "events", 4, 4, 1)) as events,
            closing(libbpf.prog_load(ProgType.SCHED_CLS, "output", outputs(events))) as fd,
        ):
            assert libbpf.prog_info(fd).map_ids == (libbpf.map_info(events).id,)

    def test_programs_may_use_more_maps_than_are_asked_for_at_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(programs, "_MAP_IDS", 1)
        with ExitStack() as stack:
            fds = [libbpf.map_create(MapType.ARRAY, f"map{n}", 4, 4, 1) for n in range(3)]
            for fd in fds:
                stack.callback(os.close, fd)
            uses = b"".join(insn(0x18, 0x11, 0, fd) + insn(0) for fd in fds) + returns(0)
            program = libbpf.prog_load(ProgType.SCHED_CLS, "uses", uses)
            stack.callback(os.close, program)
            ids = {libbpf.map_info(fd).id for fd in fds}
            assert set(libbpf.prog_info(program).map_ids) == ids

    def test_a_rejected_program_shows_the_end_of_the_log(self) -> None:
        with pytest.raises(VerifierError) as caught:
            libbpf.prog_load(ProgType.XDP, "no_return", insn(0x95))
        assert caught.value.errno == errno.EACCES
        assert "R0 !read_ok" in caught.value.log
        assert "no_return" in str(caught.value)
        assert len(caught.value.log.splitlines()) <= 20

    def test_a_log_larger_than_the_buffer_is_still_shown(self) -> None:
        code = insn(0xB7) * 200 + insn(0xBF, 0x70) + insn(0x95)  # ends with r0 = r7, unset
        with pytest.raises(VerifierError, match="R7 !read_ok") as caught:
            libbpf.prog_load(ProgType.XDP, "long_log", code, log_size=256)
        assert caught.value.errno == errno.EACCES


@pytest.mark.bpf
class TestPerfReader:
    @pytest.fixture
    def program(self) -> Iterator[tuple[int, int]]:
        cpus = libbpf.possible_cpus()
        with (
            closing(libbpf.map_create(MapType.PERF_EVENT_ARRAY, "events", 4, 4, cpus)) as events,
            closing(libbpf.prog_load(ProgType.SCHED_CLS, "output", outputs(events))) as fd,
        ):
            yield events, fd

    def test_records_arrive(self, program: tuple[int, int]) -> None:
        events, fd = program
        seen: list[bytes] = []
        with PerfReader(
            events, lambda _cpu, record: seen.append(record), lambda *_: None, wakeup_events=1
        ) as reader:
            libbpf.prog_test_run(fd, FRAME)
            assert reader.poll(1000) == 1
            libbpf.prog_test_run(fd, FRAME, repeat=3)
            assert reader.consume() == 3
            assert reader.poll(0) == 0
        assert {record[:12] for record in seen} == {struct.pack("=QI", 0x11223344, 0x55667788)}

    def test_loss_is_reported(self, program: tuple[int, int]) -> None:
        events, fd = program
        lost: list[int] = []
        seen: list[bytes] = []
        with PerfReader(
            events,
            lambda _cpu, record: seen.append(record),
            lambda _cpu, count: lost.append(count),
            pages=1,
        ) as reader:
            libbpf.prog_test_run(fd, FRAME, repeat=1000)
            first = reader.consume()
            libbpf.prog_test_run(fd, FRAME)  # the kernel reports a gap with the next record
            second = reader.consume()
        assert first + second == len(seen) < 1001
        assert len(seen) + sum(lost) == 1001

    def test_a_callback_that_fails_is_heard_and_loses_one_record(
        self, program: tuple[int, int]
    ) -> None:
        events, fd = program
        failures = [ValueError("first"), None, None]

        def fail_once(_cpu: int, _record: bytes) -> None:
            error = failures.pop(0)
            if error is not None:
                raise error

        with PerfReader(events, fail_once, lambda *_: None) as reader:
            libbpf.prog_test_run(fd, FRAME, repeat=3)
            with pytest.raises(ValueError, match="first"):
                reader.consume()
            assert reader.consume() == 2

    def test_a_closed_reader_takes_no_records(self, program: tuple[int, int]) -> None:
        events, fd = program
        before = open_fds()
        reader = PerfReader(events, lambda *_: None, lambda *_: None)
        reader.close()
        reader.close()
        assert open_fds() == before
        refused = libbpf.prog_test_run(fd, FRAME).retval
        assert ctypes.c_int32(refused).value == -errno.ENOENT
        with pytest.raises(KernelError):
            reader.poll(0)


def in_own_namespaces(code: str) -> None:
    """Run `code` in a process with its own network and mount namespaces."""
    script = ["unshare", "--net", "--mount", "--", sys.executable, "-c", code]
    done = subprocess.run(script, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.bpf
def test_tcx_links_run_first_and_are_listed() -> None:
    in_own_namespaces(f"""
import os
from vgw import libbpf
first = libbpf.prog_load({ProgType.SCHED_CLS:d}, "first", {returns(0)!r})
second = libbpf.prog_load({ProgType.SCHED_CLS:d}, "second", {returns(0)!r})
hook = libbpf.AttachType.TCX_EGRESS
assert libbpf.tcx_programs({LOOPBACK}, hook) == []
old = libbpf.link_create(first, {LOOPBACK}, hook)
new = libbpf.link_create(second, {LOOPBACK}, hook)
ids = [libbpf.prog_info(fd).id for fd in (second, first)]
assert libbpf.tcx_programs({LOOPBACK}, hook) == ids
info = libbpf.link_info(new)
assert (info.type, info.prog_id) == (libbpf.LinkType.TCX, ids[0]), info
assert (info.ifindex, info.attach_type) == ({LOOPBACK}, hook), info
libbpf.link_detach(new)
assert libbpf.tcx_programs({LOOPBACK}, hook) == ids[1:]
os.close(old)
assert libbpf.tcx_programs({LOOPBACK}, hook) == []
""")


@pytest.mark.bpf
def test_xdp_links_and_their_mode() -> None:
    in_own_namespaces(f"""
import errno, os
from vgw import libbpf
from vgw.errors import KernelError
from vgw.libbpf import xdp_query
program = libbpf.prog_load({ProgType.XDP:d}, "passes", {returns(2)!r})
assert libbpf.xdp_program({LOOPBACK}) is None
try:
    libbpf.link_create(program, {LOOPBACK}, libbpf.AttachType.XDP, libbpf.XDP_NATIVE)
except KernelError as error:
    assert error.errno == errno.EOPNOTSUPP, error
else:
    raise AssertionError("the loopback device has no native XDP")
link = libbpf.link_create(program, {LOOPBACK}, libbpf.AttachType.XDP, libbpf.XDP_GENERIC)
assert libbpf.xdp_program({LOOPBACK}) == (libbpf.prog_info(program).id, "generic")
info = libbpf.link_info(link)
assert (info.type, info.ifindex) == (libbpf.LinkType.XDP, {LOOPBACK}), info
assert info.attach_type == libbpf.AttachType.XDP
assert libbpf.xdp_programs() == {{{LOOPBACK}: libbpf.prog_info(program).id}}
os.close(link)
assert libbpf.xdp_program({LOOPBACK}) is None
# The many without a program are not even taken apart.
assert list(xdp_query._ask_all()) == []
""")


@pytest.mark.bpf
def test_pins_keep_objects_and_bad_places_are_explained(tmp_path: Path) -> None:
    in_own_namespaces(f"""
import errno, os, subprocess
from vgw import libbpf
from vgw.errors import KernelError
subprocess.run(["mount", "-t", "bpf", "bpf", {str(tmp_path)!r}], check=True)
table = libbpf.map_create(libbpf.MapType.ARRAY, "table", 4, 8, 1)
kept = libbpf.map_info(table).id
libbpf.pin(table, {str(tmp_path / "table")!r})
os.close(table)
assert libbpf.map_info(libbpf.get_pinned({str(tmp_path / "table")!r})).id == kept
try:
    libbpf.get_pinned({str(tmp_path / "none")!r})
except KernelError as error:
    assert error.errno == errno.ENOENT
    assert {str(tmp_path / "none")!r} in str(error)
else:
    raise AssertionError("opened a pin that is not there")
try:
    libbpf.pin(libbpf.map_create(libbpf.MapType.ARRAY, "table", 4, 8, 1), "/dev/shm/vgw-pin")
except KernelError as error:
    assert "mount -t bpf" in str(error), error
else:
    raise AssertionError("pinned outside a bpffs")
""")


def test_attach_types_are_the_kernels() -> None:
    assert (AttachType.XDP, AttachType.TCX_INGRESS, AttachType.TCX_EGRESS) == (37, 46, 47)


def test_calls_are_made_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    libbpf.side_by_side(
        *[lambda: meeting.wait(PATIENCE)] * 3
    )  # it breaks unless all three come to it
    alone: list[int] = []
    libbpf.side_by_side(lambda: alone.append(threading.get_ident()))
    assert alone == [threading.get_ident()]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_calls_end_before_the_error_of_one_is_raised(failing: int) -> None:
    ended: list[int] = []

    def call(number: int) -> None:
        if number == failing:
            raise VgwError(f"call {number}")
        ended.append(number)

    with pytest.raises(VgwError, match=f"call {failing}"):
        libbpf.side_by_side(*(functools.partial(call, number) for number in range(3)))
    assert sorted([*ended, failing]) == [0, 1, 2]
