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
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vgw import abi, libbpf, loader
from vgw.controller import endpoint as endpoints
from vgw.controller import fitness, links
from vgw.controller.desired import Order, desired_interfaces
from vgw.controller.manifest import Manifest, RuleEntry, load_manifest
from vgw.controller.policy_store import load_policy
from vgw.controller.reconcile import Host
from vgw.errors import KernelError, VgwError
from vgw.maps import EndpointMaps
from vgw.policy.compile import compile_policy
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
_SHARED_MAPS: Final = ("active", "configs", "policies")

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
    """Whose packets are simulated: what the interface is and what decides about it."""

    vm: str
    interface: Interface
    mode: abi.Mode
    hook: Hook
    rules: Mapping[int, RuleEntry]
    effective: EffectivePolicy | None


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
    with links.opened(links.program_pin(directory, abi.Path.FROM_VM)) as program:
        is_xdp = libbpf.prog_info(program).prog_type == libbpf.ProgType.XDP
    subject = _Subject(
        vm=vm,
        interface=manifest.endpoints[name].interface,
        mode=abi.Mode(config.mode),
        hook=Hook.XDP if is_xdp else Hook.TC,
        rules={rule.id: rule for rule in manifest.rules.values()},
        effective=load_policy(host.paths.policy_record(vm), config.generation),
    )
    return subject, {key: endpoint.fds[key] for key in _SHARED_MAPS}


def _planned_subject(
    host: Host, vm: str, interface: str | None, document: PolicyDocument
) -> _Subject:
    """Return what a VM would be under a document."""
    known = document.vms.get(vm)
    listed = known is not None and known.interfaces
    order = Order(() if interface is None or listed else (interface,))
    wanted, _ = desired_interfaces(host.paths, document, vm, order)
    name = _choose(vm, interface, wanted)
    effective = effective_policy(document, vm)
    manifest = Manifest(vm).with_rules((*effective.ingress, *effective.egress))
    old = load_manifest(host.paths.manifest(vm))
    mode = abi.Mode.ENFORCE if known is None else known.mode
    if old is not None and old.mode_override is not None:
        mode = old.mode_override
    hook = wanted[name].hook
    return _Subject(
        vm=vm,
        interface=wanted[name],
        mode=mode,
        hook=Hook.XDP if hook is Hook.AUTO else hook,
        rules={rule.id: rule for rule in manifest.rules.values()},
        effective=effective,
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
        artefact = host.artefact(self._names.values())
        self._instance = loader.instantiate(
            artefact,
            tuple(self._names.values()),
            max_entries=endpoints.conntrack_sizes(subject.interface.conntrack_max),
            reuse=shared,
        )
        self._maps = EndpointMaps(self._instance.maps)
        self._open = contextlib.ExitStack()
        self._open.callback(self._instance.close)
        try:
            self._fill(artefact, fresh=not shared)
        except BaseException:
            self._open.close()
            raise
        self._model = (
            None if subject.effective is None else Evaluator(self.facts, subject.effective)
        )
        self._started = time.monotonic_ns()

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
        ):
            entries = libbpf.map_entries(fds[name], ctypes.sizeof(kind), ctypes.sizeof(size))
            for key in [key for key, _ in entries]:
                libbpf.map_delete(fds[name], key)
        libbpf.map_update(fds["conntrack_meta"], bytes(4), bytes(abi.ConntrackMeta()))
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

    def _fill(self, artefact: loader.Artefact, *, fresh: bool) -> None:
        """Write the counters, and the policy too unless it is the live endpoint's."""
        rules = max(self._subject.rules, default=0) + 1
        counters = loader.new_inner(artefact, "rule_counters", endpoints.rule_capacity(rules))
        self._open.callback(os.close, counters)
        self._maps.set_rule_counters(counters)
        self._counters = counters
        if not fresh or self._subject.effective is None:
            return
        ids = {
            f"{rule.direction}/{rule.tier}/{rule.policy}/{rule.name}": rule_id
            for rule_id, rule in self._subject.rules.items()
        }
        image = compile_policy(self._subject.effective, ids)
        config = endpoints.build_config(self._subject.interface, self._subject.mode, 1, 0, 0)
        with endpoints.policy_map(artefact, image) as policy:
            self._maps.switch(self._maps.stage(config, policy))

    def _run(self, path: abi.Path, frame: bytes) -> Row:
        hook = self._subject.hook if path is abi.Path.FROM_VM else Hook.TC
        before, rules_before = self._maps.stats(), self._rule_packets()
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
        hits = [
            rule_id
            for rule_id, packets in enumerate(self._rule_packets())
            if packets != rules_before[rule_id]
        ]
        rule = self._subject.rules.get(hits[0]) if hits else None
        return _program_row(hook, (verdict, reason), rule)

    def _rule_packets(self) -> list[int]:
        size = ctypes.sizeof(abi.RuleCounter)
        values = b"".join(value for _, value in libbpf.map_entries(self._counters, 4, size))
        table = (abi.RuleCounter * (len(values) // size)).from_buffer_copy(values)
        return [counter.packets for counter in table]


def _program_row(
    hook: Hook, answer: tuple[abi.Verdict, abi.Reason] | None, rule: RuleEntry | None
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
