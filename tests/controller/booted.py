# SPDX-License-Identifier: Apache-2.0
"""A host that systemd has booted: the real one, as the first process of namespaces of its own.

It has a BPF file system and directories of its own in the places where a host has them, and the
network of whoever boots it, so that units are tried as they are shipped. Nothing is left of it.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
#: Where the unit expects the checkout.
PREFIX = Path("/opt/vgw")
_BOOT = """
set -e
for place in /run /opt /home /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs $place; done
cp -a /etc /run/etc
mount --bind /run/etc /etc
mkdir -p {top}/console /opt/vgw/.venv/bin /opt/source /run/units
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount --bind -o ro {root} /opt/source
touch /run/console
mount --bind /run/console /dev/console
cat > /opt/vgw/.venv/bin/vgw <<'END'
#!/bin/sh
export PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1
exec {python} -P -c 'from vgw.cli import main; main()' "$@"
END
chmod 755 /opt /opt/vgw/.venv/bin/vgw
for name in booted sysinit basic shutdown; do
  printf '[Unit]\\nDefaultDependencies=no\\n' > /run/units/$name.target
done
export container=vgw-test SYSTEMD_UNIT_PATH=/run/units SYSTEMD_GENERATOR_PATH=/nonexistent
touch {top}/ready
exec /lib/systemd/systemd --system --unit=booted.target --show-status=no --log-target=console
"""


class Booted:
    """A running host; commands are run on it as root."""

    def __init__(self, pid: int) -> None:
        self._prefix = ["nsenter", f"--target={pid}", "--mount", "--pid", "--cgroup", "--ipc"]

    def command(self, *command: str | Path) -> list[str]:
        """Return what runs a command there."""
        return [*self._prefix, *map(str, command)]

    def attempt(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command there and return what became of it."""
        return subprocess.run(
            self.command(*command),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *command: str | Path) -> str:
        """Run a command that has to succeed there and return what it printed."""
        done = self.attempt(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.console()}"
        return done.stdout

    def vgw(self, *arguments: str) -> str:
        """Run a verb there, as root."""
        return self.run(PREFIX / ".venv/bin/vgw", *arguments)

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        done = subprocess.run(
            self.command("tee", path), input=text, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def console(self) -> str:
        """Return what systemd has said."""
        return self.attempt("cat", "/run/console").stdout


@contextlib.contextmanager
def booted() -> Iterator[Booted]:
    """Boot a host for the time of a block."""
    top = Path(tempfile.mkdtemp(prefix="vgw-booted-"))
    packages = Path(sysconfig.get_paths()["purelib"])
    source = Path("/opt/source")
    if packages.is_relative_to(ROOT):
        packages = source / packages.relative_to(ROOT)
    script = _BOOT.format(
        root=ROOT, top=top, path=f"{source}:{packages}", python=Path(sys.executable).resolve()
    )
    apart = ["--pid", "--mount", "--mount-proc", "--cgroup", "--uts", "--ipc"]
    with (top / "boot").open("wb") as said:
        process = subprocess.Popen(
            ["unshare", "--fork", "--kill-child", *apart, "bash", "-c", script],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    try:
        yield _ready(top, process)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(top)


def _ready(top: Path, process: subprocess.Popen[bytes]) -> Booted:
    """Wait until systemd answers."""
    deadline = time.monotonic() + PATIENCE
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < deadline and process.poll() is None:
        if (top / "ready").exists():
            host = Booted(int(children.read_text().split()[0]))
            if host.attempt("systemctl", "is-active", "booted.target").returncode == 0:
                return host
        time.sleep(0.05)
    raise AssertionError(f"systemd did not start: {(top / 'boot').read_text()}")
