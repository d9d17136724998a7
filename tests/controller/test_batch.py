# SPDX-License-Identifier: Apache-2.0
"""Work for many VMs side by side: what became of each, and that it is told as it goes on."""

from __future__ import annotations

import threading

import pytest

from tests.patience import PATIENCE
from vgw.controller.batch import each_of, in_two_steps
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


def test_one_thread_computes_and_what_waits_does_not_keep_it() -> None:
    computed: list[tuple[str, int]] = []
    third = threading.Event()

    def compute(name: str) -> bool:
        computed.append((name, threading.get_ident()))
        if name == "third":
            third.set()
        return name != "second"

    def wait(name: str) -> None:
        assert name != "second"
        assert third.wait(PATIENCE)

    items = ["first", "second", "third"]
    told: list[None] = []
    found = list(in_two_steps(compute, wait, items, 2, lambda: told.append(None)))
    assert found == [(name, None) for name in items]
    assert computed == [(name, threading.get_ident()) for name in items]
    assert len(told) == 5


@pytest.mark.parametrize("step", [0, 1])
def test_an_error_of_either_step_is_that_items_alone(step: int) -> None:
    done: list[tuple[int, int]] = []

    def work(this_step: int, number: int) -> bool:
        if (this_step, number) == (step, 2):
            raise OSError(28, "No space left on device")
        done.append((number, this_step))
        return True

    def first(number: int) -> bool:
        return work(0, number)

    def then(number: int) -> None:
        work(1, number)

    found = dict(in_two_steps(first, then, [1, 2, 3], 4, lambda: None))
    assert (found[1], found[3]) == (None, None)
    assert isinstance(found[2], VgwError)
    assert {number for number, last in done if last == 1} == {1, 3}
