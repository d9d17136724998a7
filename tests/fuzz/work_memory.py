# SPDX-License-Identifier: Apache-2.0
"""Where the programs' work memory holds what was decided, asked of the header that says so.

The `scratch` map keeps the last packet of each CPU, decision included. It is private to the
programs and no part of the ABI, so there is no mirror of it in Python: gcc compiles a few lines
around bpf/packet.h that print the places.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vgw.loader import bpf_dir

#: What is read, as C names it behind `struct scratch`.
FIELDS = (
    "decision.verdict",
    "decision.reason",
    "decision.rule",
    "asked",
    "rejudge",
    "query.path",
    "key",
)
_HEAD = """
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
#include "packet.h"
#define PLACE(name) print_place(#name, offsetof(struct scratch, name), \\
	sizeof(((struct scratch *)0)->name))
static void print_place(const char *name, size_t offset, size_t size)
{
	printf("%s %zu %zu\\n", name, offset, size);
}
int main(void)
{
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Offset and size of a field, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class WorkMemory:
    """The layout of struct scratch, as far as it is read."""

    size: int
    places: Mapping[str, Place]


def read_layout() -> WorkMemory:
    """Return the layout of bpf/packet.h; raises CalledProcessError when it lacks a field."""
    lines = [f"\tPLACE({name});" for name in FIELDS]
    lines += ['\tprintf("size %zu 0\\n", sizeof(struct scratch));', "\treturn 0;", "}", ""]
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "places.c"), Path(directory, "places")
        source.write_text(_HEAD + "\n".join(lines))
        command = ("gcc", "-I", str(bpf_dir()), "-o", str(program), str(source))
        subprocess.run(command, check=True)
        output = subprocess.run((str(program),), check=True, capture_output=True, text=True).stdout
    places = {}
    for line in output.splitlines():
        name, offset, size = line.split()
        places[name] = Place(int(offset), int(size))
    return WorkMemory(places.pop("size").offset, places)
