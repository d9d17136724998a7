# SPDX-License-Identifier: Apache-2.0
"""The connection table of an endpoint, read and filled as a whole.

Reading takes no part in what packets do. Filling is done by a program of the packet path's own
sources (bpf/conntrack_import.c), for a flow has its place in the expiry queue and the counters too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from vgw import abi, libbpf, loader
from vgw.controller.columns import Columns, dtype_of, read_hash
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.layouts import own_layout
from vgw.loader import Artefact

_PROGRAM: Final = "conntrack_import"
#: IMPORT_HEADER and IMPORT_RECORDS of bpf/conntrack_import.c.
_HEADER: Final = bytes(16)
_AT_ONCE: Final = 16

KEY: Final = dtype_of(own_layout(), "flow_key")
FLOW: Final = dtype_of(own_layout(), "flow")
#: A flow as conntrack_import takes it.
RECORD: Final = np.dtype([("key", KEY), ("flow", FLOW)])


@dataclass(frozen=True, slots=True)
class Filled:
    """How many flows came into a table, and what became of the others.

    `kept`: the flow that was there stays as it was. `full`: there was no room.
    """

    added: int = 0
    replaced: int = 0
    kept: int = 0
    full: int = 0

    def __add__(self, other: Filled) -> Filled:
        sums = (getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        return Filled(*sums)


def read_flows(endpoint: OpenEndpoint) -> Columns:
    """Return all flows of an endpoint's table, dead ones included, as RECORDs. Raises KernelError.

    One that stays in the table is among them, one that comes or goes meanwhile may be.
    """
    return records_of(*read_hash(endpoint.fds["conntrack"], KEY, FLOW))


def records_of(keys: Columns, flows: Columns) -> Columns:
    """Return keys and flows side by side."""
    records = np.zeros(len(keys), RECORD)
    records["key"], records["flow"] = keys, flows
    return records


def are_live(flows: Columns, config: abi.EndpointConfig, now_ns: int) -> Any:
    """Tell which flows packets still find; conntrack.is_live() for many."""
    timeouts = np.array(config.timeout_ns, np.int64)
    idle = now_ns - flows["last_seen_ns"].astype(np.int64)
    states = flows["state"] & 0xF
    in_force = (flows["state"] != abi.FlowState.DEAD) & (flows["epoch"] == config.flow_epoch)
    return in_force & (idle <= timeouts[states])


def put_flows(
    artefact: Callable[[Collection[str]], Artefact], fds: Mapping[str, int], records: Columns
) -> Filled:
    """Put flows into the table of an endpoint, whose maps `fds` are; return what became of them.

    Packets may go on meanwhile. Times are those of this host's clock, `claim` says which flows
    replace live ones. Raises KernelError.
    """
    if not len(records):
        return Filled()
    # The work memory is a packet's own: one may come on this CPU while the program runs here.
    reuse = {name: fd for name, fd in fds.items() if name != "scratch"}
    filled = Filled()
    with loader.instantiate(artefact((_PROGRAM,)), (_PROGRAM,), reuse=reuse) as instance:
        program = instance.programs[_PROGRAM]
        for start in range(0, len(records), _AT_ONCE):
            frame = _HEADER + records[start : start + _AT_ONCE].tobytes()
            counts = libbpf.prog_test_run(program, frame).retval
            filled += Filled(*counts.to_bytes(4, "little"))
    return filled


def keys_of(records: Columns) -> list[bytes]:
    """Return the keys of records as bytes."""
    data, size = np.ascontiguousarray(records["key"]).tobytes(), KEY.itemsize
    return [data[start : start + size] for start in range(0, len(data), size)]
