# SPDX-License-Identifier: Apache-2.0
"""A deliberately wrong build of a packet program: the right sources with one text changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change in a file of bpf/, in which `old` stands once; the rows of `group` must notice it.

    Only `program` is built wrong, for the sake of time; the endpoint's other program is right.
    """

    group: str
    name: str
    file: str
    old: str
    new: str
    program: str = "xdp_from_vm"
