# SPDX-License-Identifier: Apache-2.0
"""Traffic that does not stop: a process that sends frames one way and tells what arrived.

It sends the frames in rounds, each frame with a number of its own. A round ends with an ARP
request, which every guard lets pass and which nothing overtakes, as sender and receiver are on one
CPU: when it has arrived, each frame of the round has arrived or never will. It ends when its input
does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds after which something awaited counts as not coming
PACE = 0.001  # seconds between rounds: what changes policies needs CPUs as well
_AGAIN = 0.1  # seconds after which a mark counts as lost
_ETH_P_IP, _ETH_P_ARP = 0x0800, 0x0806
_ARP_TYPE = struct.pack("!H", _ETH_P_ARP)


#: Where frames are sent from and where they arrive: interfaces, or the fd of a TAP.
Ends = tuple[str | int, str | int]


class Tally(NamedTuple):
    """What became of the frames of each kind.

    `strange` are those that arrived in a round in which they had not been sent. `first` is when the
    first of a kind arrived, on the monotonic clock.
    """

    sent: dict[str, int]
    arrived: dict[str, int]
    first: dict[str, float]
    strange: list[str]


class Traffic:
    """Frames on their way, from the start of a `with` block to stop() or its end."""

    def __init__(
        self,
        frames: Mapping[str, Sequence[bytes]],
        mark: bytes,
        ends: Ends,
        cpu: int = 0,
    ) -> None:
        """Send `frames`, by kind, from one end to the other.

        `mark` is an ARP request; `cpu` is the place of the CPU among those that may be used.
        """
        order = {
            "frames": [(kind, each.hex()) for kind, some in frames.items() for each in some],
            "mark": mark.hex(),
            "ends": ends,
            "cpu": cpu,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.swap_traffic", json.dumps(order)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[end for end in ends if isinstance(end, int)],
        )

    def __enter__(self) -> Traffic:
        try:
            assert self._line() == "running\n"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def stop(self) -> Tally:
        """Send a last round and return what became of the frames."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None
        answer = json.loads(self._line())
        assert "error" not in answer, answer["error"]
        return Tally(**answer)

    def _line(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * PATIENCE)
        assert ready, "the traffic does not answer"
        return self._process.stdout.readline()


class _Sender:
    """The process: what it sends and what it has seen arrive."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        near, far = order["ends"]
        self._send = _sender(near)
        self._receiver = _Receiver(far)
        self._mark = bytes.fromhex(order["mark"])
        self._frames = [(kind, bytes.fromhex(text)[:-4]) for kind, text in order["frames"]]
        self._number = 0
        self._sent: Counter[str] = Counter()
        self._arrived: Counter[str] = Counter()
        self._first: dict[str, float] = {}
        self._strange: list[str] = []

    def round(self) -> None:
        """Send every frame once and wait until all that pass have arrived."""
        under_way: dict[bytes, str] = {}
        for kind, frame in self._frames:
            self._number += 1
            whole = frame + struct.pack("!I", self._number)
            under_way[whole] = kind
            self._send(whole)
        mark = self._mark[:-4] + struct.pack("!I", self._number)
        for frame in self._receiver.until(mark, lambda: self._send(mark)):
            found = under_way.pop(frame, None)
            if found is None:
                self._strange.append(frame.hex())
            else:
                self._arrived[found] += 1
                self._first.setdefault(found, time.monotonic())
        self._sent.update(kind for kind, _ in self._frames)

    def tally(self) -> dict[str, Any]:
        return Tally(self._sent, self._arrived, self._first, self._strange)._asdict()


def _sender(end: str | int) -> Callable[[bytes], None]:
    """Return what sends a frame: into the VM's side of a TAP, or out of an interface."""
    if isinstance(end, int):
        return lambda frame: _write(end, frame)
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind((end, 0))

    def send(frame: bytes) -> None:
        with contextlib.suppress(OSError):  # ENOBUFS: a program dropped it
            sock.send(frame)

    return send


def _write(fd: int, frame: bytes) -> None:
    os.write(fd, frame)


class _Receiver:
    """An end at which frames arrive, behind the programs of the hook."""

    def __init__(self, end: str | int) -> None:
        self._sockets: list[socket.socket] = []
        if isinstance(end, int):
            self._fds = [end]
            return
        # A socket for one protocol is behind tc; one for all would see what tc drops.
        for protocol in (_ETH_P_IP, _ETH_P_ARP):
            # With a protocol from the start it would hear all interfaces until it is bound.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            sock.bind((end, protocol))
            sock.setblocking(False)
            self._sockets.append(sock)
        self._fds = [sock.fileno() for sock in self._sockets]

    def until(self, mark: bytes, send_mark: Callable[[], None]) -> list[bytes]:
        """Send the mark, again if need be, and return the IP frames that arrive up to it.

        TimeoutError without it.
        """
        found: list[bytes] = []
        deadline = time.monotonic() + PATIENCE
        marked = False
        send_mark()
        while not marked:
            ready, _, _ = select.select(self._fds, [], [], _AGAIN)
            if not ready:
                if time.monotonic() > deadline:
                    raise TimeoutError("the frame that passes every guard has not arrived")
                send_mark()
            # The socket for ARP is read first: what was before the mark is in the other by then.
            for fd in reversed(self._fds):
                for frame in _all_of(fd):
                    if frame[12:14] != _ARP_TYPE:
                        found.append(frame)
                    marked |= frame == mark
        return found


def _all_of(fd: int) -> list[bytes]:
    """Return the frames that wait."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(os.read(fd, 2048))
    return found


def main() -> None:
    order = json.loads(sys.argv[1])
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[order["cpu"] % len(cpus)]})
    sender = _Sender(order)
    print("running", flush=True)
    try:
        while not select.select([sys.stdin], [], [], PACE)[0]:
            sender.round()
        sender.round()
    except (OSError, TimeoutError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps(sender.tally()), flush=True)


if __name__ == "__main__":
    main()
