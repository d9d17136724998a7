# SPDX-License-Identifier: Apache-2.0
"""A real DHCP server in a node of the lab."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.lab import wire
from scripts.lab.wire import Node


@contextmanager
def dhcp_server(node: Node, directory: Path, settings: str) -> Iterator[None]:
    """Run busybox's server with these settings, beside those that every one needs."""
    directory.joinpath("leases").touch()
    config = directory / "udhcpd.conf"
    config.write_text(
        f"interface eth0\noption subnet 255.255.255.0\n{settings}"
        f"lease_file {directory}/leases\npidfile {directory}/pid\n"
    )
    process = subprocess.Popen(
        node.command("busybox", "udhcpd", "-f", str(config)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=wire.PATIENCE)
