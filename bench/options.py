# SPDX-License-Identifier: Apache-2.0
"""What a user can choose about measurements, and how a part tells that it is at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Told what is being done; the text replaces the one before.
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one run.

    `rules` are sizes of rule sets in ascending order, none for those of each part. `shape` is a
    name in rulesets.SHAPES, `version` the IP version of rules and traffic. `seconds` is the length
    of one sample of traffic, `rounds` how many samples each figure gets. `vgw` is the command to
    measure, None for the one of this installation.
    """

    quick: bool
    rules: tuple[int, ...]
    shape: str
    version: int
    seconds: float
    rounds: int
    vgw: str | None = None
