# SPDX-License-Identifier: Apache-2.0
"""The reference evaluator: what a packet gets, written for obviousness instead of speed.

It is a second, independent implementation of what the programs in bpf/ do; tests and `simulate`
hold the two against each other. The order of the steps in `Evaluator.judge` decides which reason a
packet gets when several would fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vgw.abi import Action, FlowState, Mode, Path, Reason, Verdict
from vgw.policy.flows import (
    SECOND_NS,
    Flow,
    FlowKey,
    FlowTable,
    FragmentTable,
    flow_key,
    key_of,
    other,
)
from vgw.policy.guards import EndpointFacts, guard_answer
from vgw.policy.model import (
    DIRECTION_OF_PATH,
    ECHO_REQUEST,
    PORT_PROTOCOLS,
    Address,
    EffectivePolicy,
    EffectiveRule,
    Network,
    Service,
    Tier,
)
from vgw.policy.packet import Packet, parse_frame
from vgw.policy.packet_fields import RST, SYN, Fragment, is_group
from vgw.policy.tracking import (
    is_opening,
    likely_opener,
    may_be_reused,
    open_flow,
    quotes_what_is_sent,
    take_over,
    track,
)

#: How long after a VM's DHCP request a server's answer needs no rule.
DHCP_ANSWER_NS = 60 * SECOND_NS
DEFAULT_CONNTRACK_MAX = 65536

_VERDICT_OF_ACTION = {
    Action.ACCEPT: Verdict.ACCEPT,
    Action.DROP: Verdict.DROP,
    Action.REJECT: Verdict.REJECT,
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a packet gets.

    `rule` is the rule that judged it now, also when that confirmed a flow of an older generation;
    `packet` is what was read of it, None when nothing was.
    """

    verdict: Verdict
    reason: Reason
    rule: EffectiveRule | None = None
    packet: Packet | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """A packet as rules see it: one that opens, or would open, a flow.

    `icmp` is (type, code) of ICMP over IPv4 or ICMPv6 over IPv6. Ports are 0 where there are none.
    """

    path: Path
    local: Address
    remote: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    icmp: tuple[int, int] | None = None

    @property
    def is_ordinary(self) -> bool:
        """Whether `any` and the default speak of this packet."""
        if self.protocol in PORT_PROTOCOLS:
            return True
        return self.icmp is not None and self.icmp[0] == ECHO_REQUEST[self.protocol]


class Evaluator:
    """Judges the packets of one endpoint in the order in which they come."""

    def __init__(self, facts: EndpointFacts, policy: EffectivePolicy | None) -> None:
        self.facts = facts
        self._policy = policy
        self._generation = 1
        self._flows = FlowTable(facts.timeouts_ns)
        self._fragments = FragmentTable()
        #: Until when TCP connections that nobody saw begin are taken over.
        self.grace_until_ns = 0
        #: Path -> second and how many flows were opened in it.
        self._opened = dict.fromkeys(Path, (0, 0))
        #: IP version -> when the VM last asked all DHCP servers.
        self._dhcp_asked_ns: dict[int, int] = {}

    def set_policy(self, policy: EffectivePolicy | None) -> None:
        """Put another policy in force; flows accepted before are judged again when used."""
        self._policy = policy
        self._generation += 1

    def reset(self) -> None:
        """Forget every flow and DHCP request."""
        self._flows.clear()
        self._fragments.clear()
        self._dhcp_asked_ns.clear()

    def judge(  # noqa: PLR0913 (a frame and everything the kernel holds beside it)
        self,
        path: Path,
        frame: bytes,
        *,
        now_ns: int = 0,
        vlan_tag: int | None = None,
        gso: bool = False,
        checksum: tuple[int, int] | None = None,
        conntrack_max: int = DEFAULT_CONNTRACK_MAX,
    ) -> Decision:
        """Return what a frame gets and remember what it means for those that follow.

        `vlan_tag`, `gso` and `checksum` are what the kernel holds beside the bytes, as in
        parse_frame.
        """
        mode = self.facts.mode
        if mode is Mode.QUARANTINE:
            return Decision(Verdict.DROP, Reason.QUARANTINE)
        if self._policy is None:
            decision = Decision(Verdict.DROP, Reason.NO_POLICY)
        else:
            packet = parse_frame(frame, vlan_tag=vlan_tag, gso=gso, checksum=checksum)
            judged = self._judge_packet(packet, path, now_ns, conntrack_max)
            self._settle_fragment(packet, path, judged.verdict, now_ns)
            decision = replace(judged, packet=packet)
        if mode is Mode.MONITOR and decision.verdict is not Verdict.ACCEPT:
            return replace(decision, verdict=Verdict.WOULD_DROP)
        return decision

    def _judge_packet(
        self, packet: Packet, path: Path, now_ns: int, conntrack_max: int
    ) -> Decision:
        if packet.reason is not Reason.NONE:
            return Decision(Verdict.DROP, packet.reason)
        awaited = self._dhcp_awaited(packet, now_ns)
        answer = guard_answer(packet, path, self.facts, dhcp_awaited=awaited)
        if answer is not None:
            if path is Path.FROM_VM and answer.reason is Reason.DHCP:
                self._dhcp_asked_ns[_version(packet)] = now_ns
            return Decision(answer.verdict, answer.reason)
        if packet.quoted is not None:
            return self._judge_error(packet, path, now_ns)
        if packet.fragment is not None and packet.is_later_fragment:
            return self._judge_later_fragment(packet, packet.fragment, path, now_ns)
        if packet.icmp is not None and packet.icmp.echo is None:
            return self._judge_opening(_opening(packet, path))
        return self._judge_flow(packet, path, now_ns, conntrack_max)

    def _dhcp_awaited(self, packet: Packet, now_ns: int) -> bool:
        asked_ns = self._dhcp_asked_ns.get(_version(packet))
        return asked_ns is not None and now_ns - asked_ns <= DHCP_ANSWER_NS

    def _judge_error(self, packet: Packet, path: Path, now_ns: int) -> Decision:
        """Judge an ICMP error: it must speak of an open flow, to the side that sent into it."""
        quoted = packet.quoted
        unrelated = Decision(Verdict.DROP, Reason.ICMP_UNRELATED)
        if quoted is None or packet.destination != quoted.source or is_group(quoted.destination):
            return unrelated
        key = key_of(quoted, other(path), packet.vlan)
        flow = self._flows.live(key, now_ns)
        if flow is None or not quotes_what_is_sent(flow, quoted, path):
            return unrelated
        return self._confirm(key, flow, Reason.CT_RELATED)

    def _judge_later_fragment(
        self, packet: Packet, fragment: Fragment, path: Path, now_ns: int
    ) -> Decision:
        """Judge a fragment without ports: it is of the flow of the first one, or of none."""
        key = self._fragments.flow_of(packet, fragment, path, now_ns)
        flow = None if key is None else self._flows.live(key, now_ns)
        if key is None or flow is None:
            return Decision(Verdict.DROP, Reason.FRAGMENT)
        decision = self._confirm(key, flow, Reason.CT_ESTABLISHED)
        if decision.verdict is Verdict.ACCEPT:
            track(flow, packet, path, now_ns)
        return decision

    def _settle_fragment(self, packet: Packet, path: Path, verdict: Verdict, now_ns: int) -> None:
        """Remember an accepted first fragment; one that is dropped takes the rest along."""
        if packet.fragment is None or packet.is_later_fragment:
            return
        if verdict is Verdict.ACCEPT:
            self._fragments.remember(packet, path, flow_key(packet, path), now_ns)
        else:
            self._fragments.forget(packet, path)

    def _judge_flow(self, packet: Packet, path: Path, now_ns: int, conntrack_max: int) -> Decision:
        key = flow_key(packet, path)
        flow = self._flows.live(key, now_ns)
        if flow is None or may_be_reused(flow, packet):
            return self._judge_new_flow(packet, path, key, now_ns, conntrack_max)
        decision = self._confirm(key, flow, Reason.CT_ESTABLISHED)
        if decision.verdict is Verdict.ACCEPT:
            track(flow, packet, path, now_ns)
        return decision

    def _judge_new_flow(
        self, packet: Packet, path: Path, key: FlowKey, now_ns: int, conntrack_max: int
    ) -> Decision:
        if self._may_take_over(packet, now_ns):
            # The policy is asked about the SYN that nobody saw.
            opener = likely_opener(packet, path)
            flow = take_over(packet, path, opener, self._generation, now_ns)
            decision = self._judge_opening(_opening_of_flow(key, flow))
        else:
            is_late_tcp = packet.tcp is not None and not is_opening(packet.tcp)
            is_echo_reply = packet.icmp is not None and packet.icmp.echo is False
            if is_late_tcp or is_echo_reply:
                return Decision(Verdict.DROP, Reason.NO_STATE)
            flow = open_flow(packet, path, self._generation, now_ns)
            decision = self._judge_opening(_opening(packet, path))
        if decision.verdict is not Verdict.ACCEPT:
            return decision
        limit = self._limit_reached(key, flow, now_ns, conntrack_max)
        if limit is not None:
            return Decision(Verdict.DROP, limit)
        flow.rule = decision.rule
        self._flows.put(key, flow)
        return decision

    def _may_take_over(self, packet: Packet, now_ns: int) -> bool:
        """Tell whether a segment may be of a connection that was open before the attach."""
        is_in_time = now_ns < self.grace_until_ns
        return is_in_time and packet.tcp is not None and not packet.tcp.flags & (SYN | RST)

    def _limit_reached(
        self, key: FlowKey, flow: Flow, now_ns: int, conntrack_max: int
    ) -> Reason | None:
        """Return which limit keeps a new flow out, None when it is within all of them.

        The programs let the oldest half-open flows give way, if these are older than what expiry
        holds back (bpf/expiry.h); a model of few packets never gets there.
        """
        second, opened = now_ns // SECOND_NS, 0
        if self._opened[flow.opener][0] == second:
            opened = self._opened[flow.opener][1]
        self._opened[flow.opener] = second, opened + 1
        if self.facts.new_per_second and opened >= self.facts.new_per_second:
            return Reason.CT_RATE
        half_open = self._flows.half_open(flow.opener, now_ns)
        if flow.half_open and half_open >= self.facts.half_open_max:
            return Reason.CT_HALF_OPEN
        return Reason.CT_FULL if self._flows.is_full(key, conntrack_max, now_ns) else None

    def _confirm(self, key: FlowKey, flow: Flow, reason: Reason) -> Decision:
        """Accept a packet of a live flow with `reason`, if the flow is still accepted.

        One of an older generation is judged as its first packet would be judged now, and dies when
        that is not accepted.
        """
        if flow.generation == self._generation:
            return Decision(Verdict.ACCEPT, reason)
        decision = self._judge_opening(_opening_of_flow(key, flow))
        if decision.verdict is Verdict.ACCEPT:
            flow.generation = self._generation
            flow.rule = decision.rule
            return replace(decision, reason=reason)
        if self.facts.mode is not Mode.MONITOR:
            self._flows.remove(key)
        return decision

    def _judge_opening(self, opening: Opening) -> Decision:
        """Judge by the rules alone."""
        if self._policy is None:
            return Decision(Verdict.DROP, Reason.NO_POLICY)
        direction = DIRECTION_OF_PATH[opening.path]
        rule = _first_match(self._policy.rules(direction), opening)
        if rule is not None:
            return Decision(_VERDICT_OF_ACTION[rule.action], Reason.RULE, rule)
        if not opening.is_ordinary:
            return Decision(Verdict.DROP, Reason.PROTOCOL)
        action = self._policy.defaults.action(direction)
        return Decision(_VERDICT_OF_ACTION[action], Reason.DEFAULT)


def _version(packet: Packet) -> int:
    """Return the IP version of a packet or of what an ARP packet asks, 0 for other protocols."""
    if packet.arp is not None:
        return 4
    return 0 if packet.source is None else packet.source.version


def _first_match(rules: tuple[EffectiveRule, ...], opening: Opening) -> EffectiveRule | None:
    passed: Tier | None = None
    for rule in rules:
        if rule.tier is passed or not _matches(rule, opening):
            continue
        if rule.action is not Action.PASS:
            return rule
        passed = rule.tier
    return None


def _matches(rule: EffectiveRule, opening: Opening) -> bool:
    return (
        _within(opening.remote, rule.peers)
        and _within(opening.local, rule.local)
        and any(_covers(service, opening) for service in rule.services)
        and _source_port_fits(rule, opening)
    )


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _covers(service: Service, opening: Opening) -> bool:
    if service.protocol is None:
        return opening.is_ordinary
    if service.protocol != opening.protocol:
        return False
    if service.ports is not None:
        first, last = service.ports
        return first <= opening.destination_port <= last
    if service.icmp_type is None:
        return True
    if opening.icmp is None or opening.icmp[0] != service.icmp_type:
        return False
    return service.icmp_code in {None, opening.icmp[1]}


def _source_port_fits(rule: EffectiveRule, opening: Opening) -> bool:
    if not rule.source_ports or opening.protocol not in PORT_PROTOCOLS:
        return True
    return any(first <= opening.source_port <= last for first, last in rule.source_ports)


def _opening(packet: Packet, path: Path) -> Opening:
    key = flow_key(packet, path)
    return Opening(
        path=path,
        local=key.local,
        remote=key.remote,
        protocol=key.protocol,
        source_port=packet.source_port,
        destination_port=packet.destination_port,
        icmp=None if packet.icmp is None else (packet.icmp.type, packet.icmp.code),
    )


def _opening_of_flow(key: FlowKey, flow: Flow) -> Opening:
    opening = Opening(flow.opener, key.local, key.remote, key.protocol)
    if flow.state is FlowState.ICMP:
        return replace(opening, icmp=(ECHO_REQUEST[key.protocol], 0))
    ports = key.local_port, key.remote_port
    source_port, destination_port = ports if flow.opener is Path.FROM_VM else ports[::-1]
    return replace(opening, source_port=source_port, destination_port=destination_port)
