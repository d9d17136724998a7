# SPDX-License-Identifier: Apache-2.0
"""Open connections that exchange data all the time, and what becomes of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

#: Seconds after which data that has not arrived counts as not coming. TCP sends what was lost
#: again after 0.2 s, 0.6 s, 1.4 s, 3 s and 6.2 s.
STALL: Final = 10.0
_BYTES: Final = 64
#: Seconds between two rounds: others want to use the processor as well.
_PACE: Final = 0.005
#: Each takes its time; after so many the rest would tell nothing new.
_MOST_PROBLEMS: Final = 3

Pair = tuple[socket.socket, socket.socket]


class LiveFlows:
    """Connections, both ends of each, that exchange data during a `with` block, one by one.

    `problems` has a line for each that was cut or stalled, which is left alone from then on; after
    a few of them it ends.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.problems: list[str] = []
        self.exchanges = 0
        self.longest = 0.0
        self._pairs = list(pairs)
        self._rounds = 0
        self._round = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live flows", daemon=True)
        for pair in pairs:
            for end in pair:
                end.settimeout(STALL)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> LiveFlows:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the exchange; the connections stay open."""
        self._stop.set()
        self._thread.join()

    def proceed(self, rounds: int = 1) -> bool:
        """Wait until all connections have begun and ended so many exchanges more; False: cannot."""
        with self._round:
            # That under way began earlier.
            target = self._rounds + 1 + rounds
            patience = STALL * (_MOST_PROBLEMS + 1)
            ended = self._round.wait_for(
                lambda: self._rounds >= target or bool(self.problems), patience
            )
        return ended and not self.problems

    def reset_longest(self) -> None:
        """Begin anew to look for the exchange that takes longest."""
        self.longest = 0.0

    def _run(self) -> None:
        while self._goes_on():
            for pair in list(self._pairs):
                if self._goes_on():
                    self._exchange(pair)
            with self._round:
                self._rounds += 1
                self._round.notify_all()
            self._stop.wait(_PACE)

    def _goes_on(self) -> bool:
        return not self._stop.is_set() and len(self.problems) < _MOST_PROBLEMS

    def _exchange(self, pair: Pair) -> None:
        number = self.exchanges.to_bytes(8, "big")
        start = time.monotonic()
        try:
            for sender, receiver in (pair, pair[::-1]):
                sender.sendall(number.ljust(_BYTES, b"."))
                if _receive(receiver) != number:
                    raise OSError("other data arrived")
        except OSError as error:
            self._pairs.remove(pair)
            with self._round:
                self.problems.append(f"after {time.monotonic() - start:.1f} s: {error}")
                self._round.notify_all()
            return
        self.exchanges += 1
        self.longest = max(self.longest, time.monotonic() - start)


def _receive(end: socket.socket) -> bytes:
    """Receive one message and return its number."""
    data = b""
    while len(data) < _BYTES:
        part = end.recv(_BYTES - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return data[:8]
