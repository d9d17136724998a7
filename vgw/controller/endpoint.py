# SPDX-License-Identifier: Apache-2.0
"""One endpoint in the kernel: its pinned maps and programs, made, opened, changed and removed.

An endpoint is a directory in bpffs. It is made closed: everything is filled and pinned before the
first program is attached, and what fails on the way is undone.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vgw import abi, files, libbpf, loader
from vgw.abi_maps import MAP_SIZES, PRIVATE_MAPS
from vgw.controller import links
from vgw.controller.builds import mark_build
from vgw.controller.links import Attachment, InterfaceFacts, opened
from vgw.controller.replacement import Placing
from vgw.controller.stages import STAGE_MAPS, load_stages
from vgw.errors import ForeignProgramError, KernelError, VerifierError, VgwError
from vgw.loader import Artefact, Instance
from vgw.maps import EndpointMaps, Image
from vgw.maps_counters import PinnedCounters
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import Hook, Interface

#: Maps that every endpoint pins; `events` is the host's. Those of stages are pinned where a
#: program of the endpoint uses them.
PINNED_MAPS: Final = (
    *(name for name in MAP_SIZES if not name.endswith("_inner") and name != "events"),
    *PRIVATE_MAPS,
)
NEEDED_MAPS: Final = tuple(name for name in PINNED_MAPS if name not in STAGE_MAPS)
FROM_VM_PROGRAM: Final = {Hook.XDP: "xdp_from_vm", Hook.TC: "tc_from_vm"}
TO_VM_PROGRAM: Final = "tc_to_vm"
#: A program that uses every table; enough to make one of its maps.
TABLES: Final = (TO_VM_PROGRAM,)


class BrokenEndpointError(VgwError):
    """What is pinned is not a whole endpoint of this version."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What an endpoint is made of.

    `policies` are the maps of its policy, `counters` is how many rules count, `staged`
    whether the policy needs the programs' stages, `build` of which build the programs are.
    `replaces` is the directory of an endpoint on the same interface that has another name,
    `takes_from` that of one of another version, whose places the programs take without its
    tables. `seed` fills the tables, by name, before anything is attached.
    """

    vm: str
    interface: InterfaceFacts
    hook: Hook
    config: abi.EndpointConfig
    policies: Mapping[abi.Path, Image]
    counters: int
    conntrack_max: int
    build: str
    staged: bool = False
    force: bool = False
    prefer_link: bool = True
    replaces: pathlib.Path | None = None
    takes_from: pathlib.Path | None = None
    seed: Callable[[Mapping[str, int]], None] | None = None


@dataclass(frozen=True, slots=True)
class OpenEndpoint:
    """A whole pinned endpoint; `programs` are the ids of what is pinned to run on each path."""

    vm: str
    interface: str
    directory: pathlib.Path
    fds: Mapping[str, int]
    maps: EndpointMaps
    programs: Mapping[abi.Path, int]

    def __enter__(self) -> OpenEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the maps; may be called again."""
        self.maps.close()

    def attachment(self, ifindex: int, path: abi.Path) -> Attachment | None:
        """Return how the endpoint is attached to an interface on one path, None if it is not."""
        return links.read_attachment(ifindex, path, self.directory)


def build_config(
    interface: Interface, mode: abi.Mode, generation: int, endpoint_id: int, flow_epoch: int
) -> abi.EndpointConfig:
    """Return the configuration of an endpoint; raises VgwError when the interface has too much."""
    facts = endpoint_facts(interface, mode)
    config = abi.EndpointConfig(
        endpoint=endpoint_id,
        flow_epoch=flow_epoch,
        generation=generation,
        half_open_max=max(facts.half_open_max, least_half_open_max()),
        new_per_second=facts.new_per_second,
        address_count=len(facts.owned),
        vlan_count=len(facts.vlans),
        mode=mode,
        guards=facts.guards,
        learns=facts.learns,
    )
    for state, timeout in facts.timeouts_ns.items():
        config.timeout_ns[state] = timeout
    for index, vlan in enumerate(facts.vlans):
        config.vlans[index] = vlan
    config.mac = abi.mac_field(facts.mac)
    for index, (network, mac) in enumerate(facts.owned):
        abi.fill_owned(config.addresses[index], network, mac or facts.mac)
    return config


def least_half_open_max() -> int:
    """Return the smallest limit of half-open flows that works.

    Expiry holds some keys back, and each CPU some more: see bpf/expiry.h. Flows that expired could
    fill a smaller limit for good.
    """
    return 2 * abi.QUEUE_BATCH * (abi.EXPIRY_MARGIN + libbpf.possible_cpus())


def new_endpoint_id() -> int:
    """Return an identity that no other endpoint has or had."""
    return secrets.randbits(62) + 1


def reply_mark(endpoint_id: int, hook: Hook) -> int:
    """Return the mark of an endpoint's answers, by which its programs let each other's pass.

    It is 0, none, where the program for packets from the VM is on XDP, which answers do not meet.
    """
    return 0 if hook is Hook.XDP else endpoint_id & 0xFFFFFFFF or 1


def programs_of(hook: Hook) -> dict[abi.Path, str]:
    """Return the programs of an endpoint on a hook, in the order in which they are attached."""
    return {abi.Path.TO_VM: TO_VM_PROGRAM, abi.Path.FROM_VM: FROM_VM_PROGRAM[hook]}


def conntrack_sizes(conntrack_max: int) -> dict[str, int]:
    """Return the sizes of the maps that follow from how many flows an endpoint may have."""
    return {
        "conntrack": conntrack_max,
        "expiry_queue": abi.queue_batches(conntrack_max),
    }


@contextlib.contextmanager
def counters_map(artefact: Artefact, rules: int) -> Iterator[int]:
    """Make a map of rule counters at zero, gone after the block unless another map has it."""
    fd = loader.new_inner(artefact, "rule_counters", rules)
    try:
        yield fd
    finally:
        os.close(fd)


def open_endpoint(vm: str, interface: str, directory: pathlib.Path) -> OpenEndpoint:
    """Open what is pinned in a directory.

    Raises BrokenEndpointError when a map or program is missing, is none of this version's, or is
    not the one that the programs use.
    """
    fds: dict[str, int] = {}
    try:
        infos = _read_programs(directory)
        used = {number for info in infos.values() for number in info.map_ids}
        for name in NEEDED_MAPS:
            fds[name] = libbpf.get_pinned(f"{directory}/{name}")  # many: a Path takes twice as long
        known = {name: libbpf.map_info(fd) for name, fd in fds.items()}
        stray = [name for name in NEEDED_MAPS if known[name].id not in used]
        # By a map that every program uses, and that no two endpoints share.
        strangers = [path for path in infos if known["active"].id not in infos[path].map_ids]
        fds |= _stage_maps(directory, used)
        maps = EndpointMaps(fds, PinnedCounters(directory), known)
        if stray:
            raise VgwError(f"its programs do not use the map pinned as {stray[0]}")
        if maps.has_lost_counters():
            raise VgwError("the map that its rules count in is not pinned")
        if strangers:  # one program is of the endpoint before, as after a kill on the way
            path = strangers[0].name.lower()
            raise VgwError(f"its {path} program does not use the maps pinned beside it")
    except VgwError as error:
        for fd in fds.values():
            os.close(fd)
        raise BrokenEndpointError(
            f"{vm} {interface}: {error}; attach the VM again to repair it"
        ) from error
    programs = {path: info.id for path, info in infos.items()}
    return OpenEndpoint(vm, interface, directory, fds, maps, programs)


def _stage_maps(directory: pathlib.Path, used: Collection[int]) -> dict[str, int]:
    """Open the maps of stages that are pinned and that the programs use."""
    found: dict[str, int] = {}
    for name in STAGE_MAPS:
        with contextlib.suppress(KernelError):
            fd = libbpf.get_pinned(directory / name)
            if libbpf.map_info(fd).id in used:
                found[name] = fd
            else:
                os.close(fd)  # of a hook that the endpoint had before
    return found


def _read_programs(directory: pathlib.Path) -> dict[abi.Path, libbpf.ProgInfo]:
    """Return what the kernel says of the pinned programs."""
    found: dict[abi.Path, libbpf.ProgInfo] = {}
    for path in abi.Path:
        with opened(links.program_pin(directory, path)) as fd:
            found[path] = libbpf.prog_info(fd)
    return found


def create(artefact: Artefact, directory: pathlib.Path, events_fd: int, plan: Blueprint) -> Placing:
    """Make an endpoint and attach it; once this returns no packet passes unfiltered.

    What is pinned in `directory` already is replaced, and filters until the new one does. The
    caller ends the change by finish() or undo() of what is returned. On failure everything is as
    it was, and the error says at which step it was; ForeignProgramError when somebody else's
    program is in the way.
    """
    step = "clearing what was there"
    with contextlib.ExitStack() as undo:
        try:
            placing = Placing(
                directory, plan.interface.ifindex, plan.replaces, takes_from=plan.takes_from
            )
            undo.callback(placing.undo)
            step = "loading the programs"
            names = programs_of(plan.hook)
            instance = _instantiate(artefact, tuple(names.values()), events_fd, plan)
            undo.callback(instance.close)
            step = "writing the policy"
            placing.make_room()
            _fill(artefact, instance, placing.place, events_fd, plan)
            step = "pinning"
            _pin(instance, placing.place, names)
            mark_build(placing.place, plan.build)
            for path, name in names.items():
                step = f"attaching {path.name.lower()}"
                placing.attach(
                    instance.programs[name],
                    path,
                    plan.hook if path is abi.Path.FROM_VM else Hook.TC,
                    force=plan.force,
                    prefer_link=plan.prefer_link,
                )
        except VgwError as error:
            raise _undone(error, plan, step) from error
        except OSError as error:
            raise _undone(files.failure(error), plan, step) from error
        undo.pop_all()
    instance.close()
    return placing


def _undone(error: VgwError, plan: Blueprint, step: str) -> VgwError:
    """Return the error of a failed attach, with the step and what became of the rest."""
    where = f"{plan.vm} {plan.interface.name}"
    return reworded(error, f"attach of {where} failed while {step} and was undone: {error}")


def reworded(error: VgwError, text: str) -> VgwError:
    """Return an error of the same kind that says something else."""
    if isinstance(error, VerifierError):
        return VerifierError(text, error.errno, error.log)
    if isinstance(error, KernelError):
        return KernelError(text, error.errno)
    return ForeignProgramError(text) if isinstance(error, ForeignProgramError) else VgwError(text)


def _instantiate(
    artefact: Artefact, programs: tuple[str, ...], events_fd: int, plan: Blueprint
) -> Instance:
    sizes = conntrack_sizes(plan.conntrack_max)
    return loader.instantiate(artefact, programs, max_entries=sizes, reuse={"events": events_fd})


def _fill(
    artefact: Artefact,
    instance: Instance,
    directory: pathlib.Path,
    events_fd: int,
    plan: Blueprint,
) -> None:
    """Write counters, configuration and policy, and put them in force."""
    maps = EndpointMaps(instance.maps, PinnedCounters(directory))
    with counters_map(artefact, plan.counters) as counters:
        slot = maps.stage(plan.config, plan.policies, counters)
    if plan.staged:
        load_stages(artefact, instance.programs, instance.maps, events_fd)
    maps.switch(slot)
    if plan.seed is not None:
        plan.seed(instance.maps)


def _pin(instance: Instance, directory: pathlib.Path, names: Mapping[abi.Path, str]) -> None:
    for name in PINNED_MAPS:
        if name in instance.maps:
            libbpf.pin(instance.maps[name], directory / name)
    for path, program in names.items():
        libbpf.pin(instance.programs[program], links.program_pin(directory, path))


def move_hook(  # noqa: PLR0913
    artefact: Artefact,
    endpoint: OpenEndpoint,
    events_fd: int,
    ifindex: int,
    hook: Hook,
    *,
    staged: bool = False,
    force: bool = False,
) -> Placing:
    """Attach the from_vm program at another hook with the same maps.

    The caller ends the move by finish(), which removes the old one, or undo() of what is returned;
    until then both judge every packet. `staged`: the policy in force needs the program's stage. On
    failure the old one stays, alone; ForeignProgramError when somebody else's program is in the way
    and not `force`.
    """
    path, name = abi.Path.FROM_VM, FROM_VM_PROGRAM[hook]
    placing = Placing(endpoint.directory, ifindex)
    reuse = {**endpoint.fds, "events": events_fd}
    with loader.instantiate(artefact, (name,), reuse=reuse) as instance:
        try:
            placing.make_room()
            program = instance.programs[name]
            for map_name, fd in instance.maps.items():
                libbpf.pin(fd, placing.place / map_name)
            libbpf.pin(program, links.program_pin(placing.place, path))
            if staged:
                fds = {**endpoint.fds, **instance.maps}
                load_stages(artefact, (name,), fds, events_fd)
            placing.attach(program, path, hook, force=force)
        except BaseException:
            placing.undo()
            raise
    return placing


def restage(
    endpoint: OpenEndpoint, config: abi.EndpointConfig, policies: Mapping[abi.Path, Image]
) -> int:
    """Put another configuration into the spare slot, beside the counters in force.

    `policies` are those in force too. Return the slot.
    """
    with endpoint.maps.counters_in_force() as counters:
        return endpoint.maps.stage(config, policies, counters)


def pending_note(endpoint: OpenEndpoint, interface: Interface) -> str | None:
    """Return what is asked for that an endpoint gets only when it is made anew; None: nothing."""
    if endpoint.maps.conntrack_max() == interface.conntrack_max:
        return None
    return (
        f"conntrack_max {interface.conntrack_max} takes effect when the VM is detached and "
        "attached again"
    )
