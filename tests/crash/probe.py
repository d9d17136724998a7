# SPDX-License-Identifier: Apache-2.0
"""Traffic that does not stop and tells, packet by packet, by which policy it was judged.

A process of its own sends probes through an endpoint on a TAP, both ways. The kernel delivers what
passes before the call that sends it returns, so a probe that is not there then was dropped. Probes
are of four kinds: policy a accepts x and z, policy b y and z, and neither w.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.controller.policies import (
    PEER_ADDRESS,
    PEER_MAC,
    document,
    from_vm,
    interface,
    to_vm,
)
from tests.patience import PATIENCE
from vgw.policy.model import PolicyDocument

ROOT = Path(__file__).parents[2]
PACE: Final = 0.0005  # seconds between rounds: what makes changes needs CPUs as well
_ETH_P_IP: Final = 0x0800

#: What a packet can be judged by: a policy, no program at all, or one that lets nothing through.
A, B, OPEN, CLOSED = "a", "b", "open", "closed"
#: Kind of probe -> what lets it pass.
_PASSED_BY: Final = {"x": {A, OPEN}, "y": {B, OPEN}, "z": {A, B, OPEN}, "w": {OPEN}}
_ALL: Final = frozenset({A, B, OPEN, CLOSED})
#: Kind -> its UDP port, whose packets are of a connection that stays open, and its ICMP type,
#: whose packets never are.
_PORTS: Final = {"x": 80, "y": 443, "z": 22, "w": 25}
_TYPES: Final = {"x": 40, "y": 41, "z": 42, "w": 43}


@functools.cache
def policy(name: str, *, more: int = 0, config: str = "", by_group: bool = False) -> PolicyDocument:
    """Return policy a or b for web01 on tap0, with `more` rules that match nothing sent.

    `config` is more YAML of the VM. `by_group`: the rules of both policies are there, with a group
    as their peer, and the policy is that in whose group the peer's VM is.
    """
    named = {kind: [each for each in (A, B) if each in by] for kind, by in _PASSED_BY.items()}
    rules = [
        f"{{name: SIDE-{kind}, action: accept, services: [udp/{_PORTS[kind]}, icmp/{_TYPES[kind]}]"
        + (f", SIDE: [{', '.join(groups)}]}}" if by_group else "}")
        for kind, groups in named.items()
        if (by_group and groups) or name in groups
    ]
    if name == B and not by_group:
        rules = ["{name: SIDE-other, action: drop, services: [tcp/9]}", *reversed(rules)]
    rules += [
        f"{{name: SIDE-f{n}, action: accept, SIDE: [10.{n >> 8}.{n & 255}.0/24]}}"
        for n in range(more)
    ]
    ingress, egress = (f"[{', '.join(rules)}]".replace("SIDE", side) for side in ("from", "to"))
    extra = f"    egress: {egress}"
    vms = {"web01": interface("tap0", vm=f"{config}{',' if config else ''}")}
    if by_group:
        extra += "\ngroups: {a: {labels: {group: a}}, b: {labels: {group: b}}}"
        vms["peer"] = (
            f"{{labels: {{group: {name}}}, interfaces: [{{name: other, mac: '{PEER_MAC}', "
            f"addresses: [{PEER_ADDRESS}]}}]}}"
        )
    return document(ingress, vms=vms, extra=extra, defaults="{ingress: drop, egress: drop}")


class Seen(NamedTuple):
    """A probe or several in a row: on which path, of which kind, whether they passed."""

    to_vm: bool
    kind: str
    passed: bool

    @property
    def judges(self) -> frozenset[str]:
        """Return by what such a probe can have been judged."""
        by = frozenset(_PASSED_BY[self.kind])
        return by if self.passed else _ALL - by


def explained(seen: Sequence[Seen], *order: str) -> bool:
    """Tell whether probes were judged by these one after another, each from some packet on."""
    reached = {0}
    for probe in seen:
        judges = probe.judges
        first = min(reached)
        reached = {place for place, judge in enumerate(order) if place >= first and judge in judges}
        if not reached:
            return False
    return True


def of_path(seen: Sequence[Seen], *, inbound: bool) -> list[Seen]:
    """Return the probes of one path."""
    return [probe for probe in seen if probe.to_vm is inbound]


def judged_by(seen: Sequence[Seen]) -> frozenset[str]:
    """Return by what all of some probes can have been judged."""
    return _ALL.intersection(*(probe.judges for probe in seen))


class Prober:
    """The process, from the start of a `with` block to its end."""

    def __init__(self, tap_fd: int, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.probe", str(tap_fd), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[tap_fd],
        )
        self.probes = 0

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def seen(self) -> list[Seen]:
        """Return the probes since the last call, whole rounds, the last of them begun after it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        assert ready, "the prober does not answer"
        answer = json.loads(self._process.stdout.readline())
        self.probes += answer["probes"]
        return [Seen(*each) for each in answer["seen"]]

    def now(self) -> frozenset[str]:
        """Return by what packets are judged now."""
        self.seen()
        return judged_by(self.seen())


class _Probing:
    """The process: what it sends, and what has become of it."""

    def __init__(self, tap_fd: int, name: str) -> None:
        self._tap = tap_fd
        self._out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._out.bind((name, 0))
        self._in = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._in.bind((name, _ETH_P_IP))
        self._in.setblocking(False)
        self._number = 0
        self._frames = [
            (inbound, kind, make(length=4, **fields)[:-4])
            for kind in _PORTS
            for fields in (
                {"proto": "icmp", "icmp_type": _TYPES[kind]},
                {"proto": "udp", "dport": _PORTS[kind], "sport": 40000},
            )
            for inbound, make in ((True, to_vm), (False, from_vm))
        ]
        self.rounds: list[tuple[Seen, ...]] = []
        self.probes = 0

    def round(self) -> None:
        """Send each probe once, and note what became of them unless that is as it was before."""
        made = tuple(
            Seen(inbound, kind, self._passes(frame, inbound=inbound))
            for inbound, kind, frame in self._frames
        )
        self.probes += len(made)
        if self.rounds[-2:] != [made, made]:
            self.rounds.append(made)

    def _passes(self, frame: bytes, *, inbound: bool) -> bool:
        self._number += 1
        whole = frame + self._number.to_bytes(4, "big")
        if not inbound:
            os.write(self._tap, whole)
            return any(each == whole for each in self._arrived(self._in.fileno()))
        with contextlib.suppress(OSError):  # ENOBUFS: a program dropped it
            self._out.send(whole)
        return any(each == whole for each in self._arrived(self._tap))

    def _arrived(self, fd: int) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield os.read(fd, 2048)


def main() -> None:
    probing = _Probing(int(sys.argv[1]), sys.argv[2])
    while True:
        asked = bool(select.select([sys.stdin], [], [], PACE)[0])
        if asked and not sys.stdin.readline():
            return
        probing.round()
        if asked:
            seen = [probe for each in probing.rounds for probe in each]
            print(json.dumps({"seen": seen, "probes": probing.probes}), flush=True)
            probing.rounds, probing.probes = [], 0


if __name__ == "__main__":
    main()
