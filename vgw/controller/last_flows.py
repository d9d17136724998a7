# SPDX-License-Identifier: Apache-2.0
"""Records of the flows that end because their endpoint goes: they are read out of its table.

The programs record the end of every other flow. What an endpoint may leave in a second bounds these
records too; the rest is counted as suppressed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Final

from vgw import abi
from vgw.controller.clock import coarse_now_ns
from vgw.controller.endpoint import BrokenEndpointError, OpenEndpoint, open_endpoint
from vgw.controller.event_reader import EventLosses
from vgw.controller.events import LogWriter, RuleName, event_record
from vgw.controller.expiry import is_live
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.paths import Paths
from vgw.controller.policy_store import PolicyStore, RuleNames
from vgw.errors import VgwError

_CLOSED: Final = (abi.FlowState.TCP_FIN, abi.FlowState.TCP_CLOSED)

_logger = logging.getLogger(__name__)


class LastFlows:
    """Logs what is in the tables of endpoints that go; for use from several threads."""

    def __init__(self, paths: Paths, log: LogWriter, losses: EventLosses) -> None:
        """Write to `log`, count in `losses` what is over an endpoint's budget."""
        self._paths = paths
        self._log = log
        self._losses = losses

    @contextlib.contextmanager
    def of(self, vm: str, interface: str) -> Iterator[None]:
        """Log the flows of an endpoint that the `with` block removes, if its flows are logged.

        When the block raises and the endpoint is still there nothing is logged; when it removed
        so much that nobody can read the table any more, this is the last time to log it. A table
        that cannot be read stops no removal.
        """
        try:
            endpoint = open_endpoint(vm, interface, self._paths.endpoint_dir(vm, interface))
        except VgwError:
            yield  # nothing is pinned there, or a part of an endpoint
            return
        manifest = load_manifest(self._paths.manifest(vm))
        names = _Names(endpoint, manifest, RuleNames(PolicyStore(self._paths.policies)))
        with endpoint:
            try:
                yield
            except BaseException:
                if not self._is_whole(endpoint):
                    self._log_table(endpoint, names)
                raise
            self._log_table(endpoint, names)

    @staticmethod
    def _is_whole(endpoint: OpenEndpoint) -> bool:
        """Tell whether an endpoint can still be opened, and the next removal finds its flows."""
        try:
            with open_endpoint(endpoint.vm, endpoint.interface, endpoint.directory):
                return True
        except BrokenEndpointError:
            return False
        except MemoryError:  # nothing is known of it, and no flow is to end twice
            return True

    def _log_table(self, endpoint: OpenEndpoint, names: _Names) -> None:
        """Log the flows of an endpoint that is gone; its maps live as long as they are open."""
        try:
            self._log_flows(endpoint, names)
        except VgwError as error:
            _logger.error(
                "%s %s: cannot log its last flows: %s", endpoint.vm, endpoint.interface, error
            )

    def _log_flows(self, endpoint: OpenEndpoint, names: _Names) -> None:
        config = endpoint.maps.config()
        if not config.log_flows:
            return
        now_ns = time.monotonic_ns()
        clock_offset_ns = time.time_ns() - now_ns
        suppressed = logged = 0
        for key, flow in endpoint.maps.flows():
            if flow.reported:
                continue
            if logged >= config.log_per_second:
                suppressed += 1
                continue
            logged += 1
            event = _event(config, key, flow, now_ns)
            self._log.add(event_record(event, names, clock_offset_ns))
        self._losses.add("suppressed", suppressed)


def recorded(
    last_flows: LastFlows | None, vm: str, interface: str
) -> contextlib.AbstractContextManager[None]:
    """Return LastFlows.of() for an endpoint, or what does nothing where there is no log."""
    return contextlib.nullcontext() if last_flows is None else last_flows.of(vm, interface)


class _Names:
    """What the numbers in the records of one endpoint stand for; its manifest may be gone."""

    def __init__(self, endpoint: OpenEndpoint, manifest: Manifest | None, rules: RuleNames) -> None:
        self._endpoint = endpoint
        known = manifest or Manifest(endpoint.vm)
        self._labels_of = known.in_generation(rules.labels)
        for generation, path in ((each, path) for each in known.policies for path in abi.Path):
            self._labels_of(generation, path)  # read now: their files go with the last endpoint

    def endpoint(self, _endpoint: int) -> tuple[str, str]:
        return self._endpoint.vm, self._endpoint.interface

    def rule(self, _endpoint: int, generation: int, path: abi.Path, rule: int) -> RuleName | None:
        labels = self._labels_of(generation, path)
        if labels is None or rule >= len(labels):
            return None
        return RuleName(labels[rule].policy, labels[rule].tier, labels[rule].name)


def _event(
    config: abi.EndpointConfig, key: abi.FlowKey, flow: abi.Flow, now_ns: int
) -> abi.FlowEvent:
    """Return the event of a flow's end, as fill_flow_event() of bpf/flow_events.h makes it."""
    ends = (key.local, key.local_port), (key.remote, key.remote_port)
    (source, sport), (destination, dport) = (
        ends if flow.opener == abi.Path.FROM_VM else reversed(ends)
    )
    made = abi.FlowEvent(created_ns=flow.created_ns, last_seen_ns=flow.last_seen_ns)
    made.event = abi.Event(
        time_ns=now_ns,
        endpoint=config.endpoint,
        generation=flow.generation,
        rule=flow.rule,
        abi=abi.ABI_VERSION,
        source=source,
        destination=destination,
        source_port=sport,
        destination_port=dport,
        vlan=key.vlan,
        path=flow.opener,
        rule_path=flow.opener,
        reason=abi.Reason.DEFAULT if flow.rule == abi.NO_RULE else abi.Reason.RULE,
        protocol=key.protocol,
        kind=abi.EventKind.FLOW_END,
        end=_end(config, flow),
        state=flow.state,
    )
    made.packets[:] = flow.packets[:]
    made.bytes[:] = flow.bytes[:]
    return made


def _end(config: abi.EndpointConfig, flow: abi.Flow) -> abi.FlowEnd:
    """Return why a flow is over: that of end_of_flow() there, unless it was still alive."""
    if flow.state == abi.FlowState.DEAD:
        return abi.FlowEnd.REVOKED
    if flow.epoch != config.flow_epoch:
        return abi.FlowEnd.FLUSHED
    if flow.state in _CLOSED:
        return abi.FlowEnd.CLOSED
    alive = is_live(flow, config, coarse_now_ns())
    return abi.FlowEnd.DETACHED if alive else abi.FlowEnd.TIMEOUT
