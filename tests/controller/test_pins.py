# SPDX-License-Identifier: Apache-2.0
"""What is pinned is listed while others pin and unpin."""

from __future__ import annotations

import threading
from pathlib import Path

from vgw.controller.pins import all_endpoint_dirs, entries


def test_endpoints_are_listed_while_others_come_and_go(tmp_path: Path) -> None:
    """A policy's maps are made beside, in a directory that gets another name then."""
    stays, comes = tmp_path / "web01/tap0", tmp_path / "images/%%new"
    stays.mkdir(parents=True)
    comes.parent.mkdir()
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            comes.mkdir()
            comes.rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(3000):
            found = list(all_endpoint_dirs(tmp_path))
            assert stays in found
            assert not any(pin for each in found for pin in entries(each))
    finally:
        stop.set()
        other.join()
