# SPDX-License-Identifier: Apache-2.0
"""Live connections among others that are opened and closed while dead flows are removed.

Dead flows go by two ways at once: each new flow pays for some, and user space runs the reaper.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final

from bench.accounts import read_account
from bench.flood import Flood, Flooder, Side, close, exchange, handshake, outcome
from bench.limits import Limits
from vgw import abi
from vgw.abi import FlowState, Path
from vgw.controller.clock import coarse_now_ns
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

#: Closed connections have to go fast enough for as many new ones as a machine can open.
LIMITS: Final = Limits(timeouts={"tcp_fin": 1}, half_open_max=131072)
#: Of the client's and of the VM's side: what tells the live connections from the others.
_LIVE_PORT, _OTHER_PORT = 443, 80
_OTHERS_OFFSET: Final = 1 << 20  # addresses


@dataclass(frozen=True, slots=True)
class Ends:
    """The two sides of all connections, the client's being the first of its addresses."""

    to_vm: str
    from_vm: str
    client: Side
    vm: Side


@dataclass(slots=True)
class Race:
    """What a race came to; `exchanges` is how often each live connection sent a segment each way.

    `cut` says of each live connection that is not as it was left what is wrong.
    """

    live: int
    rounds: int
    opened: int
    exchanges: int
    reaped: int
    seconds: float
    cut: list[str] = field(default_factory=list)


def run_race(  # noqa: PLR0913, PLR0917 - what there is to choose
    flooder: Flooder, host: Host, vm: str, ends: Ends, live: int, connections: int, limit: float
) -> Race:
    """Open `live` connections, and exchange by them while `connections` others come and go.

    The VM is attached under LIMITS and accepts everything. Raises VgwError when the others are not
    through in `limit` seconds.
    """
    vm_side, client = replace(ends.vm, port=_LIVE_PORT), ends.client
    targets = ends.to_vm, ends.from_vm
    flooder.run(Flood(handshake(*targets, client, vm_side), live, 60, distinct=live))
    born_before = _next_tick_ns()
    before = read_account(host, vm)
    others = replace(ends.vm, port=_OTHER_PORT)
    strangers = replace(client, address=str(ip_address(client.address) + _OTHERS_OFFSET))
    steps = (
        *handshake(*targets, strangers, others),
        *close(*targets, strangers, others),
    )
    exchanges = reaped = 0
    flood = Flood(steps, connections, limit, distinct=1 << 20)
    with flooder.running(flood) as process:
        while exchanges == 0 or process.poll() is None:
            flooder.run(Flood(exchange(*targets, client, vm_side), live, 60, distinct=live))
            exchanges += 1
            reaped += host.expire(vm)
        sent = outcome(process)
    if sent.rounds < connections:
        raise VgwError(f"{sent.rounds} of {connections} connections in {limit} s")
    opened = read_account(host, vm).opened(before)
    race = Race(live, sent.rounds, opened, exchanges, reaped, sent.seconds)
    race.cut = list(_cut(host, vm, race, born_before))
    return race


def _next_tick_ns() -> int:
    """Return a time of the programs' clock that no packet before has and every later one reaches.

    It is read in coarser steps than the programs see it, so the next step is waited for.
    """
    now = coarse_now_ns()
    while (later := coarse_now_ns()) == now:
        time.sleep(0.001)
    return later


def _cut(host: Host, vm: str, race: Race, born_before: int) -> Iterator[str]:
    """Yield what is wrong with the live connections: missing, made anew, packets not counted."""
    (endpoint,) = host.open_endpoints(vm)
    # The handshake has two segments to the VM and one from it.
    wanted = {Path.TO_VM: 2 + race.exchanges, Path.FROM_VM: 1 + race.exchanges}
    with endpoint:
        found = [(key, flow) for key, flow in endpoint.maps.flows() if _is_live_one(key)]
    if len(found) != race.live:
        yield f"{race.live - len(found)} are missing"
    for key, flow in found:
        packets = {path: flow.packets[path] for path in Path}
        if flow.state != FlowState.TCP_ESTABLISHED or packets != wanted:
            where = f"port {abi.be16(key.remote_port)}"
            yield f"{where}: state {flow.state}, packets {packets} and not {wanted}"
        elif flow.created_ns >= born_before:
            yield f"port {abi.be16(key.remote_port)}: made anew"


def _is_live_one(key: abi.FlowKey) -> bool:
    return abi.be16(key.local_port) == _LIVE_PORT
