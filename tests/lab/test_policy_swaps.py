# SPDX-License-Identifier: Apache-2.0
"""Swaps of policies under traffic: each packet is judged by the old policy or by the new one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.controller import conftest as own_host
from tests.controller.observe import traces
from tests.crash.objects import Made, in_use
from tests.lab.swap_policies import POLICIES, VMS, swapped
from tests.lab.swap_run import Run, problems, swap
from tests.lab.swap_traffic import Ends
from tests.lab.topology import eventually
from vgw import abi, libbpf
from vgw.controller import change
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.controller.rule_counts import RuleCounts
from vgw.controller.stages import STAGES
from vgw.maps import EndpointMaps, place_counters
from vgw.maps_images import Image

pytestmark = pytest.mark.lab

#: A host of its own for each test, gone afterwards.
netns, paths, host = own_host.netns, own_host.paths, own_host.host
tap, veth = own_host.tap, own_host.veth

#: Swaps of two VMs each, one on a TAP (XDP) and one on a veth (tc): 1,000 in all.
NARROW, WIDE = 430, 70
FEW = 6  # swaps in a negative control


@pytest.fixture
def ends(
    tap: Callable[[str], int],
    veth: Callable[[str], str],
) -> Mapping[str, Ends]:
    """The host's end and the VM's of the interface of each VM."""
    # What the kernel sends by itself would be counted too.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    (one, on_tap), (other, on_veth) = VMS.items()
    return {
        one: (on_tap.name, tap(on_tap.name)),
        other: (veth(on_veth.name), f"{on_veth.name}-p"),
    }


@pytest.fixture(autouse=True)
def every_packet_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rules that log do so for each packet that they decide."""
    config_of = change.Change._config

    def without_budget(self: change.Change, name: str, generation: int) -> abi.EndpointConfig:
        config = config_of(self, name, generation)
        config.log_per_second = 1 << 31
        return config

    monkeypatch.setattr(change.Change, "_config", without_budget)


@pytest.fixture
def made() -> Iterator[Made]:
    """The maps and programs that the test makes."""
    made = Made()
    with made.recorded():
        yield made
    made.close()


def kept(paths: Paths) -> tuple[list[str], int]:
    """Return pins and files, without what rules have counted, and how many descriptors are open."""
    counts = {str(paths.counts(vm)) for vm in VMS}
    files = [name for name in traces(paths) if name not in counts]
    return files, len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def nothing_left_over(host: Host, made: Made) -> Iterator[None]:
    """Check that a block leaves what was there, and that nothing is left of it after a detach."""
    before, sizes = kept(host.paths), [len(ids) for ids in in_use(host.paths)]
    yield
    assert kept(host.paths) == before
    used = in_use(host.paths)
    assert [len(ids) for ids in used] == sizes
    # The kernel frees what was in a map of maps some time after that.
    eventually("no map and program but those in use", lambda: made.alive() == used)
    host.detach_all()
    eventually("no map and no program", lambda: not any(made.alive()))
    assert traces(host.paths) == []


def swapped_often(
    host: Host, made: Made, ends: Mapping[str, Ends], swaps: int, *, wide: bool = False
) -> list[Run]:
    """Swap two policies under traffic, check what is left of it and return what was seen."""
    documents = [swapped(policy, wide=wide) for policy in POLICIES]
    host.attach_many(documents[0])
    for policy in (1, 0):
        host.apply(documents[policy])
    with nothing_left_over(host, made):
        return swap(host, documents, swaps, ends)


@pytest.mark.parametrize(("swaps", "wide"), [(NARROW, False), (WIDE, True)], ids=["narrow", "wide"])
def test_every_packet_is_judged_by_one_policy(
    host: Host, made: Made, ends: Mapping[str, Ends], *, swaps: int, wide: bool
) -> None:
    runs = swapped_often(host, made, ends, swaps, wide=wide)

    for run in runs:
        assert problems(run) == []
        assert len(run.policy_of) == swaps + 1
    print(f"{swaps} swaps of each VM, packets: {[run.packets() for run in runs]}")  # with -s


# --- negative controls: what is not one change is noticed ----------------------------------------


def active_is(maps: EndpointMaps, slot: int) -> None:
    """Let what writes the spare slot of an endpoint take another one for active."""
    vars(maps)["active_slot"] = lambda: slot


def staged_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the new policy over the one that packets are judged by."""
    stage = EndpointMaps.stage

    def overwrite(self: EndpointMaps, *arguments: Any) -> int:
        active_is(self, 1 - self.active_slot())
        return stage(self, *arguments)

    monkeypatch.setattr(EndpointMaps, "stage", overwrite)


def switched_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the spare slot in force before it is written."""
    stage = EndpointMaps.stage

    def hasty(self: EndpointMaps, *arguments: Any) -> int:
        active = self.active_slot()
        self.switch(1 - active)
        active_is(self, active)
        return stage(self, *arguments)

    monkeypatch.setattr(EndpointMaps, "stage", hasty)


def half_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the policy of one path only."""
    stage = EndpointMaps.stage
    first: dict[abi.Path, Image] = {}

    def half(
        self: EndpointMaps,
        config: abi.EndpointConfig,
        policies: Mapping[abi.Path, Image],
        counters: int,
    ) -> int:
        first.setdefault(abi.Path.FROM_VM, policies[abi.Path.FROM_VM])
        return stage(self, config, {**policies, **first}, counters)

    monkeypatch.setattr(EndpointMaps, "stage", half)


def counters_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not say where the counters of a path begin."""

    def misplace(config: abi.EndpointConfig, rules: Mapping[abi.Path, int]) -> int:
        total = place_counters(config, rules)
        config.first_counter[abi.Path.FROM_VM] = 0
        return total

    monkeypatch.setattr(change, "place_counters", misplace)


def counts_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what the replaced policy has counted."""
    monkeypatch.setattr(RuleCounts, "harvesting", lambda self, *_: self)


@pytest.mark.parametrize(
    ("broken", "noticed"),
    [
        (staged_in_force, {"event"}),
        (switched_too_early, {"reason", "verdict"}),
        (half_a_policy, {"count", "event"}),
        (counters_in_one_place, {"count"}),
        (counts_not_carried, {"count"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_atomic_is_noticed(
    host: Host,
    ends: Mapping[str, Ends],
    monkeypatch: pytest.MonkeyPatch,
    *,
    broken: Callable[[pytest.MonkeyPatch], None],
    noticed: set[str],
) -> None:
    documents = [swapped(policy, wide=False) for policy in POLICIES]
    host.attach_many(documents[0])
    broken(monkeypatch)

    runs = swap(host, documents, FEW, ends)

    for run in runs:
        found = problems(run)
        assert noticed <= {text.partition(":")[0] for text in found}


def test_wide_policies_need_their_stages(host: Host, ends: Mapping[str, Ends]) -> None:
    """Negative control: the lookups of the wide run are such that a program cannot end them."""
    documents = [swapped(policy, wide=True) for policy in POLICIES]
    host.attach_many(documents[0])
    for there in host.endpoints():
        with there:
            for stage in STAGES.values():
                if stage.map_name in there.fds:
                    key = stage.place.to_bytes(4, sys.byteorder)
                    libbpf.map_delete(there.fds[stage.map_name], key)

    for run in swap(host, documents, 0, ends):
        for path, tally in run.tallies.items():
            refused = run.stats[path, abi.Verdict.DROP, abi.Reason.NO_POLICY]
            assert refused == sum(tally.sent.values()) > 0
