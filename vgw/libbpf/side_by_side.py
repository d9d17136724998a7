# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for the kernel, made at the same time so that they wait for the same thing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def side_by_side(first: Callable[[], object], *others: Callable[[], object]) -> None:
    """Make calls at the same time, each but the first in a thread; return when all have ended.

    Raises what the first of them, in this order, has raised.
    """
    if not others:
        first()
        return
    with ThreadPoolExecutor(len(others), thread_name_prefix="vgw-wait") as pool:
        futures = [pool.submit(call) for call in others]
        first()
        for future in futures:
            future.result()
