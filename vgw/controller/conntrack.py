# SPDX-License-Identifier: Apache-2.0
"""The connections of a VM as rows: who talks with whom, since when, and by which rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from vgw import abi
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.expiry import is_live
from vgw.controller.policy_store import RuleLabel, RuleNames
from vgw.controller.reconcile import Host
from vgw.policy.model import DIRECTION_OF_PATH, ICMP_PROTOCOLS, PORT_PROTOCOLS, Direction

_PROTOCOL_NAMES: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}

Row = dict[str, Any]
_LabelsOf = Callable[[int, abi.Path], Sequence[RuleLabel] | None]


def list_flows(host: Host, vm: str) -> Row:
    """Return the live flows of a VM as JSON: {"vm", "flows": [...]}. Raises VgwError.

    A flow's `direction` is that of its first packet; `age` is seconds since then, `expires_in`
    seconds until it is forgotten unless a packet comes. Ports are null where there are none.
    """
    labels_of = host.manifest(vm).in_generation(RuleNames(host.store).labels)
    flows: list[Row] = []
    for endpoint in host.open_endpoints(vm):
        with endpoint:
            flows += _rows(endpoint, labels_of)
    return {"schema": "vgw/v1", "vm": vm, "flows": flows}


def _rows(endpoint: OpenEndpoint, labels_of: _LabelsOf) -> Iterator[Row]:
    config = endpoint.maps.config()
    for key, flow in endpoint.maps.flows():
        now = coarse_now_ns()
        if is_live(flow, config, now):
            yield _row(endpoint.interface, key, flow, config, now) | _rule(flow, labels_of)


def _row(
    interface: str, key: abi.FlowKey, flow: abi.Flow, config: abi.EndpointConfig, now_ns: int
) -> Row:
    idle = max(0, now_ns - flow.last_seen_ns)
    has_ports = key.protocol in PORT_PROTOCOLS
    return {
        "interface": interface,
        "direction": str(DIRECTION_OF_PATH[abi.Path(flow.opener)]),
        "proto": _PROTOCOL_NAMES.get(key.protocol, key.protocol),
        "state": abi.FlowState(flow.state).name.lower(),
        "local": str(abi.unpack_address(key.local)),
        "remote": str(abi.unpack_address(key.remote)),
        "local_port": abi.be16(key.local_port) if has_ports else None,
        "remote_port": abi.be16(key.remote_port) if has_ports else None,
        "icmp_id": abi.be16(key.local_port) if key.protocol in ICMP_PROTOCOLS else None,
        "vlan": key.vlan or None,
        "packets": _both_ways(flow.packets),
        "bytes": _both_ways(flow.bytes),
        "age": round(max(0, now_ns - flow.created_ns) / SECOND_NS, 3),
        "expires_in": round(max(0, config.timeout_ns[flow.state] - idle) / SECOND_NS, 3),
        "generation": flow.generation,
    }


def _both_ways(by_path: Any) -> dict[str, int]:
    return {str(direction): by_path[path] for path, direction in _DIRECTIONS}


_DIRECTIONS: Final[tuple[tuple[abi.Path, Direction], ...]] = tuple(DIRECTION_OF_PATH.items())


def _rule(flow: abi.Flow, labels_of: _LabelsOf) -> Row:
    """Return the names of the rule that let a flow in.

    Null when the default did, or when the policy that did is no longer known.
    """
    labels = None
    if flow.rule != abi.NO_RULE:
        labels = labels_of(flow.generation, abi.Path(flow.opener))
    if labels is None or flow.rule >= len(labels):
        return {"tier": None, "policy": None, "rule": None}
    label = labels[flow.rule]
    return {"tier": label.tier, "policy": label.policy, "rule": label.name}
