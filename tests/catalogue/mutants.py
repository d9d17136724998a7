# SPDX-License-Identifier: Apache-2.0
"""Deliberately wrong builds of the programs, for each group of the catalogue: one text changed.

Each must be noticed by the rows of its own group; test_mutants.py builds and plays them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vgw.policy.model import Hook


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of one of the files in bpf/, whose `old` text stands there once."""

    group: str
    name: str
    file: str
    old: str
    new: str
    hook: Hook = Hook.XDP


MUTANTS: Final = (
    Mutant(
        "A",
        "padding is read as headers",
        "cursor.h",
        "if (cursor->left < size || cursor->position + size > cursor->end)",
        "if (cursor->position + size > cursor->end)",
    ),
    Mutant(
        "A",
        "a total length beyond the frame is believed",
        "parse_network.h",
        "if (total < header || total > cursor->left)",
        "if (total < header)",
    ),
    Mutant(
        "A",
        "a data offset beyond the segment is believed",
        "parse_transport.h",
        "if (tcp->doff < TCP_MIN_WORDS || header > cursor->left)",
        "if (tcp->doff < TCP_MIN_WORDS)",
    ),
    Mutant(
        "A", "any IP version", "parse_network.h", "if (ip->version != 4)", "if (ip->version == 15)"
    ),
    Mutant(
        "B",
        "any tag",
        "guard.h",
        "if (!vlan_allowed(config, work->packet.vlan))",
        "if (false)",
    ),
    Mutant(
        "B",
        "priority tags are tags",
        "parse.h",
        "if (protocol != ETH_P_8021Q || !(control & VLAN_ID_MASK))",
        "if (protocol != ETH_P_8021Q)",
    ),
    Mutant(
        "B",
        "any source MAC",
        "guard.h",
        "if (guard_on(config, VGW_GUARD_MAC) && !work->owns.mac)",
        "if (false)",
    ),
    Mutant(
        "B",
        "flooded frames reach the VM",
        "guard.h",
        "if (!is_for_vm(config, work))",
        "if (false)",
    ),
    Mutant(
        "C",
        "IPv4 options are ignored",
        "parse_network.h",
        "packet->protocol != IPPROTO_IGMP)\n\t\treturn VGW_REASON_IP_OPTIONS;",
        "packet->protocol != IPPROTO_IGMP)\n\t\treturn VGW_REASON_NONE;",
    ),
    Mutant(
        "C",
        "any option of IGMP",
        "parse_network.h",
        "if (load_be32(options) != htonl(IPV4_ROUTER_ALERT))",
        "if (false)",
    ),
    Mutant(
        "C",
        "header of four words",
        "parse_network.h",
        "if (ip->ihl < IPV4_WORDS_WITHOUT_OPTIONS)",
        "if (ip->ihl < IPV4_WORDS_WITHOUT_OPTIONS - 1)",
    ),
    Mutant(
        "D",
        "later fragments are packets",
        "parse_network.h",
        "htons(IP_MORE_FRAGMENTS | IP_OFFSET_MASK)",
        "htons(IP_MORE_FRAGMENTS)",
    ),
    Mutant(
        "D",
        "first fragments are packets",
        "parse_network.h",
        "htons(IP_MORE_FRAGMENTS | IP_OFFSET_MASK)",
        "htons(IP_OFFSET_MASK)",
    ),
    Mutant(
        "E",
        "other extension headers end the chain",
        "parse_network.h",
        "return is_extension_header(packet->protocol) ?",
        "return false ?",
    ),
    Mutant(
        "E",
        "later IPv6 fragments are packets",
        "parse_network.h",
        "htons(IPV6_MORE_FRAGMENTS | IPV6_OFFSET_MASK)",
        "htons(IPV6_MORE_FRAGMENTS)",
    ),
    Mutant(
        "E",
        "IPv4-mapped destinations",
        "parse_network.h",
        "if (is_mapped_ipv4(&packet->source) || is_mapped_ipv4(&packet->destination))",
        "if (is_mapped_ipv4(&packet->source))",
    ),
    Mutant(
        "F",
        "any source address",
        "guard.h",
        "if (guard_on(config, VGW_GUARD_ADDRESS) && !work->owns.source &&",
        "if (false && !work->owns.source &&",
    ),
    Mutant(
        "F",
        "any ARP sender",
        "guard.h",
        "if (!work->owns.source && !probe)",
        "if (false && !probe)",
    ),
    Mutant(
        "F",
        "any target of an advertisement",
        "guard.h",
        "return work->owns.source && work->owns.target;",
        "return work->owns.source;",
    ),
    Mutant(
        "F",
        "neighbour discovery from afar",
        "parse_icmp.h",
        "if (packet->hop_limit != ND_HOP_LIMIT || packet->icmp_code ||",
        "if (packet->icmp_code ||",
    ),
    Mutant(
        "G",
        "any reset ends a connection",
        "conntrack.h",
        "if (!reset_is_exact(packet, path, flow))",
        "if (false)",
    ),
    Mutant(
        "G",
        "FIN without ACK",
        "parse_transport.h",
        "case TCP_FIN | TCP_ACK:",
        "case TCP_FIN:\n\tcase TCP_FIN | TCP_ACK:",
    ),
    Mutant(
        "G",
        "any segment opens a connection",
        "conntrack.h",
        "if (is_tcp(packet))\n\t\treturn is_new_tcp(packet);",
        "if (is_tcp(packet))\n\t\treturn true;",
    ),
    Mutant(
        "G",
        "flows of an older policy stay",
        "pipeline.h",
        "if (flow && (s32)(flow->generation - config->generation) >= 0)",
        "if (flow)",
    ),
    Mutant(
        "H",
        "errors for anybody",
        "pipeline.h",
        "!same_address(&packet->destination, &packet->quoted.source);",
        "false;",
    ),
    Mutant(
        "H",
        "the identifier of an echo is ignored",
        "parse_icmp.h",
        "packet->source_port = identifier;\n\tpacket->destination_port = identifier;",
        "packet->source_port = 0;\n\tpacket->destination_port = 0;",
    ),
    Mutant(
        "H",
        "errors about errors",
        "parse_icmp.h",
        "if (icmp[0] != request && icmp[0] != reply)",
        "if (false)",
    ),
    Mutant(
        "I",
        "one port may be zero",
        "parse_transport.h",
        "return source && destination ?",
        "return source || destination ?",
    ),
    Mutant(
        "I",
        "the default is for every protocol",
        "policy.h",
        "else if (work->query.ordinary)",
        "else if (true)",
    ),
    Mutant(
        "I",
        "UDP of any port answers",
        "conntrack.h",
        "key->remote_port = from_vm ? destination_port : source_port;",
        "key->remote_port = from_vm && !source_port ? destination_port : 0;",
    ),
    Mutant(
        "J",
        "MLD queries from the VM",
        "guard.h",
        "if (type == IGMP_QUERY || type == MLD_QUERY)",
        "if (type == IGMP_QUERY)",
    ),
    Mutant(
        "J",
        "MLD without router alert",
        "parse_icmp.h",
        "if (!packet->router_alert || packet->hop_limit != MLD_HOP_LIMIT ||",
        "if (packet->hop_limit != MLD_HOP_LIMIT ||",
    ),
    Mutant(
        "J",
        "IGMP to a host",
        "parse_transport.h",
        "if ((packet->destination.bytes[12] & 0xf0) != 0xe0)",
        "if (false)",
    ),
    Mutant(
        "K",
        "a length of zero is believed of any IPv4 frame",
        "parse_network.h",
        "if (!total && cursor->gso)",
        "if (!total)",
    ),
    Mutant(
        "K",
        "a length of zero is believed of any IPv6 frame",
        "parse_network.h",
        "if (!length && cursor->gso)",
        "if (!length)",
    ),
    Mutant(
        "K",
        "super-packets are like any frame",
        "tc.h",
        "frame.gso = skb->gso_size;",
        "frame.gso = false;",
        Hook.TC,
    ),
    Mutant(
        "L",
        "a full table lets pass",
        "conntrack.h",
        "if (error)\n\t\treturn VGW_REASON_CT_FULL;",
        "if (error)\n\t\treturn VGW_REASON_NONE;",
    ),
    Mutant(
        "L",
        "dropped packets take room",
        "pipeline.h",
        "if (work->decision.verdict != VGW_VERDICT_ACCEPT || work->packet.kind == KIND_ICMP_OTHER)",
        "if (work->packet.kind == KIND_ICMP_OTHER)",
    ),
)
