# SPDX-License-Identifier: Apache-2.0
"""Rates, order and pictures of `vgw top`, from samples that tests make up."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cli_fakes import FakeTarget
from tests.controller.process import eventually
from vgw.cli_top_looks import Look, Looker, Watcher
from vgw.cli_top_rates import SORTS, in_order, rule_rates, talker_rates, vm_rates
from vgw.cli_top_terminal import keys_in
from vgw.cli_top_view import State, picture, printable, short
from vgw.errors import ControllerUnreachableError, VgwError

SECOND = 1_000_000_000


def interface(name: str = "tap0", **counts: Any) -> dict[str, Any]:
    """Return an interface of a sample: `ingress=(accepted, dropped)` in packets of 100 bytes."""
    counters = {}
    for direction in ("ingress", "egress"):
        accepted, dropped = counts.get(direction, (0, 0))
        counters[direction] = {
            "accepted": [accepted, 100 * accepted],
            "dropped": [dropped, 100 * dropped],
            "would_drop": [0, 0],
        }
    return {
        "name": name,
        "attached": counts.get("attached", True),
        "hook": "tc",
        "connections": counts.get("connections", 0),
        "connections_max": 1000,
        "half_open": 0,
        "counters": counters,
        "reasons": {"ingress": counts.get("reasons", {}), "egress": {}},
    }


def sample(at: float, alarms: Any = (), /, **vms: Any) -> dict[str, Any]:
    rows = [
        {"vm": vm, "mode": "enforce", "generation": 1, "interfaces": interfaces}
        for vm, interfaces in vms.items()
    ]
    return {"at_ns": int(at * SECOND), "vms": rows, "alarms": list(alarms)}


def look(*rows: dict[str, Any], **more: Any) -> Look:
    return Look(vms=list(rows), number=2, **more)


# --- rates ------------------------------------------------------------------------------------


def test_rates_are_differences_by_time() -> None:
    old = sample(10, web=[interface(ingress=(100, 5), reasons={"DEFAULT": 5})])
    new = sample(12, web=[interface(ingress=(300, 9), egress=(4, 0), reasons={"DEFAULT": 9})])
    (row,) = vm_rates(old, new)
    assert row["rates"]["ingress"]["accepted"] == {"packets": 100, "bits": 80_000}
    assert row["rates"]["ingress"]["dropped"] == {"packets": 2, "bits": 1600}
    assert row["rates"]["egress"]["accepted"] == {"packets": 2, "bits": 1600}
    assert row["reasons"] == [{"direction": "ingress", "reason": "DEFAULT", "packets": 2}]


def test_interfaces_are_summed_and_new_ones_have_no_rates_yet() -> None:
    one, two = interface("tap0", ingress=(2, 0)), interface("tap1", ingress=(4, 0), connections=3)
    (row,) = vm_rates(None, sample(1, web=[one]))
    assert row["rates"] is None
    old = sample(1, web=[interface("tap0")])
    (row,) = vm_rates(old, sample(2, web=[one, two]))
    assert row["rates"]["ingress"]["accepted"]["packets"] == 2
    assert [each["rates"] is None for each in row["interfaces"]] == [False, True]
    (row,) = vm_rates(
        sample(1, web=[interface("tap0"), interface("tap1")]), sample(2, web=[one, two])
    )
    assert row["rates"]["ingress"]["accepted"]["packets"] == 6
    assert (row["connections"], row["connections_max"]) == (3, 2000)


def test_counters_that_began_anew_give_no_negative_rates() -> None:
    old = sample(1, web=[interface(ingress=(1000, 10), reasons={"DEFAULT": 10})])
    (row,) = vm_rates(old, sample(2, web=[interface(ingress=(3, 0))]))
    assert row["rates"]["ingress"]["accepted"] == {"packets": 0, "bits": 0}
    assert row["reasons"] == []


def test_alarms_and_what_is_not_attached_are_told() -> None:
    alarms = [{"alarm": "detached", "vm": "web"}, {"alarm": "netlink", "vm": None}]
    rows = vm_rates(None, sample(1, alarms, web=[interface()], db=[interface(attached=False)]))
    assert [(row["attached"], row["alarms"]) for row in rows] == [(True, ["detached"]), (False, [])]
    text = picture(look(*rows), State(), 80, 24).plain
    assert "!detached" in text
    assert "UNPROTECTD" in text


def test_talkers_are_by_what_they_send_now() -> None:
    def seen(at: int, **octets: int) -> dict[str, Any]:
        rows = [
            {"address": name, "connections": 1, "bytes": {"ingress": count, "egress": 0}}
            for name, count in octets.items()
        ]
        return {"at_ns": at * SECOND, "talkers": rows}

    first = talker_rates(None, seen(1, big=10_000, small=10))
    assert [row["bits"] for row in first] == [None, None]
    second = talker_rates(seen(1, big=10_000, small=10), seen(3, big=10_010, small=1000, new=500))
    assert [(row["address"], row["bits"]["ingress"]) for row in second] == [
        ("small", 3960), ("new", 2000), ("big", 40),
    ]  # fmt: skip


def test_rules_that_were_hit() -> None:
    def answer(*packets: int) -> dict[str, Any]:
        return {
            "rules": [
                {"direction": "ingress", "policy": "p", "rule": f"r{n}", "action": "drop",
                 "packets": count}
                for n, count in enumerate(packets)
            ]
        }  # fmt: skip

    rows = rule_rates(answer(100, 5, 0), answer(100, 9, 0), 2)
    assert [(row["rule"], row["rate"], row["packets"]) for row in rows] == [
        ("r1", 2, 9), ("r0", 0, 100),
    ]  # fmt: skip
    assert [row["rate"] for row in rule_rates(None, answer(1), 1)] == [None]


# --- order ------------------------------------------------------------------------------------


def three() -> Look:
    old = sample(1, a=[interface()], b=[interface()], c=[interface()])
    new = sample(
        2,
        a=[interface(ingress=(1, 3), connections=2)],
        b=[interface(ingress=(2, 2), egress=(9, 0), connections=3)],
        c=[interface(ingress=(3, 1), connections=1)],
    )
    return look(*vm_rates(old, new))


@pytest.mark.parametrize(
    ("sort", "order"),
    [("vm", "abc"), ("in", "cba"), ("out", "bac"), ("drop", "abc"), ("connections", "bac")],
)
def test_sorting(sort: str, order: str) -> None:
    rows = three().vms
    assert "".join(row["vm"] for row in in_order(rows, sort, reverse=False)) == order
    names = "".join(row["vm"] for row in in_order(rows, sort, reverse=True))
    assert names == order[::-1] or sort == "out"  # those with equal numbers stay by name


def test_keys_sort_select_open_and_go_back() -> None:
    shown, state = three(), State(sort="vm")
    assert state.focus(shown) == "a"
    for key, focus in (("down", "b"), ("down", "c"), ("down", "c"), ("up", "b"), ("home", "a")):
        state = state.pressed(key, shown)
        assert state.focus(shown) == focus
    state = state.pressed("end", shown)
    for sort in (*SORTS[1:], SORTS[0]):
        state = state.pressed("s", shown)
        assert (state.sort, state.focus(shown)) == (sort, "c")  # the selection stays
    assert state.pressed("r", shown).reverse
    state = state.pressed("enter", shown)
    assert state.opened
    assert state.pressed("s", shown) == state
    assert not state.pressed("back", shown).opened
    assert State().pressed("enter", look()) == State()


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"\x1b[A\x1b[B", ["up", "down"]),
        (b"\x1bOA", ["up"]),
        (b"\x1b", ["back"]),
        (b"\x1b[5~x\x1b[6~", ["page up", "page down"]),
        (b"\x1b[15~s", ["s"]),
        (b"\x1b[1;5Dr", ["r"]),
        (b"\x1b[", []),
        (b"\xff\x00\x80", []),
        (b"\rsq", ["enter", "s", "q"]),
    ],
)
def test_keys(data: bytes, keys: list[str]) -> None:
    assert list(keys_in(data)) == keys


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.25, "0.2"), (2, "2"), (9.94, "9.9"), (9.96, "10"), (999, "999"),
        (999.9, "1.0k"), (1234, "1.2k"), (12_345, "12.3k"), (123_456, "123k"), (999_900, "1.0M"),
        (5.5e9, "5.5G"), (7e12, "7.0T"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text
    assert len(text) <= 6


def test_names_command_no_terminal() -> None:
    hostile = "\x1b[2J\x1b]0;x\x07\nweb\u202e\x9b1m"
    assert re.fullmatch(r"[ -~]{20}", printable(hostile, 20))
    row = vm_rates(None, sample(1, **{hostile: [interface(hostile)]}))
    for opened in (False, True):
        text = picture(look(*row), State(opened=opened), 80, 24).plain
        assert "?[2J" in text
        assert re.fullmatch(r"[ -~\n]*", text)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("width", "height"), [(80, 24), (200, 60), (40, 10), (20, 5), (80, 3), (1, 1), (132, 24)]
)
def test_pictures_fit(width: int, height: int, opened: bool) -> None:
    names = [f"vm{number:03}" for number in range(100)]
    old = sample(1, **{name: [interface()] for name in names})
    many = {f"REASON_{n}": n + 1 for n in range(40)}
    new = sample(2, **{name: [interface(ingress=(5, 820), reasons=many)] * 6 for name in names})
    talkers = [
        {"address": f"2001:db8::{n:x}", "connections": n, "bits": {"ingress": n, "egress": 0}}
        for n in range(50)
    ]
    rules = [
        {"direction": "ingress", "policy": "p" * 50, "rule": "r" * 60, "rate": n, "packets": n}
        for n in range(50)
    ]
    shown = look(*vm_rates(old, new), focus="vm050", talkers=talkers, rules=rules, error="e" * 300)
    for state in (State("vm", False, "vm050", opened), State("vm", True, "vm099", opened)):
        lines = picture(shown, state, width, height).plain.split("\n")
        assert len(lines) <= height
        assert {len(line) for line in lines} == {width}
        if (width, height) >= (80, 24):
            assert len(lines) == height
            assert any(line.startswith(str(state.selected)) for line in lines)
            assert lines[-1].startswith("esc back" if opened else "up/down")
            assert lines[-2].startswith("! eee")


def test_an_empty_host_has_a_picture() -> None:
    for number, text in ((0, "reading ..."), (1, "measuring ...")):
        assert text in picture(Look(number=number), State(), 80, 24).plain


# --- looking ----------------------------------------------------------------------------------


class Changing(FakeTarget):
    """A host on which every sample is later and has more."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.fails: VgwError | None = None

    def sample(self) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        self.number += 1
        return sample(self.number, web01=[interface(ingress=(10 * self.number, 0))])


def test_a_look_outlives_failures() -> None:
    target, connected = Changing(), 0

    def connect() -> Any:
        nonlocal connected
        connected += 1
        return target

    looker = Looker(connect)
    assert looker.refresh("web01").vms[0]["rates"] is None
    target.fails = VgwError("busy")
    assert looker.refresh(None).error == "busy"
    assert looker.look.vms
    target.fails = ControllerUnreachableError("gone")
    assert looker.refresh(None).error == "gone"
    assert connected == 1
    target.fails = None
    shown = looker.refresh("web01", rules=True)
    assert (shown.error, connected) == (None, 2)
    assert shown.vms[0]["rates"]["ingress"]["accepted"]["packets"] == 10
    assert shown.focus == "web01"
    assert shown.rules
    assert looker.refresh("nobody").focus is None


def test_one_look_needs_two_samples() -> None:
    target = Changing()
    shown, seconds = Looker(lambda: target).over(0.01, None)
    assert (seconds, shown.vms[0]["rates"]["ingress"]["accepted"]["packets"]) == (1, 10)
    target.fails = VgwError("no permission")
    with pytest.raises(VgwError, match="no permission"):
        Looker(lambda: target).over(0.01, None)


def test_a_changed_focus_is_looked_at_at_once() -> None:
    target = Changing()
    watcher = Watcher(Looker(lambda: target), 3600, lambda: None)
    watcher.start()
    try:
        eventually("the first look", lambda: watcher.look.number == 1)
        watcher.focus("web01", rules=True)
        eventually(
            "web01's rules", lambda: watcher.look.focus == "web01" and bool(watcher.look.rules)
        )
        assert watcher.look.number == 1
    finally:
        watcher.stop()
