# SPDX-License-Identifier: Apache-2.0
"""Expiry of flows of idle VMs: running the programs' own expiry from user space.

Opening flows pays for expiring others, see bpf/expiry.h, so a VM that opens none keeps the memory
of its dead flows, and where flows are logged their end is not in the log. `Expiry` sees to both. It
decides about no flow: the program does, in the kernel, with the same code and claims as in the
packet path.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from vgw import abi, libbpf, loader
from vgw.controller.clock import coarse_now_ns
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.kept_maps import KeptMaps
from vgw.errors import KernelError
from vgw.loader import Artefact

_REAP: Final = "conntrack_reap"
_REPORT: Final = "flow_report"
#: The kernel runs a test only with a frame; the reaper does not look at it.
_FRAME: Final = bytes(64)
#: What stands before the key in the frame of flow_report: KEY_OFFSET there.
_BEFORE_KEY: Final = bytes(16)
_FLOW_BYTES: Final = ctypes.sizeof(abi.Flow)
_BATCH_BYTES: Final = ctypes.sizeof(abi.QueueBatch)
_BUFFER_BYTES: Final = ctypes.sizeof(abi.QueueBuffer)


#: Gives packet programs by name, compiling those that the cache lacks.
Programs = Callable[[Collection[str]], Artefact]


class _Look(NamedTuple):
    """How an endpoint's table was found; while all of it is the same no key has been queued."""

    head: int
    tail: int
    created: int
    epoch: int


class Expiry:
    """Frees the dead flows of endpoints, and has the end of those that stay recorded."""

    def __init__(self, events: Path) -> None:
        """Have the programs write records to the map pinned at `events`."""
        self._events = events
        #: Endpoint -> its last look, and whether all that the queue keeps was recorded then.
        self._looks: dict[int, tuple[_Look, bool]] = {}

    def run(self, programs: Programs, endpoints: Sequence[OpenEndpoint]) -> int:
        """Look once at every flow in the queues; return how many were deleted. Raises KernelError.

        Endpoints whose queue is no longer than what always stays in it are left alone, but for
        the records of what is in it. `programs` is asked only where there is work.
        """
        deleted = 0
        for endpoint in endpoints:
            before = endpoint.maps.meta()
            batches = _due(before)
            if batches > 0:
                with self._program(programs, endpoint, _REAP) as program:
                    libbpf.prog_test_run(program, _FRAME, repeat=batches)
                deleted += max(before.entries - endpoint.maps.meta().entries, 0)
            self._report(programs, endpoint)
        return deleted

    def _report(self, programs: Programs, endpoint: OpenEndpoint) -> None:
        """Have dead flows recorded that the reaper does not come to: the newest in the queue."""
        config = endpoint.maps.config()
        if not config.log_flows:
            self._looks.pop(config.endpoint, None)
            return
        look = _look(endpoint.maps.meta(), config)
        before, was_settled = self._looks.get(config.endpoint, (look, False))
        settled = was_settled and before == look
        # A VM that opens many flows pushes those in the queue on to where expiry finds them.
        if not settled and look.created - before.created <= _most_kept():
            settled = self._report_newest(programs, endpoint, config, look)
        self._looks[config.endpoint] = look, settled

    def _report_newest(
        self,
        programs: Programs,
        endpoint: OpenEndpoint,
        config: abi.EndpointConfig,
        look: _Look,
    ) -> bool:
        """Return whether nothing is left to record until other keys come into the queue."""
        dead: list[bytes] = []
        alive = False
        for key in _newest_keys(endpoint, look):
            value = libbpf.map_lookup(endpoint.fds["conntrack"], key, _FLOW_BYTES)
            flow = None if value is None else abi.Flow.from_buffer_copy(value)
            if flow is None or flow.reported:
                continue
            if is_live(flow, config, coarse_now_ns()):
                alive = True
            else:
                dead.append(key)
        if not dead:
            return not alive
        with self._program(programs, endpoint, _REPORT) as program:
            done = [libbpf.prog_test_run(program, _BEFORE_KEY + key).retval for key in dead]
        return not alive and all(done)

    @contextlib.contextmanager
    def _program(self, programs: Programs, endpoint: OpenEndpoint, name: str) -> Iterator[int]:
        """Load a program over an endpoint's maps for the `with` block."""
        # The work memory is a packet's own: one may come on this CPU while the program runs here.
        reuse = {each: fd for each, fd in endpoint.fds.items() if each != "scratch"}
        artefact = programs((name,))
        with contextlib.ExitStack() as stack:
            # Without that map the records go nowhere, and are counted as lost.
            with contextlib.suppress(KernelError):
                reuse["events"] = libbpf.get_pinned(self._events)
                stack.callback(os.close, reuse["events"])
            instance = stack.enter_context(loader.instantiate(artefact, (name,), reuse=reuse))
            yield instance.programs[name]


def is_live(flow: abi.Flow, config: abi.EndpointConfig, now_ns: int) -> bool:
    """Tell whether packets still find a flow; the programs decide it by the same rule."""
    if flow.state == abi.FlowState.DEAD or flow.epoch != config.flow_epoch:
        return False
    timeout: int = config.timeout_ns[flow.state]
    return now_ns - int(flow.last_seen_ns) <= timeout


def vms_to_look_at(kept: KeptMaps) -> list[str]:
    """Return the VMs of which an endpoint has work for Expiry.run(), in order of their names."""
    with kept.look() as look:
        rows = zip(look.endpoints, look.metas(), look.configs(), strict=True)
        working = (each.vm for each, meta, config in rows if config.log_flows or _due(meta) > 0)
        return list(dict.fromkeys(working))


def _due(meta: abi.ConntrackMeta) -> int:
    """Return how many batches of a queue there are to look at."""
    return int(meta.tail - meta.head) - abi.EXPIRY_MARGIN


def _look(meta: abi.ConntrackMeta, config: abi.EndpointConfig) -> _Look:
    return _Look(meta.head, meta.tail, sum(meta.created), config.flow_epoch)


def _most_kept() -> int:
    """Return how many keys stay in the queue and in the CPUs' buffers."""
    return abi.QUEUE_BATCH * (abi.EXPIRY_MARGIN + libbpf.possible_cpus())


def _newest_keys(endpoint: OpenEndpoint, look: _Look) -> Iterator[bytes]:
    """Yield the keys that stay in the queue and in the CPUs' buffers."""
    for position in range(max(look.head, look.tail - abi.EXPIRY_MARGIN), look.tail):
        place = position.to_bytes(8, sys.byteorder)
        batch = libbpf.map_lookup(endpoint.fds["expiry_queue"], place, _BATCH_BYTES)
        if batch is not None:
            yield from map(bytes, abi.QueueBatch.from_buffer_copy(batch).keys)
    size = _BUFFER_BYTES * libbpf.possible_cpus()
    buffers = libbpf.map_lookup(endpoint.fds["expiry_buffer"], bytes(4), size) or b""
    for start in range(0, len(buffers), _BUFFER_BYTES):
        buffer = abi.QueueBuffer.from_buffer_copy(buffers, start)
        yield from map(bytes, buffer.batch.keys[: min(buffer.count, abi.QUEUE_BATCH)])
