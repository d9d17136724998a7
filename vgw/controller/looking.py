# SPDX-License-Identifier: Apache-2.0
"""A host for a process that does not stay: its VMs are looked for once, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from vgw.controller.finding.search import Look
from vgw.controller.overlay import Overlay
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host


def looking_host(paths: Paths, progress: Callable[[str], None] | None = None) -> tuple[Host, Look]:
    """Return the host under `paths` and the look at its VMs; `progress` is told what takes long."""
    look = Look()
    return Host(paths, progress=progress, overlay=Overlay(paths, look.found)), look
