# SPDX-License-Identifier: Apache-2.0
"""Counts of rules over changes of their policy: none lost, none counted twice, whatever dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.controller.conftest import run
from tests.controller.killed import killed_after, killed_at
from tests.controller.observe import send_to_vm
from tests.controller.policies import document, to_vm
from vgw import libbpf
from vgw.abi import Mode
from vgw.controller import change, endpoint, readings, reconcile, rule_counts, status
from vgw.controller.change import Change
from vgw.controller.paths import Paths
from vgw.controller.readings import read_endpoints
from vgw.controller.reconcile import Host
from vgw.controller.replacement import Placing
from vgw.controller.rule_counts import RuleCounts, load_counts
from vgw.controller.rule_readings import RuleReadings
from vgw.maps import EndpointMaps
from vgw.policy.model import PolicyDocument

pytestmark = pytest.mark.bpf

Tap = Callable[[str], int]
_PORTS: Iterator[int] = iter(range(20000, 60000))


def policy(*more: str) -> PolicyDocument:
    """Return a policy that lets HTTP in, behind rules of these names that match nothing sent."""
    others = [f"{{name: {name}, action: accept, services: [udp/9]}}" for name in more]
    http = "{name: http, action: accept, services: [tcp/80]}"
    return document(f"[{', '.join([*others, http])}]")


def send(count: int, name: str = "tap0") -> None:
    for _ in range(count):
        send_to_vm(name, to_vm(sport=next(_PORTS)))


def packets(host: Host, rule: str = "http", vm: str = "web01") -> int:
    """Return what a rule has counted, after a check that the metrics say the same."""
    (found,) = [row for row in host.rules(vm)["rules"] if row["rule"] == rule]
    readings = [each for each in read_endpoints(host, RuleReadings(host.paths)) if each.vm == vm]
    assert found["packets"] == sum(
        each.packets for reading in readings for each in reading.rules if each.rule == rule
    )
    assert found["bytes"] == found["packets"] * len(to_vm())
    assert (found["last_hit"] is None) == (found["packets"] == 0)
    count: int = found["packets"]
    return count


def counters(host: Host) -> tuple[int | None, int | None]:
    """Return the ids of the counters of the active and of the spare slot."""
    (endpoint,) = host.endpoints()
    with endpoint:
        active = endpoint.maps.active_slot()
        return endpoint.maps.counters_id(active), endpoint.maps.counters_id(1 - active)


def test_counts_follow_a_rule_whatever_its_number(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    total = 0
    for more in ((), ("a",), ("a", "b"), ("b",), ()):
        host.apply(policy(*more))
        send(2)
        total += 2
        assert packets(host) == total
    assert counters(host)[1] is None


def test_counts_of_rules_that_are_gone_are_not_kept(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    send(2)
    host.apply(document("[{name: other, action: accept, services: [tcp/80]}]"))
    send(3)
    assert packets(host, "other") == 3

    host.apply(policy())

    assert packets(host) == 0
    assert load_counts(paths.counts("web01")).carried == {}


def test_counts_are_those_of_all_interfaces(host: Host, tap: Tap) -> None:
    for name in ("tap0", "tap1"):
        tap(name)
    vms = {"web01": "{interfaces: [{name: tap0}, {name: tap1}]}"}
    rules = "[{name: http, action: accept, services: [tcp/80]}%s]"
    host.attach(document(rules % "", vms=vms), "web01")
    send(1, "tap0")
    send(2, "tap1")

    host.apply(document(rules % ", {name: a, action: drop, services: [udp/9]}", vms=vms))

    assert packets(host) == 3
    send(1, "tap1")
    assert packets(host) == 4


@pytest.mark.parametrize("place", ["load_counts", "counted_now"])
def test_counts_are_right_while_a_policy_is_replaced(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A whole change goes on in the middle of reading them."""
    tap("tap0")
    host.attach(policy(), "web01")
    send(5)
    others = iter([*"abcdefgh"])

    def interrupted(owner: Any) -> None:
        real = getattr(owner, place)

        def late(*arguments: Any) -> Any:
            found = real(*arguments)
            found = found if place == "load_counts" else list(found)
            if changes:
                changes.pop()
                host.apply(policy(next(others)))
            return found

        monkeypatch.setattr(owner, place, late)

    for owner in (rule_counts, reconcile, readings, status):
        if hasattr(owner, place):
            interrupted(owner)
    for _ in range(2):
        changes = [1]
        assert [each["packets"] for each in host.rules("web01")["rules"]] == [0, 5]
        changes = [1]
        (reading,) = read_endpoints(host, RuleReadings(host.paths))
        assert [each.packets for each in reading.rules] == [0, 5]


def test_counts_do_not_outlive_the_vm(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    send(2)
    host.apply(policy("a"))
    assert paths.counts("web01").exists()
    host.detach("web01")
    assert not paths.counts("web01").exists()
    host.attach(policy(), "web01")
    assert packets(host) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda host: host.set_mode("web01", Mode.MONITOR),
        lambda host: host.flush("web01"),
        lambda host: host.apply(
            document(
                "[{name: http, action: accept, services: [tcp/80]}]",
                vms={"web01": "{mode: monitor, interfaces: [{name: tap0}]}"},
            )
        ),
    ],
    ids=["mode", "flush", "configuration"],
)
def test_a_change_of_configuration_keeps_the_counters(
    host: Host, tap: Tap, edit: Callable[[Host], object]
) -> None:
    tap("tap0")
    host.attach(
        document(
            "[{name: http, action: accept, services: [tcp/80]}]",
            vms={"web01": "{interfaces: [{name: tap0}]}"},
        ),
        "web01",
    )
    send(2)
    before = counters(host)

    edit(host)

    assert counters(host) == before
    assert packets(host) == 2
    send(1)
    assert packets(host) == 3
    host.apply(policy("a"))  # negative control: other rules have other counters
    assert counters(host) != before
    assert packets(host) == 3


#: Where a process dies, from the staged policy to the freed one.
PLACES: list[tuple[Any, str]] = [
    (EndpointMaps, "stage"),
    (EndpointMaps, "switch"),
    (libbpf, "wait_for_programs"),
    (change, "save_counts"),
    (EndpointMaps, "release"),
]
#: What the next process does.
NEXT: dict[str, Callable[[Host], object]] = {
    "the same": lambda host: host.apply(policy("a")),
    "back": lambda host: host.apply(policy()),
    "another": lambda host: host.apply(policy("a", "b")),
    "mode": lambda host: host.set_mode("web01", Mode.MONITOR),
    "flush": lambda host: host.flush("web01"),
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
@pytest.mark.parametrize("following", NEXT)
def test_a_killed_change_loses_no_count_and_adds_none(
    host: Host, paths: Paths, tap: Tap, place: tuple[Any, str], following: str
) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    send(3)
    host.apply(policy("b"))
    send(4)

    killed_at(*place, lambda: Host(paths).apply(policy("a")))

    assert packets(host) == 7
    send(5)
    assert packets(host) == 12
    NEXT[following](host)
    assert packets(host) == 12
    assert counters(host)[1] is None
    send(6)
    host.apply(policy("c"))
    assert packets(host) == 18
    host.apply(policy())
    assert packets(host) == 18


def test_killed_at_any_step_counts_stay_right(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    total, steps, finished = 0, 0, False
    while not finished:
        host.apply(policy())
        send(1)
        finished = killed_after(steps, lambda: Host(paths).apply(policy("a")))
        send(1)
        total += 2
        assert packets(host) == total, f"after {steps} steps"
        host.apply(policy("b"))
        assert packets(host) == total, f"after {steps} steps"
        steps += 1
    assert steps > 15


def test_what_is_counted_twice_is_noticed(
    host: Host, paths: Paths, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the note of what was added, a death before the release shows."""
    tap("tap0")
    host.attach(policy(), "web01")
    send(3)
    original = RuleCounts.harvesting

    def forgetful(self: RuleCounts, *arguments: Any) -> RuleCounts:
        return RuleCounts(original(self, *arguments).carried)

    monkeypatch.setattr(RuleCounts, "harvesting", forgetful)
    killed_at(EndpointMaps, "release", lambda: Host(paths).apply(policy("a")))
    host.apply(policy("a", "b"))

    assert packets(host) == 6


def test_what_is_not_added_is_noticed(
    host: Host, paths: Paths, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without a look into the spare slot, a death after the switch shows."""
    tap("tap0")
    host.attach(policy(), "web01")
    send(3)
    killed_at(libbpf, "wait_for_programs", lambda: Host(paths).apply(policy("a")))
    monkeypatch.setattr(RuleCounts, "left_over", lambda *_: None)
    host.apply(policy("a", "b"))

    assert packets(host) == 0


def test_counts_survive_the_manifest(host: Host, paths: Paths, tap: Tap) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    send(3)
    paths.manifest("web01").unlink()

    host.apply(policy("a"))

    assert packets(host) == 3  # the images in force say which rules they were


def test_counts_are_written_only_when_there_are_some(
    host: Host, paths: Paths, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")
    host.attach(policy(), "web01")
    saved: list[RuleCounts] = []
    for module in (change, rule_counts):
        monkeypatch.setattr(module, "save_counts", lambda _, counts: saved.append(counts))
    host.apply(policy("a"))
    assert saved == []
    assert not paths.counts("web01").exists()


def two_interfaces() -> PolicyDocument:
    both = "{interfaces: [{name: tap0}, {name: tap1}]}"
    rules = "[{name: http, action: accept, services: [tcp/80]}]"
    return document(rules, vms={"web01": both})


def test_catalogue_M14_what_was_counted_on_an_interface_that_is_gone_stays(
    host: Host, veth: Callable[[str], str], paths: Paths
) -> None:
    for name in ("tap0", "tap1"):
        veth(name)
    host.attach(two_interfaces(), "web01")
    send(3, "tap0")
    send(2, "tap1")
    run("ip", "link", "del", "tap1")

    killed_at(reconcile, "destroy", host.sweep)
    assert packets(host) == 5, "of the two that are pinned, or of what is remembered"
    assert host.sweep() == [("web01", "tap1")]
    assert packets(host) == 5
    veth("tap1")
    host.apply(two_interfaces())
    send(1, "tap1")
    assert packets(host) == 6
    run("ip", "link", "del", "tap0")
    run("ip", "link", "del", "tap1")
    host.sweep()
    assert not paths.counts("web01").exists()


def test_catalogue_M14_counts_go_on_when_an_interface_is_made_anew(
    host: Host, veth: Callable[[str], str]
) -> None:
    veth("tap0")
    host.attach(policy(), "web01")
    send(3)
    run("ip", "link", "del", "tap0")
    veth("tap0")
    host.apply(policy())
    send(1)
    assert packets(host) == 4
    host.apply(policy("another"))
    assert packets(host) == 4


@pytest.mark.parametrize(
    "place",
    [
        (change, "keep_counts"),
        (endpoint, "create"),
        (libbpf, "wait_for_programs"),
        (Placing, "finish"),
        (Change, "_keep_matches"),
    ],
    ids=lambda place: place[1],
)
def test_catalogue_M14_a_killed_change_loses_no_count_of_an_interface_made_anew(
    host: Host, veth: Callable[[str], str], paths: Paths, place: tuple[Any, str]
) -> None:
    veth("tap0")
    host.attach(policy(), "web01")
    send(3)
    run("ip", "link", "del", "tap0")
    veth("tap0")

    killed_at(*place, lambda: Host(paths).apply(policy("a")))
    host.apply(policy("a"))
    send(1)
    assert packets(host) == 4
    host.apply(policy("b"))
    assert packets(host) == 4
