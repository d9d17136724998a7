# SPDX-License-Identifier: Apache-2.0
"""Work for many VMs side by side: what became of each, and that it is told as it goes on."""

from __future__ import annotations

import threading

from tests.controller.process import PATIENCE
from vgw.controller.batch import each_of
from vgw.errors import VgwError


def test_every_item_has_its_result_or_its_error_in_their_order() -> None:
    def work(number: int) -> int:
        if number in errors:
            raise errors[number]
        return number * 2

    errors = {2: VgwError("two"), 3: OSError(28, "No space left on device"), 4: MemoryError()}
    found = list(each_of(work, [1, 2, 3, 4, 5], 2, lambda: None))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    outcomes = dict(found)
    assert (outcomes[1], outcomes[2], outcomes[5]) == (2, errors[2], 10)
    assert isinstance(outcomes[3], VgwError)
    assert "out of memory" in str(outcomes[4])


def test_it_is_told_when_an_item_is_done_not_when_all_are() -> None:
    told = threading.Event()

    def work(name: str) -> bool:
        return name == "first" or told.wait(PATIENCE)

    assert list(each_of(work, ["first", "second"], 2, told.set)) == [
        ("first", True),
        ("second", True),
    ]
