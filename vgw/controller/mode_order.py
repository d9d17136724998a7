# SPDX-License-Identifier: Apache-2.0
"""The user's order that a VM has another mode than its policy says: made, lifted, reported."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from vgw.abi import Mode
from vgw.controller.actor import one_line
from vgw.controller.events import timestamp
from vgw.controller.manifest import Manifest, ModeNote


def with_order(manifest: Manifest, mode: Mode | None, reason: str, by: str) -> Manifest:
    """Return what is remembered of a VM when a mode is ordered for it; None lifts the order.

    So does, without a reason, the mode that its policy says. With one the order stays: the policy
    may come to say something else. An order that is given again is as old as it was.
    """
    is_known = bool(manifest.endpoints)
    if mode is None or (is_known and mode is manifest.mode and not reason):
        return dataclasses.replace(manifest, mode_override=None, mode_note=None)
    text, before = one_line(reason), manifest.mode_note
    if mode is manifest.mode_override and before is not None and before.reason == text:
        return manifest
    note = ModeNote(text, timestamp(time.time_ns()), one_line(by))
    return dataclasses.replace(manifest, mode_override=mode, mode_note=note)


def order_report(manifest: Manifest | None) -> dict[str, Any] | None:
    """Return what `status` says of an order, as JSON; None when there is none."""
    if manifest is None or manifest.mode_override is None:
        return None
    note = manifest.mode_note
    return {
        "mode": manifest.mode_override.name.lower(),
        "reason": None if note is None else note.reason or None,
        "since": None if note is None else note.since,
        "by": None if note is None else note.by or None,
    }
