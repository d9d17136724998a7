# SPDX-License-Identifier: Apache-2.0
"""What would happen to a packet: asked of the loaded programs on scratch state, and of the model.

The programs run by BPF_PROG_TEST_RUN. Configuration and policy are those of the live endpoint (or,
with a document, what it would get); flows, counters and events are scratch maps, so that nothing
live is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vgw import abi, libbpf, loader
from vgw.controller import endpoint as endpoints
from vgw.controller import fitness, links
from vgw.controller.clock import coarse_now_ns
from vgw.controller.desired import Order, desired_interfaces, sources_of
from vgw.controller.images import private_images
from vgw.controller.interfaces import choose_hook
from vgw.controller.manifest import load_manifest
from vgw.controller.policy_store import RuleLabel, labels_of_rules
from vgw.controller.reconcile import Host
from vgw.controller.recovery import policy_of
from vgw.controller.stages import load_stages, with_stages
from vgw.errors import KernelError, VgwError
from vgw.maps import EndpointMaps, meta_of_emptied, place_counters
from vgw.maps_images import IMAGE_MAPS
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.evaluate import Decision, Evaluator
from vgw.policy.frame import FieldError, build_frame
from vgw.policy.guards import EndpointFacts, endpoint_facts
from vgw.policy.model import (
    PATH_OF_DIRECTION,
    Direction,
    EffectivePolicy,
    Hook,
    Interface,
    PolicyDocument,
)
from vgw.policy.resolve import effective_policy

#: Maps that say how packets are judged: a simulation reads those of the live endpoint.
_SHARED_MAPS: Final = ("active", "configs", *IMAGE_MAPS)

#: MAC addresses of a described packet where the policy does not say them.
_UNKNOWN_MAC: Final = bytes.fromhex("020000000001")
_PEER_MAC: Final = bytes.fromhex("020000000002")

#: What the programs return when they let a packet pass.
_PASSES: Final = {Hook.XDP: 2, Hook.TC: 0xFFFFFFFF}

#: Longest frame that a test run gives to an XDP program in one piece: a page less 256 bytes of
#: headroom and struct skb_shared_info. Of a longer one the program sees only the beginning, which
#: is not what happens to a packet of an interface.
_LONGEST_XDP_FRAME: Final = 4096 - 256 - 320

Row = dict[str, Any]


class PacketError(VgwError):
    """A packet cannot be simulated: `index` counts from 0, `problem` says why."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"packet {index}: {problem}")
        self.index = index
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _Subject:
    """Whose packets are simulated: what the interface is and what decides about it.

    `labels` are what the numbers of rules stand for, as far as that is known; `images` None: those
    of the live endpoint are used.
    """

    vm: str
    interface: Interface
    mode: abi.Mode
    hook: Hook
    labels: Mapping[abi.Path, Sequence[RuleLabel]]
    effective: EffectivePolicy | None
    staged: bool
    images: Mapping[abi.Path, PolicyImage] | None = None


def simulate(  # noqa: PLR0913 - one parameter for each thing a user may choose
    host: Host,
    vm: str,
    direction: Direction,
    packets: Iterable[Mapping[str, Any] | bytes],
    *,
    hook: Hook | None = None,
    stateful: bool = False,
    interface: str | None = None,
    document: PolicyDocument | None = None,
) -> Iterator[Row]:
    """Yield what each packet would get, from the program and from the model.

    Packets are frames or descriptions as policy/frame.py builds them; a description may have a
    `direction` of its own. Each is judged on fresh state unless `stateful`. Without a document the
    VM has to be attached. `hook` chooses the program for packets from the VM, `interface` the
    endpoint of a VM that has several. `model` is null when the policy in force is not remembered,
    `verdict` when the kernel cannot run a frame of that size; `error` says so then.
    Raises VgwError, PacketError if a packet is at fault.
    """
    fitness.require_capabilities()
    with contextlib.ExitStack() as stack:
        if document is None:
            subject, shared = _live_subject(host, vm, interface, stack)
        else:
            subject, shared = _planned_subject(host, vm, interface, document), {}
        if hook is not None and hook is not Hook.AUTO:
            subject = dataclasses.replace(subject, hook=hook)
        bench = stack.enter_context(_Bench(host, subject, shared))
        for index, packet in enumerate(packets):
            if not stateful:
                bench.forget()
            try:
                path, frame = _frame(packet, direction, bench.facts)
            except FieldError as error:
                raise PacketError(index, str(error)) from error
            yield {"index": index, **bench.judge(path, frame)}


def _live_subject(
    host: Host, vm: str, interface: str | None, stack: contextlib.ExitStack
) -> tuple[_Subject, dict[str, int]]:
    """Return an attached VM's endpoint, and the maps of it that the simulation reads."""
    manifest = host.manifest(vm)
    name = _choose(vm, interface, manifest.endpoints)
    directory = host.paths.endpoint_dir(vm, name)
    endpoint = stack.enter_context(endpoints.open_endpoint(vm, name, directory))
    config = endpoint.maps.config()
    labels_of = manifest.in_generation(host.store.labels)
    policy = manifest.policies.get(config.generation)
    with links.opened(links.program_pin(directory, abi.Path.FROM_VM)) as program:
        is_xdp = libbpf.prog_info(program).prog_type == libbpf.ProgType.XDP
    subject = _Subject(
        vm=vm,
        interface=manifest.endpoints[name].interface,
        mode=abi.Mode(config.mode),
        hook=Hook.XDP if is_xdp else Hook.TC,
        labels={path: labels_of(config.generation, path) or () for path in abi.Path},
        effective=policy_of(manifest, config.generation, host.store),
        staged=policy is not None and policy.staged,
    )
    return subject, {key: endpoint.fds[key] for key in _SHARED_MAPS}


def _planned_subject(
    host: Host, vm: str, interface: str | None, document: PolicyDocument
) -> _Subject:
    """Return what a VM would be under a document."""
    document = host.overlay.laid(document)
    known = document.vms.get(vm)
    listed = known is not None and known.interfaces
    order = Order(() if interface is None or listed else (interface,))
    wanted, _ = desired_interfaces(host.paths, document, vm, order)
    name = _choose(vm, interface, wanted)
    effective = effective_policy(document, vm)
    images = compile_policy(effective, sources=sources_of(wanted.values()))
    old = load_manifest(host.paths.manifest(vm))
    mode = abi.Mode.ENFORCE if known is None else known.mode
    if old is not None and old.mode_override is not None:
        mode = old.mode_override
    before = None if old is None else old.endpoints.get(name)
    ordered = None if before is None else before.hook_override
    return _Subject(
        vm=vm,
        interface=wanted[name],
        mode=mode,
        hook=choose_hook(ordered or wanted[name].hook),
        labels={path: labels_of_rules(image.rules) for path, image in images.items()},
        effective=effective,
        staged=any(image.staged for image in images.values()),
        images=images,
    )


def _choose(vm: str, interface: str | None, there: Mapping[str, object]) -> str:
    names = sorted(there)
    if interface is None and len(names) == 1:
        return names[0]
    if interface in there:
        return str(interface)
    if not names:
        raise VgwError(f"VM {vm} has no interfaces; name one by --interface")
    if interface is None:
        raise VgwError(f"VM {vm} has the interfaces {', '.join(names)}: say which by --interface")
    raise VgwError(
        f"VM {vm} has no interface {interface}: name {' or '.join(names)} by --interface"
    )


def _frame(
    packet: Mapping[str, Any] | bytes, direction: Direction, facts: EndpointFacts
) -> tuple[abi.Path, bytes]:
    """Return the path and the bytes of a packet."""
    if isinstance(packet, bytes):
        return PATH_OF_DIRECTION[direction], packet
    description = dict(packet)
    text = description.pop("direction", direction)
    if text not in tuple(Direction):
        raise FieldError("direction", f"{text!r} is neither ingress nor egress")
    path = PATH_OF_DIRECTION[Direction(text)]
    own = facts.mac or _UNKNOWN_MAC
    source, destination = (own, _PEER_MAC) if path is abi.Path.FROM_VM else (_PEER_MAC, own)
    return path, build_frame(description, source_mac=source, destination_mac=destination)


class _Bench:
    """The programs of an endpoint on scratch state, and the model beside them."""

    def __init__(self, host: Host, subject: _Subject, shared: Mapping[str, int]) -> None:
        self.facts = endpoint_facts(subject.interface, subject.mode)
        self._subject = subject
        self._names = endpoints.programs_of(subject.hook)
        programs = self._names.values()
        artefact = host.artefact(with_stages(programs) if subject.staged else programs)
        self._instance = loader.instantiate(
            artefact,
            tuple(self._names.values()),
            max_entries=endpoints.conntrack_sizes(subject.interface.conntrack_max),
            reuse=shared,
        )
        self._open = contextlib.ExitStack()
        self._open.callback(self._instance.close)
        fds = {**self._instance.maps, **shared}
        self._maps = EndpointMaps({name: os.dup(fd) for name, fd in fds.items()})
        self._open.callback(self._maps.close)
        try:
            self._fill(artefact)
            if subject.staged:
                load_stages(artefact, self._instance.programs, fds, fds["events"])
        except BaseException:
            self._open.close()
            raise
        self._model = (
            None if subject.effective is None else Evaluator(self.facts, subject.effective)
        )
        self._started = time.monotonic_ns()
        if self._model is not None:
            grace_until_ns = self._maps.config().grace_until_ns
            self._model.grace_until_ns = max(grace_until_ns - coarse_now_ns(), 0)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def forget(self) -> None:
        """Empty the state: flows, their queue, and what is remembered of DHCP."""
        fds = self._instance.maps
        for name, kind, size in (
            ("conntrack", abi.FlowKey, abi.Flow),
            ("expiry_queue", ctypes.c_uint64, abi.QueueBatch),
            ("fragments", abi.FragmentKey, abi.Fragment),
        ):
            entries = libbpf.map_entries(fds[name], ctypes.sizeof(kind), ctypes.sizeof(size))
            for key in [key for key, _ in entries]:
                libbpf.map_delete(fds[name], key)
        meta = meta_of_emptied(self._maps.meta())
        libbpf.map_update(fds["conntrack_meta"], bytes(4), bytes(meta))
        buffers = ctypes.sizeof(abi.QueueBuffer) * libbpf.possible_cpus()
        libbpf.map_update(fds["expiry_buffer"], bytes(4), bytes(buffers))
        if self._model is not None:
            self._model.reset()

    def judge(self, path: abi.Path, frame: bytes) -> Row:
        """Return what the program and the model say of a frame."""
        row = self._run(path, frame)
        decision = None
        if self._model is not None:
            decision = self._model.judge(
                path,
                frame,
                now_ns=time.monotonic_ns() - self._started,
                conntrack_max=self._subject.interface.conntrack_max,
            )
        return row | _model_row(decision)

    def _fill(self, artefact: loader.Artefact) -> None:
        """Write the counters, and the policy too unless it is the live endpoint's."""
        images = self._subject.images
        config = (
            self._maps.config()
            if images is None
            else endpoints.build_config(self._subject.interface, self._subject.mode, 1, 0, 0)
        )
        if images is not None:
            place_counters(config, {path: len(image.rules) for path, image in images.items()})
        self._first_counter = {path: config.first_counter[path] for path in abi.Path}
        rules = sum(len(labels) for labels in self._subject.labels.values())
        self._counters = loader.new_inner(artefact, "rule_counters", max(rules, 1))
        self._open.callback(os.close, self._counters)
        if images is not None:
            self._put_in_force(artefact, config, images)
            return
        for slot in range(abi.CONFIG_SLOTS):
            key, value = (number.to_bytes(4, sys.byteorder) for number in (slot, self._counters))
            libbpf.map_update(self._instance.maps["rule_counters"], key, value)

    def _put_in_force(
        self,
        artefact: loader.Artefact,
        config: abi.EndpointConfig,
        images: Mapping[abi.Path, PolicyImage],
    ) -> None:
        policies = private_images(artefact, images)
        self._maps.switch(self._maps.stage(config, policies, self._counters))

    def _run(self, path: abi.Path, frame: bytes) -> Row:
        hook = self._subject.hook if path is abi.Path.FROM_VM else Hook.TC
        before, rules_before = self._maps.stats(), self._rule_counters()
        program = self._instance.programs[self._names[path]]
        try:
            if hook is Hook.XDP and len(frame) > _LONGEST_XDP_FRAME:
                raise KernelError("it would be in pieces", errno.EINVAL)
            run = libbpf.prog_test_run(program, frame)
        except KernelError as error:
            text = f"the kernel cannot test-run programs on a frame of {len(frame)} bytes: {error}"
            return _program_row(hook, None, None) | {"error": text}
        moved = [
            label
            for label, counter in self._maps.stats().items()
            if label not in before or counter.packets != before[label].packets
        ]
        if len(moved) != 1:
            raise VgwError(f"the program counted a packet {len(moved)} times; please report this")
        _, verdict, reason = moved[0]
        passes = verdict in (abi.Verdict.ACCEPT, abi.Verdict.WOULD_DROP)
        if passes != (run.retval == _PASSES[hook]):
            raise VgwError(
                f"the program counted {verdict.name} and returned {run.retval}; please report this"
            )
        return _program_row(hook, (verdict, reason), self._label_of_moved(rules_before))

    def _label_of_moved(self, before: bytes) -> RuleLabel | None:
        """Return the rule whose counter is not what it was, if its name is known."""
        now, size = self._rule_counters(), ctypes.sizeof(abi.RuleCounter)
        moved = (index for index in range(0, len(now), size) if _differ(now, before, index, size))
        index = next(moved, None)
        if index is None:
            return None
        number = index // size
        first = self._first_counter[abi.Path.FROM_VM]
        path = abi.Path.FROM_VM if number >= first else abi.Path.TO_VM
        labels = self._subject.labels[path]
        number -= self._first_counter[path]
        return labels[number] if number < len(labels) else None

    def _rule_counters(self) -> bytes:
        return libbpf.array_values(self._counters, ctypes.sizeof(abi.RuleCounter))


def _differ(one: bytes, other: bytes, start: int, size: int) -> bool:
    return one[start : start + size] != other[start : start + size]


def _program_row(
    hook: Hook, answer: tuple[abi.Verdict, abi.Reason] | None, rule: RuleLabel | None
) -> Row:
    verdict, reason = (None, None) if answer is None else answer
    return {
        "verdict": None if verdict is None else verdict.name.lower(),
        "reason": None if reason is None else reason.name,
        "policy": None if rule is None else rule.policy,
        "tier": None if rule is None else rule.tier,
        "rule": None if rule is None else rule.name,
        "hook": str(hook),
    }


def _model_row(decision: Decision | None) -> Row:
    if decision is None:
        return {"model": None, "model_reason": None, "model_rule": None}
    rule = decision.rule
    return {
        "model": decision.verdict.name.lower(),
        "model_reason": decision.reason.name,
        "model_rule": None if rule is None else rule.name,
    }
