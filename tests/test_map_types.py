# SPDX-License-Identifier: Apache-2.0
"""What BCC makes of the types of maps: code that reads and writes each of their numbers as text.

Nothing calls that code, and it is optimised all the same. A type with many numbers takes longer
to compile than all the programs, so large values are declared as bytes, which BCC takes for one
string.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from vgw import loader
from vgw.loader.cache import OPTIONS
from vgw.loader.sources import write_headers
from vgw.loader.ticks import tick_options

pytestmark = pytest.mark.bpf

#: More numbers than any map's values need.
MOST: Final = 2000

#: Prints, as JSON, what BCC says of the values of each map of a program; by map.
DESCRIBE: Final = """\
import ctypes, json, sys
from vgw.loader.compiler import import_bcc
bcc = import_bcc()
module = bcc.BPF(text=sys.stdin.buffer.read(), cflags=sys.argv[1:]).module
name, kind = bcc.lib.bpf_table_name, bcc.lib.bpf_table_leaf_desc_id
for function in (name, kind):
    function.restype, function.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_size_t)
tables = range(bcc.lib.bpf_num_tables(ctypes.c_void_p(module)))
print(json.dumps({name(module, n).decode(): json.loads(kind(module, n)) for n in tables}))
"""


def numbers(kind: Any) -> int:
    """Return how many numbers BCC sees in a type, which is a name or a name and fields."""
    return 1 if isinstance(kind, str) else sum(map(_numbers_of_field, kind[1]))


def _numbers_of_field(field: list[Any]) -> int:
    """The same for a field: name and type, or one without a name; and dimensions of an array."""
    _, kind, *rest = field
    if rest and isinstance(rest[0], str):
        return numbers(field)
    if rest and kind == "unsigned char":
        return 1
    dimensions: list[int] = rest[0] if rest else []
    return numbers(kind) * math.prod(dimensions)


def numbers_by_map(source: str, directory: Path) -> dict[str, int]:
    """Return how many numbers the values of each map of a flattened source have."""
    headers = directory / "kernel"
    tree = loader.SourceTree(loader.bpf_dir())
    options = [*OPTIONS, *tick_options(), *write_headers(tree, headers)]
    output = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *options],
        input=source.encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "BCC_KERNEL_SOURCE": str(headers)},
    ).stdout
    return {name: numbers(kind) for name, kind in json.loads(output).items()}


def test_no_map_has_values_of_many_numbers(tmp_path: Path) -> None:
    source = loader.SourceTree(loader.bpf_dir()).flatten("policy_probe")
    found = numbers_by_map(source, tmp_path)
    assert found["policies_inner"] == 1
    assert found["configs"] > 100
    assert max(found.values()) <= MOST


def test_an_array_of_numbers_counts_each(tmp_path: Path) -> None:
    """Negative control: declared as what it holds, a large value does have many."""
    source = """\
#include <linux/types.h>
struct line { u64 words[8]; };
struct lines { struct line lines[1024]; u8 name[16]; union { u64 one; u32 two[2]; }; };
BPF_ARRAY(large, struct lines, 1);
"""
    assert numbers_by_map(source, tmp_path) == {"large": 8 * 1024 + 1 + 3}
