# SPDX-License-Identifier: Apache-2.0
"""A host of its own with one VM on a TAP, under traffic, and everything that vgw has left there."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.controller.conftest import own_network
from tests.controller.observe import traces
from tests.crash.objects import Made, in_use, used_by_programs
from tests.crash.probe import Prober
from tests.lab.taps import Queue
from tests.lab.topology import eventually
from tests.patience import PATIENCE
from vgw import abi, libbpf, loader
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.maps_counters import counters_pin

VM, TAP = "web01", "tap0"


class Left(NamedTuple):
    """What there is of vgw: pins and files, how many maps and programs, what is remembered."""

    names: list[str]
    maps: int
    programs: int
    attached: list[int]
    remembered: dict[str, Any] | None


class World:
    """The host, its traffic, and what may be on it."""

    def __init__(
        self, paths: Paths, prober: Prober, made: Made, *, prefer_link: bool = True
    ) -> None:
        self.paths, self.prober, self.made = paths, prober, made
        self.prefer_link = prefer_link

    def host(self) -> Host:
        """Return the host as a process that has just started sees it."""
        return Host(self.paths, prefer_link=self.prefer_link)

    @property
    def ifindex(self) -> int:
        return socket.if_nametoindex(TAP)

    def programs(self) -> list[int]:
        """Return the ids of all programs on the interface, whoever's they are."""
        xdp = libbpf.xdp_program(self.ifindex)
        tcx = [libbpf.tcx_programs(self.ifindex, kind) for kind in (46, 47)]
        return [*([] if xdp is None else [xdp[0]]), *tcx[0], *tcx[1]]

    def left(self, others: int = 0) -> Left:
        """Return what there is, once the kernel has freed what nothing leads to.

        `others` is how many maps live besides those that pins lead to.
        """
        used = in_use(self.paths)
        wanted = len(used.maps) + others, len(used.programs)
        try:
            eventually("", lambda: self._alive() == wanted, PATIENCE)
        except AssertionError:
            text = f"{self._alive()} maps and programs live, {wanted} should"
            raise AssertionError(text) from None
        attached = self.programs()
        by_use = self._by_use()
        counts = str(self.paths.counts(VM))  # what was counted before, which is of no one run
        assert set(attached) <= used.programs, "a program runs that no pin leads to"
        return Left(
            sorted(by_use.get(name, name) for name in traces(self.paths) if name != counts),
            len(used.maps),
            len(used.programs),
            [1] * len(attached),
            self._remembered(),
        )

    def _by_use(self) -> dict[str, str]:
        """Name the pins of counters by the use of their slot: its number depends on the past."""
        found: dict[str, str] = {}
        for endpoint in self.host().open_endpoints(VM):
            directory = self.paths.endpoint_dir(VM, endpoint.interface)
            with endpoint:
                active = endpoint.maps.active_slot()
            for slot in range(abi.CONFIG_SLOTS):
                use = "active" if slot == active else "spare"
                found[str(counters_pin(directory, slot))] = str(directory / f"counters_{use}")
        return found

    def unpinned(self) -> int:
        """Return how many maps pinned programs use that no pin leads to.

        Of what lives some may be on its way out: the kernel frees it when it gets to it.
        """
        return len(used_by_programs(self.paths) - in_use(self.paths).maps)

    def _alive(self) -> tuple[int, int]:
        alive = self.made.alive()
        return len(alive.maps), len(alive.programs)

    def _remembered(self) -> dict[str, Any] | None:
        manifest = load_manifest(self.paths.manifest(VM))
        if manifest is None:
            return None
        current = manifest.current()
        return {
            "images": None if current is None else dict(current.images),
            "mode": (manifest.mode.name, manifest.mode_override),
            "endpoints": sorted(manifest.endpoints),
            "extra": manifest.extra,
        }

    def clear(self) -> None:
        """Take vgw off and check that nothing of it is left."""
        self.host().detach_all()
        eventually("no map and no program", lambda: not any(self.made.alive()))
        assert self.programs() == []
        assert traces(self.paths) == []


@contextmanager
def world(directory: Path, cache: Path, *, prefer_link: bool = True) -> Iterator[World]:
    """Give such a host in a network namespace of its own, for a `with` block."""
    loader.socket_buffer_options()  # asked of the kernel once: no change is to differ from the next
    with ExitStack() as stack:
        stack.enter_context(own_network())
        run("ip", "link", "set", "lo", "up")
        for scope in ("all", "default"):  # no frame is on its way but the probes
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        bpffs = directory / "bpffs"
        bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(bpffs))
        stack.callback(run, "umount", "-l", str(bpffs))
        queue = Queue(TAP)
        stack.callback(queue.close)
        run("ip", "link", "set", TAP, "up")
        made = Made()
        stack.callback(made.close)
        stack.enter_context(made.recorded())
        prober = stack.enter_context(Prober(queue.fd, TAP))
        paths = Paths(
            policy=directory / "policy.yaml",
            run_dir=directory / "run",
            state_dir=directory / "state",
            bpffs=bpffs / "vgw",
            cache_dir=cache,
            log_file=directory / "events.jsonl",
        )
        yield World(paths, prober, made, prefer_link=prefer_link)


def run(*command: str) -> None:
    """Run a command that has to succeed."""
    subprocess.run(command, check=True, capture_output=True)
