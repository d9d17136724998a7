# SPDX-License-Identifier: Apache-2.0
"""No change outside the process goes around its announcement as a step (vgw/steps.py)."""

from __future__ import annotations

import ast
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller import conftest as own_host
from tests.controller.policies import document
from tests.test_imports import modules
from vgw import files, steps
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.libbpf.library import _PROTOTYPES, library
from vgw.policy.model import Hook

#: A host of its own, gone afterwards.
netns, paths, tap = own_host.netns, own_host.paths, own_host.tap

#: Functions of libbpf that change something, and the rest of those that vgw calls.
CHANGING = {
    "bpf_map_create",
    "bpf_map_update_elem",
    "bpf_map_delete_elem",
    "bpf_map_update_batch",
    "bpf_prog_load",
    "bpf_prog_test_run_opts",
    "bpf_obj_pin",
    "bpf_link_create",
    "bpf_link_update",
    "bpf_link_detach",
}
READING = {
    "bpf_map_lookup_elem",
    "bpf_map_lookup_batch",
    "bpf_map_get_next_key",
    "bpf_map_get_fd_by_id",
    "bpf_prog_get_fd_by_id",
    "bpf_prog_query",
    "bpf_obj_get_info_by_fd",
    "bpf_obj_get",
    "bpf_link_get_next_id",
    "bpf_link_get_fd_by_id",
    "libbpf_num_possible_cpus",
    "perf_buffer__poll",
    "perf_buffer__consume",
}

#: What changes files, as methods of Path and as functions.
METHODS = {
    "mkdir", "rename", "unlink", "rmdir", "touch", "write_text", "write_bytes", "chmod",
    "symlink_to", "hardlink_to",
}  # fmt: skip
FUNCTIONS = {
    "os": {
        "mkdir", "makedirs", "rename", "replace", "unlink", "remove", "rmdir", "removedirs",
        "write", "fsync", "fdatasync", "truncate", "ftruncate", "chmod", "link", "symlink",
    },
    "shutil": {"copy", "copyfile", "copytree", "move", "rmtree"},
    "tempfile": {"NamedTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp"},
}  # fmt: skip
#: Modules that change files which no change of an endpoint depends on, and what those are.
OTHER_FILES = {
    "vgw.cli_top_terminal": "a pipe that wakes up the screen",
    "vgw.cli_verbs_conntrack": "a file that the user names, which is whole or not there",
    "vgw.controller.api": "the socket",
    "vgw.controller.doctor": "a look whether the cache can be made",
    "vgw.controller.guardian": "the pipe on which it says that it watches",
    "vgw.controller.log_file": "the log, which is appended to and rotated",
    "vgw.loader.cache": "compiled programs, each of which is whole or not there",
    "vgw.loader.compiler": "the compiling process writes its answer",
    "vgw.loader.sources": "what the compiling process reads",
}


def around(module: str, text: str) -> list[str]:
    """Return the places of a module that change something and announce nothing."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (what := _changes(module, node)) is not None:
            found.append(f"{module}:{node.lineno}: {what}")
    return found


def _changes(module: str, call: ast.Call) -> str | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name in CHANGING:
        return f"calls {name} itself; pass it to change()"
    if module == "vgw.controller.links_netlink" and _is_unannounced_request(call):
        return "changes by netlink without a step"
    if module in {"vgw.files", *OTHER_FILES}:
        return None
    return f"changes a file by {name or 'open'}(); use vgw/files.py" if _is_of_file(call) else None


def _is_unannounced_request(call: ast.Call) -> bool:
    if not (isinstance(call.func, ast.Name) and call.func.id == "_ask"):
        return False
    used = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    return bool(used & {"tc", "link"}) and all(each.arg != "step" for each in call.keywords)


def _is_of_file(call: ast.Call) -> bool:
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if isinstance(owner, ast.Name) and owner.id in FUNCTIONS:
        return name in FUNCTIONS[owner.id]
    if isinstance(owner, ast.Name) and owner.id == "files":
        return False
    if name == "open":
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes)
    if name == "replace" and owner is not None:  # that of a text takes two arguments
        return len(call.args) == 1 and not call.keywords
    return owner is not None and name in METHODS


def test_no_source_goes_around() -> None:
    found = [text for module, path in modules() for text in around(module, path.read_text())]
    assert not found, "\n".join(found)


def test_what_changes_other_files_does() -> None:
    """An entry for a module that changes nothing would hide what comes into it later."""
    texts = {module: path.read_text() for module, path in modules()}
    idle = [module for module in OTHER_FILES if not around("", texts[module])]
    assert idle == []


def test_every_call_of_libbpf_is_known() -> None:
    known = set(_PROTOTYPES)
    assert known == CHANGING | READING


def test_every_call_of_libbpf_has_a_prototype() -> None:
    """Without one ctypes guesses, and a result that is an error counts as one that is none."""
    called = {
        node.attr
        for module, path in modules()
        if module.startswith("vgw.libbpf")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("bpf_")
    }
    assert called - set(_PROTOTYPES) == set()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vgw.libbpf.maps", "check(library().bpf_map_delete_elem(fd, key), 'delete')"),
        ("vgw.controller.pins", "directory.rmdir()"),
        ("vgw.controller.pins", "entry.replace(place)"),
        ("vgw.controller.state_file", "os.fsync(fd)"),
        ("vgw.controller.state_file", "path.open('wb')"),
        ("vgw.controller.state_file", "open(path, 'a')"),
        ("vgw.controller.links_netlink", "_ask('x', lambda route: route.tc('del'))"),
    ],
)
def test_what_goes_around_is_found(module: str, text: str) -> None:
    """Negative control."""
    assert len(around(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vgw.libbpf.maps", "change('map delete', fd, library().bpf_map_delete_elem, fd, key)"),
        ("vgw.controller.pins", "files.rmdir(directory)"),
        ("vgw.controller.pins", "text.replace('a', 'b')\npath.open('rb')\nopen(path)"),
        ("vgw.controller.change", "dataclasses.replace(self._base, generation=1)"),
        ("vgw.controller.links_netlink", "_ask('x', lambda r: r.tc('del'), step='y')"),
    ],
)
def test_what_does_not_is_not(module: str, text: str) -> None:
    assert around(module, text) == []


def test_nothing_in_vgw_watches() -> None:
    """What stops or fails steps is not in the product: no setting can wake it."""
    for module, path in modules():
        if module != "vgw.steps":
            assert "watched_by" not in path.read_text(), module


def test_without_a_watcher_every_step_is_made() -> None:
    assert steps.announce("pin", "/nowhere") == 0


def test_a_refused_step_is_not_made(tmp_path: Path) -> None:
    seen: list[tuple[str, object]] = []

    def refuse(step: str, target: object) -> int:
        seen.append((step, target))
        return errno.EROFS

    with steps.watched_by(refuse), pytest.raises(OSError, match="Read-only file system") as raised:
        files.mkdir(tmp_path / "a")
    assert (raised.value.errno, seen) == (errno.EROFS, [("mkdir", tmp_path / "a")])
    assert list(tmp_path.iterdir()) == []
    files.mkdir(tmp_path / "a")
    assert steps.announce("mkdir", "") == 0


def test_a_file_is_written_in_steps(tmp_path: Path) -> None:
    seen: list[str] = []

    def note(step: str, _: object) -> int:
        seen.append(step)
        return 0

    with steps.watched_by(note):
        files.mkdir(tmp_path / "a" / "b")
        files.mkdir(tmp_path / "a" / "b", exist_ok=True)
        files.write(tmp_path / "a" / "b" / "c", b"text", 0o600)
        files.sync_directory(tmp_path / "a" / "b")
        files.rename(tmp_path / "a" / "b" / "c", tmp_path / "a" / "d")
        files.unlink(tmp_path / "a" / "d")
        files.unlink(tmp_path / "a" / "d")
        files.rmdir(tmp_path / "a" / "b")
    assert seen == [
        "mkdir", "mkdir", "create", "write", "fsync", "fsync", "rename", "unlink", "rmdir",
    ]  # fmt: skip
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a"]


# --- one run, with an ear at everything that Python and libbpf are asked to change -------------

#: Step -> the event of Python's audit, or the function of libbpf, that follows it.
FOLLOWS = {
    "mkdir": {"os.mkdir"},
    "rename": {"os.rename"},
    "unlink": {"os.remove"},
    "rmdir": {"os.rmdir"},
    "create": {"open", "os.chmod"},
    "map create": {"bpf_map_create"},
    "map update": {"bpf_map_update_elem", "bpf_map_update_batch"},
    "map delete": {"bpf_map_delete_elem"},
    "program load": {"bpf_prog_load"},
    "test run": {"bpf_prog_test_run_opts"},
    "pin": {"bpf_obj_pin"},
    "link create": {"bpf_link_create"},
    "link update": {"bpf_link_update"},
    "link detach": {"bpf_link_detach"},
}
#: What an expiry does, for which there have to be dead flows.
NOT_THERE = "bpf_prog_test_run_opts"
HEARD = {event for events in FOLLOWS.values() for event in events}


class Ear:
    """Hears what is changed under a directory and in the kernel, and by which step; in a child."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._last = threading.local()
        self.unannounced: list[str] = []
        self.heard: set[str] = set()

    def step(self, step: str, _: object) -> int:
        self._last.step = step
        return 0

    def listen(self) -> None:
        sys.addaudithook(self._audit)
        loaded = library()
        for name in CHANGING:
            setattr(loaded, name, self._hearing(name, getattr(loaded, name)))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in HEARD or not str(arguments[0]).startswith(self._root):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._note(event)

    def _hearing(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        def hearing(*arguments: Any) -> int:
            self._note(name)
            return call(*arguments)

        return hearing

    def _note(self, event: str) -> None:
        self.heard.add(event)
        if event not in FOLLOWS.get(getattr(self._last, "step", ""), ()):
            self.unannounced.append(event)
        elif event != "open":  # which the chmod of the same step follows
            self._last.step = ""


def _everything(paths: Paths) -> Iterator[Callable[[], object]]:
    host = Host(paths)
    yield lambda: host.attach(document(), "web01", hook=Hook.XDP)
    yield lambda: host.attach(document("[{name: a, action: drop}]"), "web01", hook=Hook.TC)
    yield lambda: host.flush("web01")
    yield (paths.endpoint_dir("web01", "tap0") / "stats").unlink
    yield lambda: host.attach(document(), "web01")
    yield host.detach_all


@pytest.mark.bpf
@pytest.mark.parametrize("deaf", [False, True], ids=["announced", "negative-control"])
def test_what_is_changed_in_a_run_is_announced(
    paths: Paths, tap: Callable[[str], int], *, deaf: bool
) -> None:
    """The negative control changes a file by itself, which has to be heard."""
    tap("tap0")
    Host(paths).attach(document(), "web01", hook=Hook.XDP)
    Host(paths).detach_all()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            ear = Ear(paths.bpffs.parents[1])
            with steps.watched_by(ear.step):
                ear.listen()
                for change in _everything(paths):
                    change()
            unlinked_here = ear.unannounced == ["os.remove"]  # that of _everything()
            if deaf:
                paths.policy.write_text("x")
                unlinked_here = ear.unannounced == ["os.remove", "open"]
            code = 0 if unlinked_here and ear.heard == HEARD - {NOT_THERE} else 1
            print(ear.unannounced, HEARD - ear.heard, file=sys.stderr)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
