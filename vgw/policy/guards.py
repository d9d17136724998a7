# SPDX-License-Identifier: Apache-2.0
"""The guards: who a VM may claim to be, and the housekeeping traffic they answer without rules.

`endpoint_facts` is the one derivation of what the guards know about an interface; the endpoint's
configuration in the kernel is filled from it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from typing import NamedTuple

from vgw.abi import (
    MAX_ADDRESSES,
    MAX_VLANS,
    FlowState,
    Guard,
    Mode,
    Path,
    Reason,
    Verdict,
    pack_mac,
)
from vgw.errors import VgwError
from vgw.policy.flows import DEFAULT_TIMEOUTS_NS
from vgw.policy.model import UDP, Address, Interface, Network
from vgw.policy.packet_fields import (
    ARP_REQUEST,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    ETHERTYPE_RARP,
    LIMITED_BROADCAST,
    NEIGHBOUR_ADVERTISEMENT,
    NEIGHBOUR_SOLICITATION,
    ROUTER_ADVERTISEMENT,
    Arp,
    Membership,
    Neighbour,
    Packet,
    is_group,
)

LINK_LOCAL = IPv6Network("fe80::/10")
UNSPECIFIED_IPV4 = IPv4Address("0.0.0.0")  # noqa: S104 (an address in a packet, not a listener)
UNSPECIFIED_IPV6 = IPv6Address("::")
ALL_DHCPV6_SERVERS = IPv6Address("ff02::1:2")
DHCPV4_CLIENT, DHCPV4_SERVER = 68, 67
DHCPV6_CLIENT, DHCPV6_SERVER = 546, 547
BOOTP_REQUEST, BOOTP_ETHERNET = 1, 1
IP_ETHERTYPES = frozenset({ETHERTYPE_IPV4, ETHERTYPE_IPV6})


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """What the guards and the flow table know about an endpoint.

    `owned` holds (network, MAC) of every address the VM may use; no MAC there means the
    interface's own. `guards` are those in force. `learns`: some of its addresses are not known yet,
    those that it is just being leased. Timeouts are nanoseconds. The limits of flows are
    for each side that opens them.
    """

    mac: bytes | None
    owned: tuple[tuple[Network, bytes | None], ...]
    vlans: tuple[int, ...]
    guards: Guard
    learns: bool
    mode: Mode
    timeouts_ns: Mapping[FlowState, int]
    half_open_max: int
    new_per_second: int

    def owns(self, address: Address, ethernet_source: bytes) -> bool:
        """Tell whether the VM may use `address` in a frame from `ethernet_source`."""
        is_own_mac = self.mac is None or self.mac == ethernet_source
        return any(
            address.version == network.version
            and address in network
            and (is_own_mac if mac is None else mac == ethernet_source)
            for network, mac in self.owned
        )

    def has_mac(self, mac: bytes) -> bool:
        """Tell whether `mac` is the interface's or that of one of its allowed pairs."""
        return mac == self.mac or any(mac == pair_mac for _, pair_mac in self.owned)


class Answer(NamedTuple):
    """What a guard decided."""

    verdict: Verdict
    reason: Reason


def link_local_address(mac: bytes) -> IPv6Address:
    """Return the link-local address that a host derives from its MAC (EUI-64)."""
    identifier = bytes([mac[0] ^ 0x02, *mac[1:3], 0xFF, 0xFE, *mac[3:6]])
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def missing_guards(interface: Interface) -> dict[str, str]:
    """Return guard -> why it is off, for the guards that are asked for but lack their facts."""
    lacking: dict[str, str] = {}
    if interface.mac is None:
        lacking["mac"] = "the interface has no `mac`"
    if not (interface.addresses or interface.allowed_pairs or interface.learns):
        lacking |= dict.fromkeys(("address", "arp", "nd"), "the interface has no `addresses`")
    return {name: why for name, why in lacking.items() if getattr(interface.guards, name)}


def endpoint_facts(interface: Interface, mode: Mode) -> EndpointFacts:
    """Derive what the programs and the evaluator need to know about an interface.

    Raises VgwError when it has more addresses or VLANs than an endpoint's configuration holds.
    """
    owned = tuple(_owned(interface))
    for count, limit, what in (
        (len(owned), MAX_ADDRESSES, "addresses and allowed pairs (link-local included)"),
        (len(interface.vlans), MAX_VLANS, "vlans"),
    ):
        if count > limit:
            message = f"interface {interface.name}: {count} {what}, the limit is {limit}"
            raise VgwError(f"{message}; list fewer or use ranges")
    missing = missing_guards(interface)
    guards = Guard(0)
    for each in fields(interface.guards):
        if getattr(interface.guards, each.name) and each.name not in missing:
            guards |= Guard[each.name.upper()]
    return EndpointFacts(
        mac=None if interface.mac is None else pack_mac(interface.mac),
        owned=owned,
        vlans=interface.vlans,
        guards=guards,
        learns=interface.learns,
        mode=mode,
        timeouts_ns={**DEFAULT_TIMEOUTS_NS, **dict(interface.tracking.timeouts_ns)},
        half_open_max=half_open_max(interface),
        new_per_second=interface.tracking.new_per_second,
    )


def half_open_max(interface: Interface) -> int:
    """Return how many half-open flows each side of an interface may have opened."""
    limit = interface.tracking.half_open_max
    return interface.conntrack_max // 4 if limit is None else limit


def possible_sources(endpoints: Iterable[EndpointFacts]) -> tuple[Network, ...] | None:
    """Return the networks that rules can meet as sources of a VM with these endpoints.

    None when the guards let it send from any address: one that no address is guarded of.
    """
    found: dict[Network, None] = {}
    for facts in endpoints:
        if Guard.ADDRESS not in facts.guards:
            return None
        found |= dict.fromkeys(network for network, _ in facts.owned)
    return tuple(found) or None


def _owned(interface: Interface) -> Iterator[tuple[Network, bytes | None]]:
    for address in interface.addresses:
        yield ip_network(address), None
    if interface.mac is not None:
        yield ip_network(link_local_address(pack_mac(interface.mac))), None
    elif interface.addresses or interface.learns:
        # Without the MAC nobody knows which link-local address the VM has; refusing them all
        # would leave it without IPv6, so any of them passes while global addresses stay guarded.
        yield LINK_LOCAL, None
    for pair in interface.allowed_pairs:
        yield pair.network, None if pair.mac is None else pack_mac(pair.mac)


def guard_answer(
    packet: Packet, path: Path, facts: EndpointFacts, *, dhcp_awaited: bool
) -> Answer | None:
    """Return what the guards decide about a fully read packet, None when rules have to.

    `dhcp_awaited`: the VM asked a DHCP server so recently that an answer may come.
    """
    if packet.vlan and packet.vlan not in facts.vlans:
        return _drop(Reason.VLAN)
    if packet.ethertype in IP_ETHERTYPES and is_group(packet.destination) != _is_group_frame(
        packet
    ):
        return _drop(Reason.GROUP_MISMATCH)
    if path is Path.FROM_VM:
        return _answer_from_vm(packet, facts, dhcp_awaited)
    return _answer_to_vm(packet, facts, dhcp_awaited)


def _answer_from_vm(packet: Packet, facts: EndpointFacts, dhcp_awaited: bool) -> Answer | None:
    if Guard.MAC in facts.guards and not facts.has_mac(packet.source_mac):
        return _drop(Reason.SPOOF_MAC)
    if packet.arp is not None:
        may_probe_any = facts.learns and dhcp_awaited
        return _answer_arp(packet, packet.arp, facts, may_probe_any)
    if packet.neighbour is not None:
        return _answer_neighbour(packet, packet.neighbour, facts)
    if Guard.ADDRESS in facts.guards and not _source_allowed(packet, facts):
        return _drop(Reason.SPOOF_ADDRESS)
    return _answer_request(packet, facts)


def _answer_request(packet: Packet, facts: EndpointFacts) -> Answer | None:
    """Answer what a VM with an honest source may ask for without a rule, or offer to nobody."""
    if Guard.DHCP_SERVER in facts.guards and _is_dhcp_answer(packet):
        return _drop(Reason.DHCP_SERVER)
    if packet.bootp is not None or _is_dhcpv6_request(packet):
        return _answer_dhcp_request(packet)
    if packet.membership is not None:
        is_query = packet.membership is Membership.QUERY
        return _drop(Reason.MEMBERSHIP_QUERY) if is_query else _accept(Reason.MEMBERSHIP)
    asks_echo = packet.icmp is not None and packet.icmp.echo is True
    return _drop(Reason.ECHO_TO_GROUP) if asks_echo and is_group(packet.destination) else None


def _answer_dhcp_request(packet: Packet) -> Answer | None:
    """Answer a DHCP client's message, which is whole and the VM's own, or refused."""
    is_own = packet.bootp is None or _bootp_is_own(packet)
    if not is_own or packet.fragment is not None:
        return _drop(Reason.DHCP_INVALID)
    # To one host, as in a renewal, a request is traffic like any: else it would be a way out.
    asks_all = packet.bootp is None or packet.destination == LIMITED_BROADCAST
    return _accept(Reason.DHCP) if asks_all else None


def _answer_to_vm(packet: Packet, facts: EndpointFacts, dhcp_awaited: bool) -> Answer | None:
    is_for_one = not _is_group_frame(packet)
    if Guard.MAC in facts.guards and is_for_one and not facts.has_mac(packet.destination_mac):
        return _drop(Reason.NOT_FOR_VM)
    if packet.ethertype == ETHERTYPE_RARP:
        return _drop(Reason.ETHERTYPE)
    if packet.arp is not None:
        return _accept(Reason.ARP)
    if packet.neighbour is not None:
        return _accept(Reason.ND)
    if packet.membership is not None:
        return _accept(Reason.MEMBERSHIP)
    is_answer = _is_dhcp_answer(packet) and packet.fragment is None
    return _accept(Reason.DHCP) if dhcp_awaited and is_answer else None


def _is_group_frame(packet: Packet) -> bool:
    """Tell whether a frame is addressed to a group of hosts, or to all."""
    return bool(packet.destination_mac[0] & 1)


def _answer_arp(packet: Packet, arp: Arp, facts: EndpointFacts, may_probe_any: bool) -> Answer:
    sender_is_real = arp.sender_mac == packet.source_mac
    if packet.ethertype == ETHERTYPE_RARP:  # what QEMU announces after a migration
        sender_is_real = sender_is_real and arp.target_mac == packet.source_mac
        return _accept(Reason.RARP) if sender_is_real else _drop(Reason.SPOOF_ARP)
    is_probe = arp.operation == ARP_REQUEST and arp.sender == UNSPECIFIED_IPV4
    claimed = arp.target if is_probe else arp.sender
    is_own = facts.owns(claimed, packet.source_mac) or (is_probe and may_probe_any)
    is_honest = sender_is_real and is_own
    if Guard.ARP in facts.guards and not is_honest:
        return _drop(Reason.SPOOF_ARP)
    return _accept(Reason.ARP)


def _answer_neighbour(packet: Packet, neighbour: Neighbour, facts: EndpointFacts) -> Answer:
    kind = packet.icmp.type if packet.icmp is not None else 0
    if kind == ROUTER_ADVERTISEMENT:
        if Guard.RA in facts.guards:
            return _drop(Reason.ROUTER_ADVERTISEMENT)
        return _accept(Reason.ND)
    if Guard.ND in facts.guards:
        honest = _neighbour_is_honest(packet, kind, neighbour, facts)
        return _accept(Reason.ND) if honest else _drop(Reason.SPOOF_ND)
    source_is_free = packet.source == UNSPECIFIED_IPV6 or Guard.ADDRESS not in facts.guards
    if source_is_free or _owns(facts, packet.source, packet):
        return _accept(Reason.ND)
    return _drop(Reason.SPOOF_ADDRESS)


def _neighbour_is_honest(
    packet: Packet, kind: int, neighbour: Neighbour, facts: EndpointFacts
) -> bool:
    if neighbour.link_layer not in {None, packet.source_mac}:
        return False
    owns_source = _owns(facts, packet.source, packet)
    owns_target = _owns(facts, neighbour.target, packet)
    if kind == NEIGHBOUR_ADVERTISEMENT:
        return owns_source and owns_target
    if packet.source != UNSPECIFIED_IPV6:
        return owns_source
    if kind == NEIGHBOUR_SOLICITATION:  # duplicate address detection
        return owns_target and neighbour.link_layer is None
    return True


def _source_allowed(packet: Packet, facts: EndpointFacts) -> bool:
    if packet.source == UNSPECIFIED_IPV4:
        return packet.bootp is not None and packet.destination == LIMITED_BROADCAST
    if packet.source == UNSPECIFIED_IPV6 and packet.membership is not None:
        return True
    return _owns(facts, packet.source, packet)


def _owns(facts: EndpointFacts, address: Address | None, packet: Packet) -> bool:
    return address is not None and facts.owns(address, packet.source_mac)


def _is_dhcp_answer(packet: Packet) -> bool:
    ports = packet.source_port, packet.destination_port
    if packet.protocol != UDP:
        return False
    if isinstance(packet.source, IPv4Address):
        return ports == (DHCPV4_SERVER, DHCPV4_CLIENT)
    return ports == (DHCPV6_SERVER, DHCPV6_CLIENT)


def _is_dhcpv6_request(packet: Packet) -> bool:
    return (
        packet.protocol == UDP
        and packet.destination == ALL_DHCPV6_SERVERS
        and (packet.source_port, packet.destination_port) == (DHCPV6_CLIENT, DHCPV6_SERVER)
    )


def _bootp_is_own(packet: Packet) -> bool:
    bootp = packet.bootp
    return (
        bootp is not None
        and bootp.operation == BOOTP_REQUEST
        and bootp.hardware_type == BOOTP_ETHERNET
        and bootp.hardware_length == 6
        and bootp.relay == UNSPECIFIED_IPV4
        and bootp.client_mac == packet.source_mac
    )


def _accept(reason: Reason) -> Answer:
    return Answer(Verdict.ACCEPT, reason)


def _drop(reason: Reason) -> Answer:
    return Answer(Verdict.DROP, reason)
