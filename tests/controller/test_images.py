# SPDX-License-Identifier: Apache-2.0
"""Compiled policies in the kernel, and their rules on disk: shared, adopted and cleaned up."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.killed import killed_at
from tests.controller.observe import received, row, send_to_vm, traces
from tests.controller.policies import VM_ADDRESS, document, interface, to_vm
from vgw import abi, libbpf
from vgw.abi import Mode
from vgw.controller import images, links
from vgw.controller.diff import plan
from vgw.controller.endpoint import TABLES
from vgw.controller.images import pinned_images
from vgw.controller.links import opened
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.pins import ASIDE, beside, entries, remove_tree
from vgw.controller.policy_store import PolicyStore
from vgw.controller.reconcile import Host
from vgw.controller.simulate import simulate
from vgw.errors import VgwError
from vgw.maps import EndpointMaps
from vgw.policy import compile as compiler
from vgw.policy.model import Direction, Hook, PolicyDocument
from vgw.policy.resolve import effective_policy

pytestmark = pytest.mark.bpf

HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
HTTPS = "[{name: https, action: accept, services: [tcp/443]}]"
SSH = "[{name: ssh, action: accept, services: [tcp/22]}]"
Tap = Callable[[str], int]
LINK_LOCAL = "fe80::5054:ff:fe00:11"
#: Addresses of an interface with a MAC and of one without: any link-local address is its own.
OF_BOTH = {VM_ADDRESS, LINK_LOCAL, "10.9.9.9", "fe80::"}


def test_what_is_pinned_is_looked_up_again_when_it_was_made_again(host: Host, tap: Tap) -> None:
    tap("tap0")
    host.attach_many(document(HTTP, vms=vms(1)))
    manifest = load_manifest(host.paths.manifest("vm0"))
    current = None if manifest is None else manifest.current()
    assert current is not None
    (endpoint,) = host.endpoints()
    with endpoint:
        one = images.Images(host.paths.images)
        assert one.are_in_force(current.images, endpoint.maps)
        assert images.Images(host.paths.images).are_in_force(current.images, endpoint.maps)
        compiled = compiler.compile_policy(effective_policy(document(HTTP, vms=vms(1)), "vm0"))
        assert {path: image.digest for path, image in compiled.items()} == current.images
        for digest in current.images.values():
            remove_tree(host.paths.images / digest)
        one.ready(host.artefact(TABLES), compiled)
        # Others have its pins now, so it is not what packets are judged by.
        assert not one.are_in_force(current.images, endpoint.maps)


def vms(count: int) -> dict[str, str]:
    """Return VMs without addresses, which a policy means the same for."""
    return {f"vm{number}": f"{{interfaces: [{{name: tap{number}}}]}}" for number in range(count)}


def policy_ids(host: Host) -> dict[str, dict[abi.Path, int | None]]:
    """Return the ids of the policies in force, by VM."""
    found: dict[str, dict[abi.Path, int | None]] = {}
    for endpoint in host.endpoints():
        with endpoint:
            found[endpoint.vm] = endpoint.maps.policy_ids(endpoint.maps.active_slot())
    return found


def pins(paths: Paths) -> set[str]:
    return {pin.name for pin in entries(paths.images)}


def refers_to(host: Host, vm: str = "web01") -> set[str]:
    """Return the images of a VM's generation in force."""
    manifest = load_manifest(host.paths.manifest(vm))
    assert manifest is not None
    entry = manifest.current()
    assert entry is not None
    return set(entry.images.values())


# --- one map for all ------------------------------------------------------------------------


def test_equal_policies_are_one_map(host: Host, paths: Paths, tap: Tap) -> None:
    for number in range(4):
        tap(f"tap{number}")
    another = """  - name: more
    tier: vm
    applies_to: {vms: [vm3]}
    ingress: [{name: ssh, action: accept, services: [tcp/22]}]"""

    host.attach_many(document(HTTP, vms=vms(4), extra=another))

    ids = policy_ids(host)
    assert ids["vm0"] == ids["vm1"] == ids["vm2"]
    assert ids["vm3"][abi.Path.FROM_VM] == ids["vm0"][abi.Path.FROM_VM]
    assert ids["vm3"][abi.Path.TO_VM] != ids["vm0"][abi.Path.TO_VM]
    assert len(pins(paths)) == 3
    assert len({first for each in ids.values() for first in each.values()}) == 3


def test_an_image_is_made_once_however_many_ask_at_the_same_time(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        tap(f"tap{number}")
    host.attach_many(document(HTTP, vms=vms(12)))
    written: list[bytes] = []
    monkeypatch.setattr(images, "write_chunk", lambda _, data: written.append(data))

    host.apply(document(HTTPS, vms=vms(12)))

    assert len(written) == 1  # egress has not changed


def test_a_later_vm_finds_what_is_pinned(paths: Paths, tap: Tap) -> None:
    for number in range(2):
        tap(f"tap{number}")
    policy = document(HTTP, vms=vms(2))
    Host(paths).attach(policy, "vm0")

    Host(paths).attach(policy, "vm1")

    ids = policy_ids(Host(paths))
    assert ids["vm0"] == ids["vm1"]


# --- what goes when nobody uses it ------------------------------------------------------------


def test_what_no_vm_uses_goes(host: Host, paths: Paths, tap: Tap) -> None:
    for number in range(2):
        tap(f"tap{number}")
    host.attach_many(document(HTTP, vms=vms(2)))
    first = refers_to(host, "vm0")
    assert pins(paths) == first

    host.apply(document(HTTPS, vms=vms(2)), ["vm0"])
    second = refers_to(host, "vm0")
    assert pins(paths) == first | second
    host.detach("vm1")
    assert pins(paths) == second
    assert PolicyStore(paths.policies).digests() == first | second  # names of the policy before
    host.apply(document(SSH, vms=vms(1)))
    third = refers_to(host, "vm0")
    assert pins(paths) == third
    assert PolicyStore(paths.policies).digests() == second | third
    host.detach("vm0")

    assert traces(paths) == []
    assert list(paths.state_dir.rglob("*.json")) == []


@pytest.mark.parametrize("place", ["pin", "stage", "switch"])
def test_what_a_killed_change_left_goes_with_the_next(
    host: Host, paths: Paths, tap: Tap, place: str
) -> None:
    for number in range(2):
        tap(f"tap{number}")
    host.attach_many(document(HTTP, vms=vms(2)))
    before = policy_ids(host)
    owner: object = libbpf if place == "pin" else EndpointMaps

    killed_at(owner, place, lambda: Host(paths).apply(document(HTTPS, vms=vms(2)), ["vm0"]))
    orphans = pins(paths) - refers_to(host, "vm1")
    # What is not whole has not got its name yet.
    assert [name.startswith(ASIDE) for name in orphans] == [place == "pin"]
    assert policy_ids(host) == before
    host.apply(document(HTTP, vms=vms(2)))

    assert policy_ids(host) == before
    assert pins(paths) == refers_to(host, "vm1")
    host.detach_all()
    assert traces(paths) == []


def test_an_image_in_a_spare_slot_is_in_use(host: Host, paths: Paths, tap: Tap) -> None:
    """Negative control of what is an orphan: another VM's change leaves it."""
    for number in range(2):
        tap(f"tap{number}")
    host.attach_many(document(HTTP, vms=vms(2)))
    policy = document(HTTPS, vms=vms(2))
    killed_at(EndpointMaps, "switch", lambda: Host(paths).apply(policy, ["vm0"]))
    there = pins(paths)
    assert len(there) == 3

    host.set_mode("vm1", Mode.MONITOR)
    host.apply(document(SSH, vms=vms(2)), ["vm1"])
    assert there <= pins(paths)


def test_a_failed_attach_leaves_no_image(
    host: Host, paths: Paths, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap("tap0")

    def refuse(*_: Any, **__: Any) -> int:
        raise VgwError("refused")

    monkeypatch.setattr(links, "attach", refuse)
    with pytest.raises(VgwError, match="undone: refused"):
        host.attach(document(HTTP), "web01")
    assert traces(paths) == []


# --- pins that are not what they should be ----------------------------------------------------


def other_data(pin: Path) -> int:
    """Return a map like that of a chunk, which holds nothing."""
    with links.opened(pin) as there:
        info = libbpf.map_info(there)
    return libbpf.map_create(
        info.map_type, "x", info.key_size, info.value_size, info.max_entries, info.flags
    )


def other_kind(_: Path) -> int:
    return libbpf.map_create(libbpf.MapType.HASH, "x", 4, ctypes.sizeof(abi.ImageChunk), 1)


def no_map(pin: Path) -> int:
    return libbpf.get_pinned(pin.parents[2] / "web01" / "tap0" / "prog_to_vm")


def put_instead(image: Path, make: Callable[[Path], int]) -> None:
    pin = image / "0"
    fd = make(pin)
    pin.unlink()
    libbpf.pin(fd, pin)
    os.close(fd)


def with_one_more(image: Path) -> None:
    """Pin the first chunk a second time, behind the last."""
    with links.opened(image / "0") as fd:
        libbpf.pin(fd, image / str(len(entries(image))))


def with_a_hole(image: Path) -> None:
    (image / "0").rename(image / "7")


def a_single_pin(image: Path) -> None:
    fd = libbpf.get_pinned(image / "0")
    remove_tree(image)
    libbpf.pin(fd, image)
    os.close(fd)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "other data": lambda image: put_instead(image, other_data),
    "another kind of map": lambda image: put_instead(image, other_kind),
    "no map": lambda image: put_instead(image, no_map),
    "one more": with_one_more,
    "a hole": with_a_hole,
    "empty": lambda image: (image / "0").unlink(),
    "no directory": a_single_pin,
    "gone": remove_tree,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_pin_that_is_not_the_image_is_replaced(
    host: Host, paths: Paths, tap: Tap, damage: Callable[[Path], None]
) -> None:
    vm = tap("tap0")
    tap("tap1")
    both = {"web01": "{interfaces: [{name: tap0}]}", "vm1": "{interfaces: [{name: tap1}]}"}
    host.attach(document(HTTP, vms=both), "web01")
    for digest in pins(paths):
        damage(paths.images / digest)

    host.attach(document(HTTP, vms=both), "vm1")

    ids = policy_ids(host)
    assert set(ids["vm1"].values()) == set(pinned_images(paths))
    assert not set(ids["web01"].values()) & set(ids["vm1"].values())
    assert pins(paths) == refers_to(host)
    send_to_vm("tap0", to_vm())
    assert received(vm, to_vm())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_its_pins_a_policy_stays_as_it_is_until_applied(
    host: Host, paths: Paths, tap: Tap, damage: Callable[[Path], None]
) -> None:
    """What is in force cannot be opened any more, so it is not put beside another mode.

    Who orders one is told so, and nothing is left of the order: it does not come into force with
    whatever is applied next.
    """
    vm = tap("tap0")
    policy = document(HTTP, vms={"web01": "{interfaces: [{name: tap0}]}"})
    host.attach(policy, "web01")
    before, there = policy_ids(host), pins(paths)
    remembered = load_manifest(paths.manifest("web01"))
    for digest in there:
        damage(paths.images / digest)

    with pytest.raises(VgwError, match="not pinned: apply the policy of the VM"):
        host.set_mode("web01", Mode.QUARANTINE)
    assert policy_ids(host) == before
    assert load_manifest(paths.manifest("web01")) == remembered
    host.apply(policy)

    assert row(host)["attached"]
    assert host.status("web01")["vms"][0]["mode"] == "enforce"
    assert pins(paths) == there
    assert set(policy_ids(host)["web01"].values()) == set(pinned_images(paths))
    send_to_vm("tap0", to_vm())
    assert received(vm, to_vm())
    assert host.set_mode("web01", Mode.QUARANTINE)
    send_to_vm("tap0", to_vm())
    assert not received(vm, to_vm())
    assert host.set_mode("web01", Mode.ENFORCE)
    send_to_vm("tap0", to_vm())
    assert received(vm, to_vm())


def test_a_pin_that_is_the_image_is_not_replaced(host: Host, paths: Paths, tap: Tap) -> None:
    """Negative control of the damages above."""
    for number in range(2):
        tap(f"tap{number}")
    host.attach(document(HTTP, vms=vms(2)), "vm0")
    before = pinned_images(paths)
    host.attach(document(HTTP, vms=vms(2)), "vm1")
    assert pinned_images(paths) == before


# --- rules that match nothing -----------------------------------------------------------------


@pytest.fixture
def leaving_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler leave out rules named `never`, as it does those that match nothing."""
    original = compiler.compile_policy

    def compile_policy(effective: Any, **options: Any) -> Any:
        kept = tuple(rule for rule in effective.ingress if rule.name != "never")
        return original(dataclasses.replace(effective, ingress=kept), **options)

    for module in ("policy.compile", "controller.change", "controller.diff", "controller.simulate"):
        monkeypatch.setattr(f"vgw.{module}.compile_policy", compile_policy)


def with_a_rule_that_never_matches() -> PolicyDocument:
    return document(
        """[{name: never, action: drop, services: [tcp/1]},
            {name: http, action: accept, services: [tcp/80]}]"""
    )


@pytest.mark.usefixtures("leaving_out")
def test_rules_left_out_have_no_number(host: Host, tap: Tap) -> None:
    tap("tap0")
    policy = with_a_rule_that_never_matches()
    host.attach(policy, "web01")
    send_to_vm("tap0", to_vm())

    (rule,) = host.rules("web01")["rules"]
    assert (rule["rule"], rule["packets"]) == ("http", 1)
    assert row(host)["rules"] == {"ingress": 1, "egress": 0}
    for planned in (None, policy):
        (found,) = simulate(host, "web01", Direction.INGRESS, [to_vm()], document=planned)
        assert (found["rule"], found["model_rule"]) == ("http", "http")
    (change,) = plan(host, policy)["vms"]
    assert (change["changed"], change["added"], change["removed"]) == (False, [], [])


# --- what the compiler is told ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("vm", "known"),
    [
        (interface("tap0"), {VM_ADDRESS, LINK_LOCAL}),
        (interface("tap0", ", guards: {address: false}"), None),
        ("{interfaces: [{name: tap0}]}", None),
        (interface("tap0")[:-2] + ", {name: tap9, addresses: [10.9.9.9]}]}", OF_BOTH),
        (interface("tap0")[:-2] + ", {name: tap9}]}", None),
    ],
    ids=["guarded", "guard off", "no addresses", "two interfaces", "one unguarded"],
)
def test_the_compiler_knows_which_sources_there_can_be(
    host: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch, vm: str, known: set[str] | None
) -> None:
    tap("tap0")
    told: list[Any] = []
    original = compiler.compile_policy

    def compile_policy(effective: Any, *, sources: Any, **options: Any) -> Any:
        told.append(sources)
        return original(effective, sources=sources, **options)

    monkeypatch.setattr("vgw.controller.change.compile_policy", compile_policy)
    host.attach_many(document(HTTP, vms={"web01": vm}))

    (sources,) = told
    texts = None if sources is None else {str(network).partition("/")[0] for network in sources}
    assert texts == known


def test_a_policy_of_a_lost_manifest_keeps_its_stage_at_another_hook(
    host: Host, paths: Paths, tap: Tap
) -> None:
    """A process dies before the switch, so the program there judges by the large policy, too."""
    tap("tap0")
    many = ", ".join(
        f"{{name: r{n}, action: drop, to: [10.{n >> 8}.{n & 255}.0/24]}}" for n in range(2100)
    )
    rules = f"  - {{name: out, tier: vm, applies_to: {{all: true}}, egress: [{many}]}}"
    host.attach(document(extra=rules), "web01", hook=Hook.TC)
    paths.manifest("web01").unlink()

    killed_at(EndpointMaps, "switch", lambda: host.attach(document(), "web01", hook=Hook.XDP))

    (endpoint,) = host.endpoints()
    with endpoint, opened(beside(endpoint.directory) / "xdp_stages") as stages:
        assert libbpf.map_lookup(stages, bytes(4), 4) is not None
