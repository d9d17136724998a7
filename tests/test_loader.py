# SPDX-License-Identifier: Apache-2.0
"""Compiling with BCC, the cache, and clones: what they give, and what they say when they cannot."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vgw import libbpf, loader
from vgw.abi_maps import MAP_SIZES, PRIVATE_MAPS
from vgw.errors import CompileError, KernelError, VerifierError, VgwError
from vgw.libbpf import MapType, PerfReader, ProgType
from vgw.libbpf.library import failure
from vgw.loader import Artefact, SourceTree, cache
from vgw.loader.sources import write_headers

FRAME = bytes(12) + b"\x08\x00" + bytes(50)

COMMON = """\
#include <linux/types.h>
struct total { u64 packets; u64 bytes; };
BPF_ARRAY(totals, struct total, 4);
BPF_F_TABLE("array", u32, u64, words_inner, 1, 0x1000);
BPF_ARRAY_OF_MAPS(words, "words_inner", 2);
BPF_PERF_OUTPUT(events);
BPF_F_TABLE("hash", u32, u64, table, 100, 1);
static __always_inline void count(u32 index, u64 bytes)
{
	struct total *total = totals.lookup(&index);

	if (total) {
		total->packets++;
		total->bytes += bytes;
	}
}
"""

COUNTS = """\
#include "common.h"
int counts(struct __sk_buff *skb)
{
	u32 zero = 0, report = 0x11223344;
	u64 *word;
	void *inner;

	count(1, skb->len);
	events.perf_submit(skb, &report, sizeof(report));
	inner = words.lookup(&zero);
	if (!inner)
		return -1;
	word = bpf_map_lookup_elem(inner, &zero);
	return word ? *word : -2;
}
"""

STORES = """\
#include "common.h"
static __always_inline u64 helper(void) { return 7; }
int stores(struct xdp_md *ctx)
{
	u32 key = 5;
	u64 value = helper();

	count(0, 1);
	table.update(&key, &value);
	return XDP_PASS;
}
"""


def write_tree(directory: Path, **files: str) -> SourceTree:
    """A source tree of two programs; `files` replaces or adds files (`common_h` is common.h)."""
    contents = {"common_h": COMMON, "counts_c": COUNTS, "stores_c": STORES, **files}
    directory.mkdir(exist_ok=True)
    for name, text in contents.items():
        stem, _, suffix = name.rpartition("_")
        (directory / f"{stem}.{suffix}").write_text(text)
    (directory / "include").symlink_to(loader.bpf_dir() / "include")
    return SourceTree(directory, {"counts": ProgType.SCHED_CLS, "stores": ProgType.XDP})


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    tree = write_tree(tmp_path_factory.mktemp("fixture") / "bpf")
    return loader.load_artefact(tmp_path_factory.mktemp("cache"), source=tree)


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def no_fd_leaks() -> Iterator[None]:
    libbpf.possible_cpus()
    before = open_fds()
    yield
    assert open_fds() == before


def total(fd: int, index: int) -> tuple[int, ...]:
    value = libbpf.map_lookup(fd, struct.pack("=I", index), 16)
    assert value is not None
    return struct.unpack("=QQ", value)


class TestSources:
    def test_headers_are_taken_once_and_lines_keep_their_names(self, tmp_path: Path) -> None:
        tree = write_tree(
            tmp_path / "bpf",
            a_h='#include "common.h"\nint a;\n',
            counts_c='#include "common.h"\n#include "a.h"\n#include "common.h"\nint last;\n',
        )
        text = tree.flatten("counts")
        assert text.count("BPF_ARRAY(totals") == 1
        assert '#include "' not in text
        place, where = 0, {}
        for line in text.splitlines():
            if line.startswith("#line "):
                _, number, name = line.split(" ")
                place = int(number)
                continue
            where[line] = (name.strip('"'), place)
            place += 1
        assert where["int a;"] == ("bpf/a.h", 2)
        assert where["int last;"] == ("bpf/counts.c", 4)

    def test_a_missing_header_is_named_with_who_wants_it(self, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "bpf", counts_c='\n#include "nowhere.h"\n')
        with pytest.raises(CompileError, match=r"bpf/counts\.c:2: includes nowhere\.h"):
            tree.flatten("counts")

    def test_missing_public_headers_name_their_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vgw.loader.sources._USER_HEADERS", tmp_path / "usr")
        tree = write_tree(tmp_path / "bpf")
        with pytest.raises(VgwError, match="apt install linux-libc-dev"):
            write_headers(tree, tmp_path / "kernel")

    def test_the_shipped_sources_are_found(self) -> None:
        assert (loader.bpf_dir() / "abi.h").is_file()


class TestArtefact:
    SPEC = loader.MapSpec("totals", MapType.ARRAY, 4, 16, 4, 0)

    def one(self, name: str, spec: loader.MapSpec) -> Artefact:
        program = loader.ProgramSpec(name, ProgType.XDP, bytes(16), ((0, spec.name),))
        return Artefact("digest", {spec.name: spec}, {name: program})

    def test_a_file_gives_back_what_was_written(self) -> None:
        one = self.one("first", self.SPEC)
        assert Artefact.decode(one.encode()) == one

    @pytest.mark.parametrize("place", [0, 9, 20, 60, -1])
    def test_a_changed_byte_is_noticed(self, place: int) -> None:
        data = bytearray(self.one("first", self.SPEC).encode())
        data[place] ^= 1
        with pytest.raises(ValueError, match="damaged"):
            Artefact.decode(bytes(data))

    @pytest.mark.parametrize("length", [0, 10, 60])
    def test_a_cut_file_is_noticed(self, length: int) -> None:
        with pytest.raises(ValueError, match=r"short|damaged"):
            Artefact.decode(self.one("first", self.SPEC).encode()[:length])

    def test_a_map_has_one_definition(self) -> None:
        other = dataclasses.replace(self.SPEC, max_entries=5)
        merged = loader.artefact.merge([self.one("first", self.SPEC), self.one("b", self.SPEC)])
        assert list(merged.programs) == ["first", "b"]
        with pytest.raises(CompileError, match="map totals is defined differently in b"):
            loader.artefact.merge([self.one("first", self.SPEC), self.one("b", other)])


@pytest.mark.bpf
class TestCompile:
    def test_maps_and_programs_are_described(self, artefact: Artefact) -> None:
        assert list(artefact.programs) == ["counts", "stores"]
        assert set(artefact.maps) == {"totals", "words", "words_inner", "events", "table"}
        assert artefact.maps["words"].inner == "words_inner"
        table = artefact.maps["table"]
        assert (table.key_size, table.value_size, table.max_entries, table.flags) == (4, 8, 100, 1)
        used = {name for _, name in artefact.programs["stores"].relocations}
        assert used == {"totals", "table"}

    def test_errors_name_header_and_line(self, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "bpf", common_h=COMMON + "\nint broken(void) { return x; }\n")
        line = COMMON.count("\n") + 2
        with pytest.raises(
            CompileError, match=rf"bpf/common\.h:{line}:\d+: error: .*'x'"
        ) as caught:
            loader.load_artefact(tmp_path / "cache", source=tree)
        assert "\n" not in str(caught.value)

    def test_warnings_are_errors(self, tmp_path: Path) -> None:
        broken = STORES.replace("u32 key = 5;", "u32 key = 5, unused;")
        tree = write_tree(tmp_path / "bpf", stores_c=broken)
        with pytest.raises(CompileError, match=r"bpf/stores\.c:5:.*unused"):
            loader.load_artefact(tmp_path / "cache", source=tree)

    def test_a_file_without_its_function_is_refused(self, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "bpf", stores_c=STORES.replace("int stores", "int other"))
        with pytest.raises(CompileError, match=r"bpf/stores\.c: defines no function stores"):
            loader.load_artefact(tmp_path / "cache", source=tree)

    def test_a_map_of_another_size_than_the_abi_says_is_refused(self, tmp_path: Path) -> None:
        wrong = "BPF_ARRAY(event_meter, u64, 1);\n"
        use = STORES.replace("count(0, 1);", "{ u32 zero = 0; event_meter.lookup(&zero); }")
        tree = write_tree(tmp_path / "bpf", common_h=COMMON + wrong, stores_c=use)
        with pytest.raises(CompileError, match="map event_meter has keys of 4 and values of 8"):
            loader.load_artefact(tmp_path / "cache", source=tree)
        assert not list((tmp_path / "cache").glob("stores-*"))

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ("__version__ = '0.1.10'\n", "is not BCC"),
            ("raise ModuleNotFoundError('No module named bcc')\n", "cannot be imported"),
            ("raise OSError('libbcc.so.0: cannot open')\n", "libbcc.so.0"),
            ("raise RuntimeError('no kernel\\n\\nhave a nice day')\n", "no kernel"),
            ("raise SystemExit(0)\n", "the compiler .* without the program .*is it BCC"),
        ],
    )
    def test_an_unusable_bcc_names_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
    ) -> None:
        (tmp_path / "bcc.py").write_text(module)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        tree = write_tree(tmp_path / "bpf")
        with pytest.raises(VgwError, match=f"{message}.*apt install python3-bpfcc") as caught:
            loader.load_artefact(tmp_path / "cache", source=tree)
        assert "\n" not in str(caught.value)

    def test_a_compiler_that_dies_is_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "bcc.py").write_text("import os\nos.kill(os.getpid(), 6)\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        tree = write_tree(tmp_path / "bpf")
        with pytest.raises(CompileError, match="failed on counts: it was ended by SIGABRT"):
            loader.load_artefact(tmp_path / "cache", source=tree)

    def test_no_right_to_create_maps_is_said_before_compiling(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> int:
            raise failure("create the map probe", errno.EPERM)

        monkeypatch.setattr(cache, "map_create", refuse)
        with pytest.raises(KernelError, match="run vgw as root"):
            loader.load_artefact(tmp_path / "cache", source=write_tree(tmp_path / "bpf"))

    def test_a_missing_bcc_names_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(VgwError, match="apt install python3-bpfcc"):
            loader.load_artefact(tmp_path / "cache", source=write_tree(tmp_path / "bpf"))


@pytest.mark.bpf
class TestCache:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> SourceTree:
        return write_tree(tmp_path / "bpf")

    def test_the_second_load_compiles_nothing(self, tmp_path: Path, tree: SourceTree) -> None:
        said: list[str] = []
        first = loader.load_artefact(tmp_path / "cache", said.append, source=tree)
        assert len(said) == 1
        assert loader.load_artefact(tmp_path / "cache", said.append, source=tree) == first
        assert len(said) == 1
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
        assert "bcc" not in sys.modules

    def test_only_what_is_wanted_or_changed_is_compiled(
        self, tmp_path: Path, tree: SourceTree
    ) -> None:
        said: list[str] = []
        only = loader.load_artefact(tmp_path / "cache", source=tree, programs=["stores"])
        assert list(only.programs) == ["stores"]
        (tree.directory / "counts.c").write_text(COUNTS + "\n/* changed */\n")
        loader.load_artefact(tmp_path / "cache", said.append, source=tree, programs=["stores"])
        assert said == []
        both = loader.load_artefact(tmp_path / "cache", said.append, source=tree)
        assert both.programs["stores"] == only.programs["stores"]
        assert len(said) == 1

    def test_damaged_files_are_rebuilt(self, tmp_path: Path, tree: SourceTree) -> None:
        first = loader.load_artefact(tmp_path / "cache", source=tree)
        for path in (tmp_path / "cache").iterdir():
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))
        said: list[str] = []
        assert loader.load_artefact(tmp_path / "cache", said.append, source=tree) == first
        assert len(said) == 1

    def test_a_file_under_a_wrong_name_is_not_believed(
        self, tmp_path: Path, tree: SourceTree
    ) -> None:
        loader.load_artefact(tmp_path / "cache", source=tree, programs=["stores"])
        (old,) = (tmp_path / "cache").iterdir()
        (tree.directory / "stores.c").write_text(STORES + "\n")
        said: list[str] = []
        loader.load_artefact(tmp_path / "cache", source=tree, programs=["stores"])
        (new,) = set((tmp_path / "cache").iterdir()) - {old}
        new.write_bytes(old.read_bytes())
        loader.load_artefact(tmp_path / "cache", said.append, source=tree, programs=["stores"])
        assert len(said) == 1

    def test_old_files_go(self, tmp_path: Path, tree: SourceTree) -> None:
        directory = tmp_path / "cache"
        directory.mkdir(mode=0o700)
        for age in range(6):
            old = directory / f"stores-{age}.vgw"
            old.touch()
            os.utime(old, (1000 - age, 1000 - age))
        stale = directory / "left.tmp"
        stale.touch()
        os.utime(stale, (1000, 1000))
        loader.load_artefact(directory, source=tree, programs=["stores"])
        names = {path.name for path in directory.iterdir()}
        assert len(names) == 4
        assert {"stores-0.vgw", "stores-1.vgw", "stores-2.vgw"} < names

    def test_a_directory_open_to_others_is_refused(self, tmp_path: Path, tree: SourceTree) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        with pytest.raises(VgwError, match="chmod 700"):
            loader.load_artefact(tmp_path / "cache", source=tree)

    def test_a_path_that_is_no_directory_is_refused(self, tmp_path: Path, tree: SourceTree) -> None:
        (tmp_path / "cache").touch()
        with pytest.raises(VgwError, match="cannot use the cache directory"):
            loader.load_artefact(tmp_path / "cache", source=tree)

    def test_two_processes_at_once(self, tmp_path: Path, tree: SourceTree) -> None:
        code = (
            "import sys; from pathlib import Path; from vgw import loader; "
            "from vgw.libbpf import ProgType; "
            "tree = loader.SourceTree(Path(sys.argv[1]), {'stores': ProgType.XDP}); "
            "print(loader.load_artefact(Path(sys.argv[2]), source=tree).digest)"
        )
        command = [sys.executable, "-c", code, str(tree.directory), str(tmp_path / "cache")]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = {child.communicate(timeout=60)[0] for child in both}
        assert [child.returncode for child in both] == [0, 0]
        assert len(outputs) == 1
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".vgw"]


@pytest.mark.bpf
class TestClones:
    def test_each_clone_has_its_own_maps(self, artefact: Artefact) -> None:
        with (
            no_fd_leaks(),
            loader.instantiate(artefact, ["counts", "stores"]) as one,
            loader.instantiate(artefact, ["counts", "stores"]) as two,
        ):
            assert set(one.maps) == {"totals", "words", "events", "table"}
            libbpf.prog_test_run(one.programs["counts"], FRAME, repeat=3)
            libbpf.prog_test_run(one.programs["stores"], FRAME)
            assert total(one.maps["totals"], 1)[0] == 3
            assert total(one.maps["totals"], 0) == (1, 1)
            assert total(two.maps["totals"], 1) == total(two.maps["totals"], 0) == (0, 0)
            assert libbpf.map_lookup(one.maps["table"], struct.pack("=I", 5), 8) == struct.pack(
                "=Q", 7
            )

    def test_sizes_can_be_chosen(self, artefact: Artefact) -> None:
        with loader.instantiate(artefact, ["stores"], max_entries={"table": 12345}) as one:
            assert libbpf.map_info(one.maps["table"]).max_entries == 12345

    def test_inner_maps_of_any_size_fit(self, artefact: Artefact) -> None:
        with no_fd_leaks(), loader.instantiate(artefact, ["counts"]) as one:
            inner = loader.new_inner(artefact, "words", 1000)
            libbpf.map_fill(inner, struct.pack("=Q", 42), 8)
            libbpf.map_update(one.maps["words"], bytes(4), struct.pack("=I", inner))
            os.close(inner)
            assert libbpf.prog_test_run(one.programs["counts"], FRAME).retval == 42
        with pytest.raises(VgwError, match="totals is not a map of maps"):
            loader.new_inner(artefact, "totals", 1)

    def test_reused_maps_stay_the_callers(self, artefact: Artefact) -> None:
        with loader.instantiate(artefact, ["stores"]) as one:
            reuse = {"totals": one.maps["totals"]}
            with loader.instantiate(artefact, ["stores"], reuse=reuse) as two:
                assert set(two.maps) == {"table"}
                libbpf.prog_test_run(two.programs["stores"], FRAME)
            assert total(one.maps["totals"], 0) == (1, 1)

    def test_events_reach_a_reader(self, artefact: Artefact) -> None:
        seen: list[bytes] = []
        with (
            loader.instantiate(artefact, ["counts"]) as one,
            PerfReader(one.maps["events"], lambda _, data: seen.append(data), print) as reader,
        ):
            libbpf.prog_test_run(one.programs["counts"], FRAME)
            assert reader.consume() == 1
        assert seen[0][:4] == struct.pack("=I", 0x11223344)

    def test_an_unknown_program_leaks_nothing(self, artefact: Artefact) -> None:
        with no_fd_leaks(), pytest.raises(VgwError, match="no program nothing"):
            loader.instantiate(artefact, ["stores", "nothing"])

    def test_a_rejected_program_leaks_nothing_and_shows_the_log(self, artefact: Artefact) -> None:
        bad = dataclasses.replace(
            artefact.programs["counts"],
            # the program returns without a value: exit is its last instruction
            insns=artefact.programs["counts"].insns + struct.pack("=BBhi", 0x0F, 0x99, 0, 0),
        )
        broken = dataclasses.replace(artefact, programs={**artefact.programs, "counts": bad})
        with no_fd_leaks(), pytest.raises(VerifierError) as caught:
            loader.instantiate(broken, ["stores", "counts"])
        assert caught.value.log
        assert "counts" in str(caught.value)


@pytest.mark.bpf
def test_the_shipped_programs_compile_to_the_abi_and_load(tmp_path: Path) -> None:
    artefact = loader.load_artefact(tmp_path / "cache")
    assert list(artefact.programs) == list(loader.PROGRAMS)
    others = {name for name in artefact.maps if name.startswith("probe_")} | {*PRIVATE_MAPS}
    assert set(MAP_SIZES) == set(artefact.maps) - others
    with no_fd_leaks(), loader.instantiate(artefact, list(loader.PROGRAMS)) as instance:
        assert set(instance.programs) == set(loader.PROGRAMS)
