# SPDX-License-Identifier: Apache-2.0
"""The loaded programs as an engine: BPF_PROG_TEST_RUN on instances with maps of their own."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Unpack

from tests.cases.table import Send
from tests.engines import Beside, CannotRunError, Outcome
from vgw import abi, libbpf, loader
from vgw.abi import FlowState, Path, Reason, Verdict
from vgw.controller.clock import coarse_now_ns
from vgw.controller.endpoint import reply_mark
from vgw.controller.images import private_images
from vgw.controller.stages import STAGES, load_stages
from vgw.maps import Counter, EndpointMaps, meta_of_emptied, place_counters
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.flows import SECOND_NS
from vgw.policy.guards import EndpointFacts, possible_sources
from vgw.policy.model import EffectivePolicy, Hook, Logging
from vgw.policy.packet_fields import ETHERTYPE_IPV4, ETHERTYPE_IPV6

#: BPF_PROG_TEST_RUN takes no shorter frames, and of linear ones none longer than about a page.
SHORTEST_FRAME, LONGEST_FRAME = 14, 3000
#: EtherType -> the shortest frame that the kernel makes a socket buffer of for a tc program.
SHORTEST_SKB = {ETHERTYPE_IPV4: 14 + 20, ETHERTYPE_IPV6: 14 + 40}
#: ConntrackMeta.dhcp_asked_ns of a VM that never asked.
NO_TIME = 0
#: The generation of an endpoint that has no policy.
NO_POLICY = 0
XDP_CODES = {True: 2, False: 1}
NO_FLOWS = Logging()
TC_CODES = {True: 0xFFFFFFFF, False: 2}
#: struct __sk_buff up to and with gso_size: gso_segs is at byte 164, gso_size at 176.
SKB_SIZE, SKB_GSO_SEGMENTS, SKB_GSO_SIZE = 192, 164, 176


class ProgramEngine:
    """The programs of one endpoint, from_vm on a hook and to_vm on tc, on private maps.

    Each verdict is read back from the counters, as users see them: exactly one counter of `stats`
    must move by one packet, the program's return code must fit it, and the packet stay as it was.
    """

    def __init__(
        self,
        artefact: loader.Artefact,
        hook: Hook,
        facts: EndpointFacts,
        policy: EffectivePolicy | None,
        conntrack_max: int = 1024,
        *,
        reject_per_second: int = 0,
        log: Logging = NO_FLOWS,
        flood_drops: int = 0,
    ) -> None:
        """Load programs; with `reject_per_second` they make packets that they reject answers.

        `flood_drops` is EndpointConfig.flood_drops.
        """
        self._artefact = artefact
        self._hook = hook
        self._facts = facts
        self._policy = policy
        self._generation = NO_POLICY
        self._epoch = 0
        self._reject_per_second = reject_per_second
        self._log = log
        self._flood_drops = flood_drops
        self._images: dict[Path, PolicyImage] = {}
        self._grace_until_ns = 0
        self._from_vm = "xdp_from_vm" if hook is Hook.XDP else "tc_from_vm"
        self._instance = loader.instantiate(
            artefact,
            [self._from_vm, "tc_to_vm"],
            max_entries={
                "conntrack": conntrack_max,
                "expiry_queue": abi.queue_batches(conntrack_max),
            },
        )
        fds = self._instance.maps
        self.maps = EndpointMaps({name: os.dup(fd) for name, fd in fds.items()})
        self.set_policy(policy)
        self._stats = self.maps.stats()

    def judge(self, path: Path, frame: bytes, **beside: Unpack[Beside]) -> Outcome:
        is_xdp = path is Path.FROM_VM and self._hook is Hook.XDP
        gso = beside.get("gso", False)
        obstacle = _obstacle(is_xdp, frame, is_tagged(beside) or (gso and is_xdp))
        if obstacle is not None:
            raise CannotRunError(obstacle)
        context = _gso_context() if gso else b""
        run = libbpf.prog_test_run(self.program(path), frame, ctx_in=context)
        assert run.data_out == frame, "the program changed the packet"
        verdict, reason = self._moved_counter(path)
        passes = verdict in {Verdict.ACCEPT, Verdict.WOULD_DROP}
        expected = XDP_CODES[passes] if is_xdp else TC_CODES[passes]
        assert run.retval == expected, f"{verdict.name} but return code {run.retval}"
        return Outcome(verdict, reason, self._moved_rule())

    def program(self, path: Path) -> int:
        """Return the fd of the program of a path."""
        return self._instance.programs[self._from_vm if path is Path.FROM_VM else "tc_to_vm"]

    def advance(self, seconds: float) -> None:
        """Make the flows and the DHCP request older instead of waiting."""
        nanoseconds = int(seconds * SECOND_NS)
        for key, flow in list(self.maps.flows()):
            # The clock counts from the start of the machine and may be younger than the flow gets.
            # Below zero numbers wrap, which is right as long as the flow's end is not there too.
            oldest = -self._facts.timeouts_ns[FlowState(flow.state)]
            last_seen = max(_signed(flow.last_seen_ns) - nanoseconds, oldest)
            flow.last_seen_ns = last_seen % (1 << 64)
            libbpf.map_update(self.fd("conntrack"), bytes(key), bytes(flow))
        for datagram, first in self._fragments():
            first.seen_ns = (first.seen_ns - nanoseconds) % (1 << 64)
            libbpf.map_update(self.fd("fragments"), datagram, bytes(first))
        if self._grace_until_ns:
            self._grace_until_ns = max(self._grace_until_ns - nanoseconds, 0)
            self._put_in_force()
        meta = self.maps.meta()
        for family, asked in enumerate(meta.dhcp_asked_ns):
            if asked != NO_TIME:
                meta.dhcp_asked_ns[family] = (asked - nanoseconds) % (1 << 64)
        self._put("conntrack_meta", bytes(meta))

    def set_policy(self, policy: EffectivePolicy | None) -> None:
        self._policy = policy
        self._generation += 1
        self._put_in_force()

    def set_facts(self, facts: EndpointFacts) -> None:
        self._facts = facts
        self._put_in_force()

    def reset(self) -> None:
        key_size, flow_size = ctypes.sizeof(abi.FlowKey), ctypes.sizeof(abi.Flow)
        for key, _ in list(libbpf.map_entries(self.fd("conntrack"), key_size, flow_size)):
            libbpf.map_delete(self.fd("conntrack"), key)
        for key, _ in self._fragments():
            libbpf.map_delete(self.fd("fragments"), key)
        size = ctypes.sizeof(abi.QueueBatch)
        for position, _ in list(libbpf.map_entries(self.fd("expiry_queue"), 8, size)):
            libbpf.map_delete(self.fd("expiry_queue"), position)
        self._put("conntrack_meta", bytes(meta_of_emptied(self.maps.meta())))
        self._put("expiry_buffer", bytes(abi.QueueBuffer()) * libbpf.possible_cpus())

    def set_grace(self, seconds: float) -> None:
        until = coarse_now_ns() + int(seconds * SECOND_NS) if seconds else 0
        if until != self._grace_until_ns:
            self._grace_until_ns = until
            self._put_in_force()

    def flush(self) -> None:
        """Begin a new epoch of flows, as `vgw conntrack flush` does."""
        self._epoch += 1
        self._put_in_force()

    def undo_flush(self) -> None:
        """Go back to the epoch before, as a flush that failed half-way does."""
        self._epoch -= 1
        self._put_in_force()

    def is_live(self, flow: abi.Flow) -> bool:
        """Whether a flow of the table is of this epoch and within its timeout."""
        idle = coarse_now_ns() - _signed(flow.last_seen_ns)
        timeout = self._facts.timeouts_ns[FlowState(flow.state)]
        return bool(flow.epoch == self._epoch and idle <= timeout)

    @contextmanager
    def reaper(self) -> Iterator[Callable[[], int]]:
        """Yield a function that runs conntrack_reap once; it returns 1 while there is work."""
        with self.beside("conntrack_reap") as run:
            yield lambda: run(bytes(64))

    @contextmanager
    def beside(self, name: str) -> Iterator[Callable[[bytes], int]]:
        """Yield a function that runs a program over the engine's maps and returns its answer."""
        maps = self._instance.maps
        with loader.instantiate(self._artefact, [name], reuse=maps) as instance:
            program = instance.programs[name]
            yield lambda frame: libbpf.prog_test_run(program, frame).retval

    def load_stages(self) -> None:
        """Put the programs' stages where they look for them."""
        fds = self._instance.maps
        load_stages(self._artefact, self._instance.programs, fds, fds["events"])

    def close(self) -> None:
        self.maps.close()
        self._instance.close()

    def _put_in_force(self) -> None:
        policy = self._policy or EffectivePolicy("none")
        self._images = compile_policy(policy, sources=possible_sources([self._facts]))
        generation = NO_POLICY if self._policy is None else self._generation
        config = _config(self._facts, generation)
        config.flow_epoch = self._epoch
        config.grace_until_ns = self._grace_until_ns
        config.reject_per_second = self._reject_per_second
        config.log_per_second = self._log.per_second
        config.log_flows = self._log.flows
        config.reply_mark = reply_mark(config.endpoint, self._hook)
        config.flood_drops = self._flood_drops
        rules = {path: len(image.rules) for path, image in self._images.items()}
        size = place_counters(config, rules)
        counters = loader.new_inner(self._artefact, "rule_counters", size)
        try:
            policies = private_images(self._artefact, self._images)
            slot = self.maps.stage(config, policies, counters)
        finally:
            os.close(counters)
        if any(image.staged for image in self._images.values()):
            self.load_stages()
        self.maps.switch(slot)
        self._hits: dict[str, int] = {}  # the policy counts in a map of its own

    def _moved_counter(self, path: Path) -> tuple[Verdict, Reason]:
        before, self._stats = self._stats, self.maps.stats()
        none = Counter(0, 0)
        moved = {
            labels: counter.packets - before.get(labels, none).packets
            for labels, counter in self._stats.items()
            if counter != before.get(labels, none)
        }
        assert list(moved.values()) == [1], f"counters moved: {moved}"
        ((counted_path, verdict, reason),) = moved
        assert counted_path is path
        return verdict, reason

    def _moved_rule(self) -> str | None:
        before, self._hits = self._hits, self._rule_hits()
        moved = [rule for rule, hits in self._hits.items() if hits != before.get(rule, 0)]
        assert len(moved) <= 1, f"rule counters moved: {moved}"
        return next(iter(moved), None)

    def _rule_hits(self) -> dict[str, int]:
        return {
            self._images[path].rules[number].key: count.packets
            for path, number, count in self.maps.rule_counts()
        }

    def fd(self, name: str) -> int:
        return self._instance.maps[name]

    def stages(self) -> list[tuple[int, bytes]]:
        """Return map and key of every place for a stage."""
        return [
            (self.fd(stage.map_name), stage.place.to_bytes(4, sys.byteorder))
            for stage in (STAGES[name] for name in self._instance.programs)
        ]

    def _fragments(self) -> list[tuple[bytes, abi.Fragment]]:
        """Return what is remembered of first fragments, by key."""
        sizes = ctypes.sizeof(abi.FragmentKey), ctypes.sizeof(abi.Fragment)
        return [
            (key, abi.Fragment.from_buffer_copy(value))
            for key, value in libbpf.map_entries(self.fd("fragments"), *sizes)
        ]

    def _put(self, name: str, value: bytes) -> None:
        libbpf.map_update(self.fd(name), bytes(4), value)


def why_not_run(hook: Hook, send: Send) -> str | None:
    """Return why a test run cannot be given a packet, None if it can."""
    is_xdp = hook is Hook.XDP and send.path is Path.FROM_VM
    return _obstacle(is_xdp, send.frame, not send.for_test_run or (send.gso and is_xdp))


def is_tagged(beside: Beside) -> bool:
    """Tell whether there is something beside a frame that no test run can be given."""
    return beside.get("vlan_tag") is not None or beside.get("checksum") is not None


def _obstacle(is_xdp: bool, frame: bytes, beside: bool) -> str | None:
    ethertype = int.from_bytes(frame[12:14], "big")
    shortest = SHORTEST_FRAME if is_xdp else SHORTEST_SKB.get(ethertype, SHORTEST_FRAME)
    if not shortest <= len(frame) <= LONGEST_FRAME:
        return "a test run takes no frame of this length"
    if beside:
        return "a test run has no such metadata"
    return None


def _signed(value: int) -> int:
    """Return a u64 as the number it was before it wrapped below zero."""
    return value - (1 << 64) if value >> 63 else value


def _config(facts: EndpointFacts, generation: int) -> abi.EndpointConfig:
    """Return the configuration that says the same as `facts`."""
    config = abi.EndpointConfig(
        endpoint=1,
        generation=generation,
        half_open_max=facts.half_open_max,
        new_per_second=facts.new_per_second,
        address_count=len(facts.owned),
        vlan_count=len(facts.vlans),
        mode=facts.mode,
        guards=facts.guards,
        learns=facts.learns,
    )
    for index, vlan in enumerate(facts.vlans):
        config.vlans[index] = vlan
    config.mac = abi.mac_field(facts.mac)
    for state, timeout in facts.timeouts_ns.items():
        config.timeout_ns[state] = timeout
    for entry, (network, mac) in zip(config.addresses, facts.owned, strict=False):
        abi.fill_owned(entry, network, mac or facts.mac)
    return config


def _gso_context() -> bytes:
    """Return a __sk_buff that says its packet is a super-packet of the kernel."""
    context = bytearray(SKB_SIZE)
    struct.pack_into("=I", context, SKB_GSO_SEGMENTS, 1)
    struct.pack_into("=I", context, SKB_GSO_SIZE, 1448)
    return bytes(context)
