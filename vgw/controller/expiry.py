# SPDX-License-Identifier: Apache-2.0
"""Expiry of flows of idle VMs: running the programs' own expiry from user space.

Opening flows pays for expiring others, see bpf/expiry.h, so a VM that opens none keeps the memory
of its dead flows. `expire_idle` gives that memory back. It decides about no flow: the program does,
in the kernel, with the same code and claims as in the packet path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from vgw import abi, libbpf, loader
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.kept_maps import KeptMaps
from vgw.loader import Artefact

_PROGRAM: Final = "conntrack_reap"
#: The kernel runs a test only with a frame; the program does not look at it.
_FRAME: Final = bytes(64)


def expire_idle(
    artefact: Callable[[Collection[str]], Artefact], endpoints: Sequence[OpenEndpoint]
) -> int:
    """Look once at every flow in the queues of endpoints; return how many flows were deleted.

    Endpoints whose queue is no longer than what always stays in it are left alone. `artefact` is
    asked for only when there is work. Raises KernelError.
    """
    deleted = 0
    for endpoint in endpoints:
        before = endpoint.maps.meta()
        batches = _due(before)
        if batches > 0:
            _run(artefact((_PROGRAM,)), endpoint, batches)
            deleted += max(before.entries - endpoint.maps.meta().entries, 0)
    return deleted


def vms_with_dead_flows(kept: KeptMaps) -> list[str]:
    """Return the VMs of which an endpoint has work for `expire_idle`, in order of their names."""
    with kept.endpoints() as endpoints:
        return list(dict.fromkeys(each.vm for each in endpoints if _due(each.maps.meta()) > 0))


def _due(meta: abi.ConntrackMeta) -> int:
    """Return how many batches of a queue there are to look at."""
    return int(meta.tail - meta.head) - abi.EXPIRY_MARGIN


def _run(artefact: Artefact, endpoint: OpenEndpoint, batches: int) -> None:
    # The work memory is a packet's own: one may come on this CPU while the program runs here.
    reuse = {name: fd for name, fd in endpoint.fds.items() if name != "scratch"}
    with loader.instantiate(artefact, (_PROGRAM,), reuse=reuse) as instance:
        libbpf.prog_test_run(instance.programs[_PROGRAM], _FRAME, repeat=batches)
