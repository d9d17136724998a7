# SPDX-License-Identifier: Apache-2.0
"""vgw run by a user who is nobody in particular, with the capabilities that a test gives it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.controller.conftest import run
from tests.controller.process import environment_of
from tests.patience import PATIENCE
from vgw.controller.fitness import NEEDED_CAPABILITIES
from vgw.controller.paths import Paths

ROOT = Path(__file__).parents[2]
#: No account has this number.
UID = 64917
CAPABILITIES = tuple(NEEDED_CAPABILITIES)
_PREFIX = "vgw-user-"
_MAIN = "from vgw.cli import main; main()"


@dataclass(frozen=True)
class OrdinaryUser:
    """Runs commands as a user without an account, in places of vgw that are this user's own.

    `capabilities` are all that a command has or can get.
    """

    paths: Paths
    repository: Path
    capabilities: Sequence[str] = CAPABILITIES

    def without(self, capability: str) -> OrdinaryUser:
        """Return the same user with one capability less."""
        left = [each for each in self.capabilities if each != capability]
        return OrdinaryUser(self.paths, self.repository, left)

    def command(self, *arguments: str) -> list[str]:
        """Return what runs `vgw ARGUMENTS`."""
        python = str(Path(sys.executable).resolve())
        return [*privileges(self.capabilities), python, "-P", "-c", _MAIN, *arguments]

    def environment(self) -> dict[str, str]:
        """Return the environment of a command."""
        packages = Path(sysconfig.get_paths()["purelib"])
        if packages.is_relative_to(ROOT):
            packages = self.repository / packages.relative_to(ROOT)
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{self.repository}:{packages}",
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment_of(self.paths),
        }

    def try_vgw(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb and return what became of it."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def vgw(self, *arguments: str) -> str:
        """Run a verb that has to succeed and return what it printed."""
        done = self.try_vgw(*arguments)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}{done.stdout}"
        return done.stdout


def privileges(capabilities: Sequence[str]) -> list[str]:
    """Return the prefix of a command for an ordinary user with these capabilities alone."""
    names = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)])
    return [
        "setpriv",
        f"--reuid={UID}",
        f"--regid={UID}",
        "--clear-groups",
        "--no-new-privs",
        f"--inh-caps={names}",
        f"--ambient-caps={names}",
        f"--bounding-set={names}",
    ]


def remove(top: Path) -> None:
    """Unmount what is mounted in such a user's directory, and remove it if that is all."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mounted in map(str, (top / "bpffs", top / "repository")):
        for _ in range(mounts.count(mounted)):
            run("umount", "-l", mounted)
    shutil.rmtree(top)  # what is still mounted is read-only


def remove_leftovers() -> None:
    """Remove the directories of runs that were killed."""
    for top in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = top.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            remove(top)


@contextlib.contextmanager
def ordinary_user(compiled: Path | None = None) -> Iterator[OrdinaryUser]:
    """Give such a user places that it owns, a bpffs among them, and a view of this repository.

    pytest's own directories are root's alone, and a checkout may be too. `compiled` is a cache
    directory to begin with.
    """
    remove_leftovers()
    top = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    bpffs, repository = top / "bpffs", top / "repository"
    with contextlib.ExitStack() as stack:
        stack.callback(remove, top)
        top.chmod(0o755)
        for directory in (bpffs, repository):
            directory.mkdir()
        for mounted, options in (
            (bpffs, ["-t", "bpf", "bpf"]),
            (repository, ["--bind", "-o", "ro", str(ROOT)]),
        ):
            run("mount", *options, str(mounted))
        own = {name: top / name for name in ("run", "state", "cache", "log")}
        for directory in own.values():
            directory.mkdir(mode=0o700)
        if compiled is not None:
            shutil.copytree(compiled, own["cache"], dirs_exist_ok=True)
        for directory in (bpffs, *own.values(), *own["cache"].iterdir()):
            os.chown(directory, UID, UID)
        paths = Paths(
            policy=top / "policy.yaml",
            run_dir=own["run"],
            state_dir=own["state"],
            bpffs=bpffs / "vgw",
            cache_dir=own["cache"],
            log_file=own["log"] / "events.jsonl",
        )
        yield OrdinaryUser(paths, repository)
