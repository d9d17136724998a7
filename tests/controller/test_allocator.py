# SPDX-License-Identifier: Apache-2.0
"""All threads of the controller have their memory from one pool, and free pages go back."""

from __future__ import annotations

import subprocess
import sys

#: Python that has threads allocate at the same time, and prints how many pools there are.
POOLS = """
import ctypes, re, sys, tempfile, threading
from vgw.controller.allocator import give_back, share_one_pool
if sys.argv[1] == "shared":
    share_one_pool()
meeting = threading.Barrier(8)
def work():
    meeting.wait()
    blocks = [bytearray(2000) for _ in range(1000)]
    meeting.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(len(re.findall(rb"<heap nr=", file.read())))
"""


def pools(how: str) -> int:
    command = [sys.executable, "-c", POOLS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_threads_share_one_pool() -> None:
    assert pools("shared") == 1


def test_by_default_they_do_not() -> None:
    """The control."""
    assert pools("default") > 1
